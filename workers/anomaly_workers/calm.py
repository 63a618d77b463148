"""The fast way to learn: what annotators rejected counts as normal within seconds, without training."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from anomaly_workers import push, scoring, sweep
from anomaly_workers.counters import count
from anomaly_workers.detectors.base import Detector
from anomaly_workers.feedback import Entry, Example, FeedbackLog
from anomaly_workers.runtime import Runtime, Session
from anomaly_workers.types import Progress, no_progress

logger = logging.getLogger(__name__)

UNFINISHED = "calming"
"""The document that names the tasks a rejected alarm has still to be scored again for."""

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
    gave_up = runtime.queues.gave_up_fitting(project, within=sweep.FIT_AGAIN_SECONDS)
    if sweep.may_learn(session.store, log, runtime.settings) and not (gave_up or runtime.queues.fitting(project)):
        runtime.queues.enqueue_fit(project, "feedback")
    return {"new": len(news), "calmed": calmed}


def calm(runtime: Runtime, session: Session, log: FeedbackLog, progress: Progress) -> int:
    """Make the deployed version take rejected places as normal; return how many predictions changed for it.

    The image itself and those with a hot patch like the rejected ones are scored again, and their predictions replaced
    under the same version. A rejection that was taken back, or overruled, is forgotten. What is to be scored again is
    noted first, so that a job that is repeated knows it.
    """
    store, version = session.store, session.store.current
    wanted = rejections(log, store.family(version))
    known, unfinished = set(store.calmed(version)), _unfinished(session, version)
    if wanted.keys() == known and not unfinished:
        return 0
    progress(0.2, "calming down")
    detector = runtime.detector(session.store.id, version)
    gone, new = sorted(known - wanted.keys()), sorted(wanted.keys() - known)
    patches = {
        entry: rows for entry in new if (rows := _patches(runtime, session, detector, wanted[entry])) is not None
    }
    changed = [rows for rows in (store.calmed_patches(version, gone), *patches.values()) if len(rows)]
    tasks = {wanted[entry].task for entry in new} | unfinished
    if changed:
        tasks |= alike(session, detector, version, np.concatenate(changed))
    store.keep_document(UNFINISHED, {"version": version, "tasks": sorted(tasks)})
    for entry in gone:
        store.forget_calmed(version, entry)
    for entry, rows in patches.items():
        store.keep_calmed(version, entry, rows)
    done = _score_again(runtime, session, version, tasks, progress)
    store.keep_document(UNFINISHED, {})
    return done


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


def _unfinished(session: Session, version: str) -> set[int]:
    """Return the tasks that an interrupted job was to score again."""
    noted = session.store.document(UNFINISHED)
    return set(noted["tasks"]) if noted.get("version") == version else set()


def _patches(runtime: Runtime, session: Session, detector: Detector, example: Example) -> NDArray[np.float16] | None:
    """Return what a rejection makes normal; None, and a noted failure, where the image cannot be read."""
    tasks = session.client.tasks(session.store.id, [example.task])
    for picture in scoring.gather(runtime, session, tasks, side=detector.side, progress=no_progress):
        if picture is not None:
            return detector.quietening(picture, None if example.anomaly is False else example.rejected)
    return None


def _score_again(runtime: Runtime, session: Session, version: str, tasks: Iterable[int], progress: Progress) -> int:
    wanted = session.client.tasks(session.store.id, sorted(tasks))
    scored = scoring.detect(runtime, session, version, wanted, scoring.part(progress, 0.3, 0.8))
    predictions = [scoring.keep(session, version, item) for item in scored]
    progress(0.9, "replacing predictions")
    return len(push.replacements(runtime.redis, session.client, session.store, version, predictions))
