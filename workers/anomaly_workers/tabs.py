"""Data Manager tabs: queues that work in the free edition of Label Studio, each with its filter and its order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from anomaly_workers.client import Client
from anomaly_workers.labelstudio.encode import share_mark
from anomaly_workers.store import ProjectStore
from anomaly_workers.types import JSON, Controls

NAME = "tabs"

LIKELY = "Likely defects"
DISAGREE = "Model and annotator disagree"
FAILED = "Could not be scored"

MOST_LISTED = 100
"""Task ids in one tab's filter."""

_SHOWN = (
    "tasks:id",
    "tasks:predictions_score",
    "tasks:total_annotations",
    "tasks:total_predictions",
    "tasks:annotators",
)
_HIDDEN = (
    "tasks:inner_id",
    "tasks:completed_at",
    "tasks:reviewed",
    "tasks:ground_truth",
    "tasks:cancelled_annotations",
    "tasks:annotations_results",
    "tasks:annotations_ids",
    "tasks:predictions_model_versions",
    "tasks:predictions_results",
    "tasks:file_upload",
    "tasks:storage_filename",
    "tasks:created_at",
    "tasks:updated_at",
    "tasks:updated_by",
    "tasks:avg_lead_time",
    "tasks:draft_exists",
)


def ensure(client: Client, store: ProjectStore, controls: Controls, *, annotators: int) -> list[str]:
    """Create our tabs, or bring them up to date; return what was changed, one line each.

    A tab of ours that somebody deleted in Label Studio comes back at the next call; tabs of others are not touched.
    """
    known = {str(title): int(tab) for title, tab in store.document(NAME).items()}
    there = client.tabs(store.id)
    changes = []
    wanted = dict(_tabs(controls, annotators, listed=()))
    for title in sorted(known.keys() - wanted.keys()):
        client.delete_tab(known.pop(title))
        changes.append(f"removed the tab '{title}'")
    for title, data in wanted.items():
        if known.get(title) not in there:
            known[title] = client.create_tab(store.id, data)
            changes.append(f"created the tab '{title}'")
    store.keep_document(NAME, {title: known[title] for title in wanted})
    return changes


def list_disagreements(client: Client, store: ProjectStore, tasks: Sequence[int]) -> None:
    """Have the tab of disagreements show some tasks; nothing happens where the project has no such tab."""
    tab = store.document(NAME).get(DISAGREE)
    if tab is not None and tab in (there := client.tabs(store.id)):
        data = _disagree(tasks)
        if there[tab].get("filters") != data["filters"]:
            client.update_tab(tab, store.id, data)


def links(store: ProjectStore, url: str) -> dict[str, str]:
    """Return the address of the label stream of each of our tabs that is one, by title."""
    tabs = store.document(NAME)
    return {
        title: f"{url}/projects/{store.id}/data?tab={tab}&labeling=1"
        for title, tab in tabs.items()
        if title not in (FAILED, DISAGREE)
    }


def _tabs(controls: Controls, annotators: int, listed: Sequence[int]) -> Iterator[tuple[str, JSON]]:
    for place in range(annotators):
        title = "Review next" if annotators == 1 else f"Review next ({place + 1} of {annotators})"
        share = [] if annotators == 1 else [_says(share_mark(place, annotators))]
        yield title, _tab(title, [_OPEN, *share], "tasks:predictions_score")
    if controls.choices is not None or controls.mask is not None:
        yield LIKELY, _tab(LIKELY, [_OPEN, _says(_anomaly(controls))], "-tasks:predictions_results")
    yield DISAGREE, _disagree(listed)
    yield FAILED, _tab(FAILED, [_OPEN, _item("total_predictions", "equal", "Number", 0)], "tasks:id")


def _disagree(tasks: Sequence[int]) -> JSON:
    items = [_item("id", "equal", "Number", task) for task in list(tasks)[:MOST_LISTED]]
    nothing = [_item("id", "equal", "Number", 0)]
    return _tab(DISAGREE, items or nothing, "tasks:predictions_score", conjunction="or")


def _tab(title: str, items: Sequence[JSON], order: str, *, conjunction: str = "and") -> JSON:
    return {
        "title": title,
        "type": "list",
        "target": "tasks",
        "ordering": [order],
        "filters": {"conjunction": conjunction, "items": list(items)},
        "hiddenColumns": {"explore": list(_HIDDEN), "labeling": list(_HIDDEN)},
        "columnsWidth": {},
        "columnsDisplayType": {},
        "gridWidth": 4,
    }


def _item(name: str, operator: str, kind: str, value: str | int | bool) -> JSON:
    return {"filter": f"filter:tasks:{name}", "operator": operator, "type": kind, "value": value}


# Label Studio's page knows no column is_labeled, and an operator it does not know breaks all tabs of the project.
_OPEN = _item("total_annotations", "equal", "Number", 0)


def _says(text: str) -> JSON:
    return _item("predictions_results", "contains", "String", text)


def _anomaly(controls: Controls) -> str:
    """Return how "anomaly" stands in the JSON of a prediction: as a list of its own."""
    return json.dumps([controls.anomaly if controls.choices is not None else controls.mask_label])
