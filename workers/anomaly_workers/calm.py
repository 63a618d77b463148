"""The fast way to learn: what annotators rejected counts as normal within seconds, without training."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from anomaly_workers import push, scoring, sweep
from anomaly_workers.counters import count
from anomaly_workers.detectors.base import Detector
from anomaly_workers.feedback import Entry, Example, FeedbackLog
from anomaly_workers.runtime import Runtime, Session
from anomaly_workers.types import Progress, no_progress

logger = logging.getLogger(__name__)

MOST_ALIKE = 256
"""Look-alikes scored again at once; the next version scores all."""


def feedback(runtime: Runtime, progress: Progress, *, project: int) -> dict[str, int]:
    """Read the project's annotations, calm down what they rejected, and have it learnt from when it is time."""
    session = runtime.session(project)
    log = FeedbackLog(session.store)
    progress(0.0, "reading annotations")
    news = log.reconcile(session.client, session.controls)
    count(runtime.redis, "verdicts", len(news))
    calmed = calm(runtime, session, log, progress) if session.store.current else 0
    if sweep.may_learn(session.store, log, runtime.settings) and not runtime.queues.fitting(project):
        runtime.queues.enqueue_fit(project, "feedback")
    return {"new": len(news), "calmed": calmed}


def calm(runtime: Runtime, session: Session, log: FeedbackLog, progress: Progress) -> int:
    """Make the deployed version take rejected places as normal; return how many predictions changed for it.

    The image itself and those with a hot patch like the rejected ones are scored again, and their predictions replaced
    under the same version. A rejection that was taken back, or overruled, is forgotten.
    """
    store, version = session.store, session.store.current
    wanted = rejections(log, store.family(version))
    known = set(store.calmed(version))
    if wanted.keys() == known:
        return 0
    progress(0.2, "calming down")
    before = store.calmed_patches(version, sorted(known))
    for entry in known - wanted.keys():
        store.forget_calmed(version, entry)
    detector = runtime.detector(session.store.id, version)
    for entry in sorted(wanted.keys() - known):
        _keep(runtime, session, detector, version, entry, wanted[entry])
    after = store.calmed_patches(version, store.calmed(version))
    own = {wanted[entry].task for entry in wanted.keys() - known}
    changed = _difference(before, after)
    return _score_again(runtime, session, version, own | alike(session, detector, version, changed), progress)


def rejections(log: FeedbackLog, family: Collection[str]) -> dict[int, Example]:
    """Return what annotators rejected of predictions, by the number of the newest entry that says so.

    Args:
        log: what annotators said.
        family: the versions whose predictions count: they share their weights, and so what is calm.
    """
    entries: dict[int, list[Entry]] = {}
    for entry in log.current().values():
        if entry.version in family and (entry.judged == "false alarm" or entry.rejected):
            entries.setdefault(entry.task, []).append(entry)
    examples = {example.task: example for example in log.examples(entries)}
    return {
        max(entry.seq for entry in of_task): examples[task]
        for task, of_task in entries.items()
        if task in examples and (examples[task].anomaly is False or examples[task].rejected is not None)
    }


def alike(session: Session, detector: Detector, version: str, patches: NDArray[np.float16]) -> set[int]:
    """Return the tasks whose hot patches change with patches (k, d); the highest scores first if there are many."""
    if not len(patches):
        return set()
    found = []
    for task, hottest in session.store.hottest(version):
        if detector.is_quietened(hottest, patches) and (record := session.store.record(version, task)):
            about = record["anomaly"]
            if about["anomaly_score"] >= about["threshold"] or about["calmed"]:
                found.append((about["anomaly_score"], task))
    return {task for _, task in sorted(found, reverse=True)[:MOST_ALIKE]}


def _keep(runtime: Runtime, session: Session, detector: Detector, version: str, entry: int, example: Example) -> None:
    tasks = session.client.tasks(session.store.id, [example.task])
    for picture in scoring.gather(runtime, session, tasks, side=detector.side, progress=no_progress):
        if picture is None:
            continue  # the reason is noted with the task's failure
        where = None if example.anomaly is False else example.rejected
        session.store.keep_calmed(version, entry, detector.quietening(picture, where))


def _score_again(runtime: Runtime, session: Session, version: str, tasks: Iterable[int], progress: Progress) -> int:
    wanted = session.client.tasks(session.store.id, sorted(tasks))
    scored = scoring.detect(runtime, session, version, wanted, scoring.part(progress, 0.3, 0.8))
    predictions = [scoring.keep(session, version, item) for item in scored]
    progress(0.9, "replacing predictions")
    return push.replacements(runtime.redis, session.client, session.store, version, predictions)


def _difference(before: NDArray[np.float16], after: NDArray[np.float16]) -> NDArray[np.float16]:
    """Return the rows that are in one of the two alone."""
    rows: Sequence[NDArray[np.float16]] = [part for part in (before, after) if len(part)]
    if not rows:
        return after
    unique, counts = np.unique(np.concatenate(rows), axis=0, return_counts=True)
    return np.asarray(unique[counts == 1])
