"""The review queue: after every round of scoring, the order in which Label Studio shows the open tasks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomaly_workers import policy, sweep, tabs
from anomaly_workers.active import places as queue
from anomaly_workers.active import strategies
from anomaly_workers.active.clusters import clusters
from anomaly_workers.active.strategies import Pool
from anomaly_workers.feedback import FeedbackLog
from anomaly_workers.runtime import Runtime, Session
from anomaly_workers.types import JSON, Progress

logger = logging.getLogger(__name__)

LENGTH = 60
"""Tasks at the front of the queue, in the strategy's order; behind them confidence decides."""

LOOK_AFTER = 10
"""Predictions that are written between two looks at what else is to be done."""

PART = 100
"""Predictions whose ids are read at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """What Label Studio knows of a task's place in the queue.

    Attributes:
        prediction: id of the prediction that carries it.
        score: the prediction's score: below `FRONT` a place at the front, else the confidence.
        cluster: the prediction's cluster, -1 if it has none.
    """

    prediction: int
    score: float
    cluster: int


def rank(runtime: Runtime, progress: Progress, *, project: int) -> dict[str, int | str]:
    """Order a project's open tasks by its strategy and write the order into their predictions.

    Predictions keep their result; only `score` and `cluster` change, one by one, because Label Studio takes clusters
    in no other way. The front comes first. Should another long job wait, the rest is left to the next round; and all of
    it should the predictions be about to be replaced.
    """
    session = runtime.session(project)
    store, version = session.store, session.store.current
    if not version or store.rollout:
        return {"skipped": "the next version is on its way"}
    progress(0.0, "reading what is open")
    log = FeedbackLog(store)
    pushed, seen = store.pushed(version), max((entry.seq for entry in log.entries()), default=0)
    chosen = policy.read(store)
    tasks = [task.id for task in session.client.open_tasks(project)]
    pool, records = read_pool(session, log, version, tasks)
    known = _known(session, version)
    order = strategies.named(chosen.strategy)(pool, LENGTH)
    wanted = _wanted(pool, records, order, known)
    front = [int(task) for task in pool.tasks[order]]
    rest = [task for task in wanted if task not in set(front)]
    for task in front:
        known.pop(task, None)  # somebody may have replaced its prediction meanwhile
    complete = all(
        _write(session, version, part, wanted, known, _stop(runtime, session, version, polite=polite), progress)
        for part, polite in ((front, False), (rest, True))
    )
    store.keep_document(
        sweep.QUEUE,
        {
            "version": version,
            "strategy": chosen.strategy,
            "pushed": pushed,
            "seen": seen,
            "at": time.time(),
            "complete": complete,
            "front": front,
            "places": {str(task): [place.prediction, place.score, place.cluster] for task, place in known.items()},
        },
    )
    tabs.list_disagreements(session.client, store, disagreements(log))
    return {"ranked": len(wanted), "front": len(front)}


def read_pool(session: Session, log: FeedbackLog, version: str, tasks: Iterable[int]) -> tuple[Pool, dict[int, JSON]]:
    """Return what a version says of tasks, as a pool and as records by task; those it did not score are left out."""
    store = session.store
    found = {task: record for task in tasks if (record := store.record(version, task)) is not None}
    records = {task: record for task, record in found.items() if store.is_pushed(version, task)}
    about = [record["anomaly"] for record in records.values()]
    current = {entry.task: entry for entry in log.current().values()}
    hottest = dict(_embeddings(session, version, {*records, *current}))
    width = next((len(row) for row in hottest.values()), 1)
    none = np.zeros(width, np.float32)
    parts = [one.get("parts") or () for one in about]
    pool = Pool(
        tasks=np.asarray(list(records), np.int64),
        scores=np.asarray([one["anomaly_score"] for one in about], np.float64),
        threshold=float(about[0]["threshold"]) if about else 0.5,
        embeddings=np.asarray([hottest.get(task, none) for task in records], np.float32).reshape(-1, width),
        parts=np.asarray(parts, np.float64) if parts and all(len(one) == 2 for one in parts) else None,
        reviewed=np.asarray([hottest[task] for task in current if task in hottest], np.float32).reshape(-1, width),
        defects=sum(entry.anomaly is True for entry in current.values()),
    )
    return pool, records


def disagreements(log: FeedbackLog) -> list[int]:
    """Return the tasks whose annotator contradicted the prediction, the newest first."""
    entries = sorted(log.current().values(), key=lambda entry: entry.seq, reverse=True)
    return list(dict.fromkeys(entry.task for entry in entries if entry.judged in ("missed", "false alarm")))


def _embeddings(session: Session, version: str, tasks: set[int]) -> Iterable[tuple[int, NDArray[np.float32]]]:
    """Yield the mean of the hottest patches (d,) of each task."""
    for task, hottest in session.store.hottest(version):
        if task in tasks and len(hottest):
            yield task, hottest.astype(np.float32).mean(axis=0)


def _known(session: Session, version: str) -> dict[int, Place]:
    document = session.store.document(sweep.QUEUE)
    if document.get("version") != version:
        return {}
    return {int(task): Place(*place) for task, place in document["places"].items()}


def _wanted(
    pool: Pool, records: Mapping[int, JSON], order: strategies.Order, known: Mapping[int, Place]
) -> dict[int, tuple[float, int]]:
    """Return score and cluster of each task, in the order of the queue."""
    front = queue.places(pool.tasks[order].tolist(), {task: place.score for task, place in known.items()})
    groups = clusters(pool, {task: place.cluster for task, place in known.items() if place.cluster > 0})
    rest = {task: max(float(record["score"]), queue.FRONT) for task, record in records.items() if task not in front}
    scores = front | dict(sorted(rest.items(), key=lambda item: item[1]))
    cluster = dict(zip(pool.tasks.tolist(), groups.tolist(), strict=True))
    return {task: (score, cluster[task]) for task, score in scores.items()}


def _write(
    session: Session,
    version: str,
    tasks: list[int],
    wanted: Mapping[int, tuple[float, int]],
    known: dict[int, Place],
    stop: Callable[[], bool],
    progress: Progress,
) -> bool:
    """Bring predictions to the wanted score and cluster, note it in `known`; False if told to stop before the end."""
    for start in range(0, len(tasks), PART):
        part = tasks[start : start + PART]
        unknown = [task for task in part if task not in known]
        known |= _read(session, version, unknown) if unknown else {}
        for place, task in enumerate(part):
            if stop():
                return False
            progress((start + place) / len(tasks), "ordering the review queue")
            now, (score, cluster) = known.get(task), wanted[task]
            if now is None or (now.score, now.cluster) == (score, cluster):
                continue
            if session.client.update_prediction(now.prediction, score=score, cluster=cluster):
                known[task] = Place(now.prediction, score, cluster)
            else:
                del known[task]
    return True


def _read(session: Session, version: str, tasks: list[int]) -> dict[int, Place]:
    """Return what Label Studio has of tasks; of two predictions of a version the newest counts."""
    found = {}
    for task, predictions in session.client.predictions(session.store.id, tasks=tasks).items():
        ours = [one for one in predictions if one.get("model_version") == version]
        if ours:
            newest = max(ours, key=lambda one: int(one["id"]))
            cluster = newest.get("cluster")
            found[task] = Place(newest["id"], float(newest["score"] or 0), -1 if cluster is None else int(cluster))
    return found


def _stop(runtime: Runtime, session: Session, version: str, *, polite: bool) -> Callable[[], bool]:
    """Tell whether the predictions are being replaced or, if `polite`, another long job waits; looks now and then."""
    asked = 0
    store, queues = session.store, runtime.queues

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked % LOOK_AFTER != 1:
            return False
        replaced = store.current != version or bool(store.rollout) or queues.under_way(store.id, "threshold")
        return replaced or (polite and queues.depth()["learn"] > 0)

    return stop
