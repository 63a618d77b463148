"""Comparing version cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anomaly_workers.types import JSON

FIELDS = (
    *("kind", "mode", "images", "confirmed", "defects", "defects_with_mask", "feedback", "threshold", "rule"),
    *("run", "code", "created"),
)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> JSON:
    """Compare two cards.

    Returns:
        `fields`: name to (before, after) where they differ, with the figures each had on confirmed images; `images`:
        the confirmed images both scored without having seen them, that changed sides of the threshold.
    """
    fields = {
        name: (before.get(name, ""), after.get(name, ""))
        for name in FIELDS
        if before.get(name, "") != after.get(name, "")
    }
    decision = after.get("decision", {})
    if decision.get("champion") and after.get("parent") == before.get("version"):
        for figure, was in decision["champion"].items():
            fields[figure.replace("_", " ")] = (round(was, 3), round(decision["challenger"][figure], 3))
    return {"before": before["version"], "after": after["version"], "fields": fields, "images": _changed(before, after)}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[JSON]:
    old, new = before.get("held_out", {}), after.get("held_out", {})
    limits = float(before["threshold"]), float(after["threshold"])
    rows = []
    for task in sorted(old.keys() & new.keys(), key=int):
        was, now = old[task] >= limits[0], new[task] >= limits[1]
        if was != now:
            says = "alarm -> quiet" if was else "quiet -> alarm"
            rows.append({"task": int(task), "before": old[task], "after": new[task], "says": says})
    return rows
