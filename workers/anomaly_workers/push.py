"""Predictions into Label Studio: in bulk, one writer a project, each task once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from redis import Redis

from anomaly_workers.client import Client, Rejected
from anomaly_workers.store import ProjectStore
from anomaly_workers.types import JSON

logger = logging.getLogger(__name__)

LOCK_SECONDS = 60
"""A killed writer blocks its project's other writers at most this long."""


def predictions(connection: Redis, client: Client, store: ProjectStore, version: str, items: Sequence[JSON]) -> int:
    """Import predictions of one version, leaving out tasks that have one already; return how many were new.

    Label Studio has no upsert, so it is asked first, under a lock; what a crash between the two leaves is mended by
    the sweep. A prediction it refuses is noted as its task's failure.
    """
    if not items:
        return 0
    with writing(connection, store.id):
        present = client.prediction_counts(store.id, version, tasks=[item["task"] for item in items])
        fresh = [item for item in items if item["task"] not in present]
        rejected = _note(store, client.import_predictions(store.id, fresh))
        taken = [item["task"] for item in items if item["task"] not in rejected]
        store.mark_pushed(version, dict.fromkeys(taken, True))
        announce(client, store, version)
    return len(fresh) - len(rejected)


def replacements(
    connection: Redis, client: Client, store: ProjectStore, version: str, items: Sequence[JSON]
) -> list[int]:
    """Import new predictions of tasks that have one of the same version, then delete the old; return the tasks.

    For a moment a task has two, and never none; a crash in between leaves two, which the sweep mends. A prediction that
    Label Studio refuses is noted as its task's failure, and the old one stays.
    """
    if not items:
        return []
    with writing(connection, store.id):
        tasks = [int(item["task"]) for item in items]
        before = client.prediction_ids(store.id, version, tasks=tasks)
        _note(store, client.import_predictions(store.id, items))
        after = client.prediction_ids(store.id, version, tasks=tasks)
        done = [task for task in tasks if set(after.get(task, ())) - set(before.get(task, ()))]
        for task in done:
            for prediction in before.get(task, ()):
                client.delete_prediction(prediction)
        store.mark_pushed(version, dict.fromkeys(done, True))
    return done


def announce(client: Client, store: ProjectStore, version: str) -> None:
    """Make Label Studio show the deployed version's predictions; it accepts only a version it has predictions of."""
    if version == store.current and store.announced != version:
        client.set_model_version(store.id, version)
        store.keep_announced(version)


def _note(store: ProjectStore, rejected: Sequence[Rejected]) -> set[int]:
    """Keep why Label Studio refused predictions; return their tasks."""
    for one in rejected:
        store.keep_failure(one.task_id, f"Label Studio refused the prediction: {one.reason}", "", permanent=False)
    return {one.task_id for one in rejected}


@contextmanager
def writing(connection: Redis, project: int) -> Iterator[None]:
    """Hold the right to write predictions of a project."""
    with connection.lock(f"anomaly:push:{project}", timeout=LOCK_SECONDS, blocking_timeout=LOCK_SECONDS * 2):
        yield
