"""Print the requirements of this distribution, so that an image layer depends on them alone."""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path
from typing import Any


def requirements(project: dict[str, Any], *, extra: str = "", only: list[str] | None = None) -> list[str]:
    """Return the base requirements and those of `extra`, or just those named in `only` from anywhere."""
    base: list[str] = project["dependencies"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    if only:
        return [line for line in (*base, *(line for lines in extras.values() for line in lines)) if name(line) in only]
    return [*base, *(extras[extra] if extra else [])]


def name(requirement: str) -> str:
    """Return the distribution's name: what stands before extras, versions and markers."""
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pyproject", type=Path)
    parser.add_argument("--extra", default="")
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    table = tomllib.loads(options.pyproject.read_text(encoding="utf-8"))["project"]
    sys.stdout.write("\n".join(requirements(table, extra=options.extra, only=options.only)) + "\n")
