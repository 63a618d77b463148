"""The README tells the truth about names: settings, commands, addresses, files."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main

from anomaly_workers.cli import app
from anomaly_workers.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = set(typer.main.get_group(app).commands)  # type: ignore[attr-defined]


def test_the_configuration_table_is_the_settings() -> None:
    rows = dict(re.findall(r"^\| `ANOMALY_([A-Z0-9_]+)` \| (.*?) \|", README, flags=re.M))
    assert list(rows) == [name.upper() for name in Settings.model_fields]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = str(default.get_secret_value() if hasattr(default, "get_secret_value") else default)
        expected = shown.replace(str(Path.home()), "~") or "empty"
        assert rows[name.upper()].strip("`") == expected, name


def test_every_command_in_the_readme_exists_and_every_command_is_there() -> None:
    named = set(re.findall(r"ls-anomaly ([a-z]+)", README))
    assert named <= COMMANDS
    assert {name for name in COMMANDS if f"`{name}`" not in README and name not in named} == set()


def test_every_variable_in_the_readme_exists() -> None:
    named = {name.lower() for name in re.findall(rf"{PREFIX}([A-Z0-9_]*[A-Z0-9])", README)}
    assert named <= set(Settings.model_fields)


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_every_address_in_the_readme_is_served() -> None:
    routes = "".join((ROOT / f"backend/anomaly_backend/{name}.py").read_text() for name in ("routes", "pages"))
    for address in re.findall(r"`/([a-z]+)[`/]", README):
        assert f'"/{address}' in routes, address


def test_every_linked_file_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_module_in_the_readme_exists() -> None:
    section = README.split("## Where things are")[1].split("\n## ")[0]
    for name in re.findall(r"`([a-z_]+)/?`", section):
        patterns = (name, f"*/anomaly_*/{name}.py", f"*/anomaly_*/{name}", f"tests/{name}")
        places = [place for pattern in patterns for place in ROOT.glob(pattern)]
        assert places, name
