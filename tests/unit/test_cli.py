"""The command line prints what others wrote as it is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from anomaly_workers import cli
from anomaly_workers.errors import ConfigError
from anomaly_workers.store import Store

HOSTILE = "[/] [link=http://evil]here[/link] [bold"


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    for name in ("console", "errors"):
        monkeypatch.setattr(cli, name, Console(file=out, width=200))
    return out


def test_an_error_is_no_markup(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise ConfigError(HOSTILE)

    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(SystemExit):
        cli.main()
    assert printed.getvalue().strip() == f"error: {HOSTILE}"


def test_a_failure_is_no_markup(printed: io.StringIO, tmp_path: Path) -> None:
    project = Store(tmp_path).project(1)
    project.keep_failure(7, f"why {HOSTILE}", f"image {HOSTILE}", permanent=True)
    cli._print_failures([project])
    assert f"why {HOSTILE}" in printed.getvalue()
    assert f"image {HOSTILE}" in printed.getvalue()
