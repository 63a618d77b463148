"""What every test may use: the shared material beside the project, and a clean environment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in {"integration", "e2e", "gpu"}:
            item.add_marker(folder)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ANOMALY_* variable of the person who runs the tests reaches them."""
    for name in [name for name in os.environ if name.startswith("ANOMALY_")]:
        monkeypatch.delenv(name)


def absent(what: str) -> None:
    """Skip on a laptop, fail in CI: a test that never runs proves nothing."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is absent, and CI must not skip it")
    pytest.skip(f"{what} is absent")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of measuring material beside the project."""
    if not SHARED.is_dir():
        absent("../shared (recorded requests and measuring images)")
    return SHARED


@pytest.fixture(scope="session")
def recorded(shared: Path) -> Callable[[str], dict[str, Any]]:
    """Return the body of a request that Label Studio 1.23.2 really sent."""

    def body(name: str) -> dict[str, Any]:
        request: dict[str, Any] = json.loads((shared / "label_studio" / "payloads" / f"{name}.json").read_text())
        return dict(request["body"])

    return body
