"""A project's page as one file, for mail and archives."""

from __future__ import annotations

from pathlib import Path

from anomaly_workers.errors import StoreError
from anomaly_workers.pages import render
from anomaly_workers.pages.collect import Collector
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings
from anomaly_workers.store import Store


def write(settings: Settings, project: int, out: Path, queues: Queues | None = None) -> int:
    """Write a project's report to `out`; return its size in bytes.

    Raises:
        StoreError: there is no such project.
    """
    store = Store(settings.data_dir)
    snapshot = Collector(store, settings).snapshot(project, queues)
    if snapshot is None:
        raise StoreError(f"Project {project} is not known here. Run: ls-anomaly connect --project {project}")

    content = render.report(snapshot, store.project(project).heatmap_of).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(content)
    return len(content)
