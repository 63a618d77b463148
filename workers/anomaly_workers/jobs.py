"""The product's work, one short function a step. Every job may run twice: each step looks before it writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from redis import Redis

from anomaly_workers import images, push, sweep
from anomaly_workers.counters import count
from anomaly_workers.detectors.regions import regions
from anomaly_workers.errors import ImageError
from anomaly_workers.labelstudio import config, encode
from anomaly_workers.runtime import Runtime, Session
from anomaly_workers.settings import Settings
from anomaly_workers.store import image_key
from anomaly_workers.types import JSON, Detection, Picture, Progress, Task

logger = logging.getLogger(__name__)

FETCHERS = 4
"""Images fetched and decoded at once; the network hides behind the GPU or the other CPU core."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One task through the detector."""

    task: Task
    picture: Picture
    detection: Detection


def score(
    runtime: Runtime, progress: Progress, *, project: int, version: str, tasks: list[JSON]
) -> dict[str, int | str]:
    """Score tasks with a version, keep the results, push them to Label Studio.

    A broken image is noted as its task's failure; the rest of the batch goes on.
    """
    started = time.monotonic()
    session = runtime.session(project)
    if version not in (session.store.current, session.store.rollout):
        return {"skipped": f"{version} is no longer wanted"}
    wanted = [Task(id=int(task["id"]), data=task["data"]) for task in tasks]
    stored = {task.id: record for task in wanted if (record := _stored(session, version, task)) is not None}
    scored = detect(runtime, session, version, [task for task in wanted if task.id not in stored], progress)
    predictions = [keep(session, version, item) for item in scored] + list(stored.values())
    progress(0.8, "pushing")
    pushed = push.predictions(runtime.redis, session.client, session.store, version, predictions)
    session.store.forget_failures([item.task.id for item in scored])
    count(runtime.redis, "images_scored", len(scored))
    count(runtime.redis, "predictions_pushed", pushed)
    count(runtime.redis, "scoring_seconds", time.monotonic() - started)
    return {"scored": len(predictions), "pushed": pushed, "failed": len(wanted) - len(predictions)}


def fit(runtime: Runtime, progress: Progress, *, project: int, run: str) -> dict[str, int | str]:
    """Fit a new version on what is known to be normal, or, before anybody looked, on the project's own images.

    `run` says why: "first" (no version yet), "growth" (many more images than the last fit saw), "training" (somebody
    pressed Start training).
    """
    session = runtime.session(project)
    progress(0.0, "listing tasks")
    chosen = sweep.training_tasks(session.client, session.controls, project, limit=runtime.settings.max_fit_images)
    count_now = len(chosen.tasks)
    if session.store.current and run == "first":
        return {"skipped": "there is a version already"}
    if not session.store.current and not sweep.may_fit(count_now, project, runtime.redis, runtime.settings):
        return {"waiting": f"{count_now} images are few: waiting whether more come"}
    detector = runtime.new_detector()
    began = time.monotonic()
    pictures = gather(
        runtime, session, chosen.tasks, side=detector.side, progress=_part(progress, 0.0, 0.3, "fetching images")
    )
    usable = [index for index, picture in enumerate(pictures) if picture is not None]
    if len(usable) < 2:
        return {"waiting": len(usable)}
    confirmed = [chosen.confirmed[index] for index in usable]
    detector.fit(
        [picture for picture in pictures if picture is not None],
        confirmed=confirmed if any(confirmed) else (),
        progress=_part(progress, 0.3, 0.95),
    )
    card = {
        "detector": runtime.settings.detector,
        "backbone": runtime.settings.backbone,
        "image_size": runtime.settings.image_size,
        "run": run,
        "mode": "confirmed normals" if all(confirmed) else "cold start",
        "images": len(usable),
        "confirmed": int(np.count_nonzero(confirmed)),
        "tasks": [chosen.tasks[index].id for index in usable],
        "project_images": chosen.available,
        "threshold": detector.threshold,
        "target_fpr": runtime.settings.target_fpr,
        "fit_seconds": round(time.monotonic() - began, 2),
        "parent": session.store.current or None,
    }
    with session.store.new_version() as scratch:
        detector.save(scratch)
        version = session.store.publish(scratch, card)
    runtime.keep_warm(project, version, detector)
    session.store.roll_out(version)
    count(runtime.redis, "fits")
    progress(0.98, "queueing open tasks")
    sweep.sweep_project(session.client, session.store, runtime.queues, runtime.settings)
    return {"version": version, "images": len(usable)}


def detect(runtime: Runtime, session: Session, version: str, tasks: Sequence[Task], progress: Progress) -> list[Scored]:
    """Run the detector over the tasks whose image can be read."""
    if not tasks:
        return []
    detector = runtime.detector(session.store.id, version)
    pictures = gather(runtime, session, tasks, side=detector.side, progress=_part(progress, 0.0, 0.5))
    progress(0.5, "scoring")
    known = [(task, picture) for task, picture in zip(tasks, pictures, strict=True) if picture is not None]
    detections = detector.predict([picture for _, picture in known]) if known else []
    return [Scored(*pair, detection) for pair, detection in zip(known, detections, strict=True)]


def gather(
    runtime: Runtime, session: Session, tasks: Sequence[Task], *, side: int, progress: Progress
) -> list[Picture | None]:
    """Fetch and decode the tasks' images; None, and a noted failure, for each that is broken."""
    done = 0
    pictures: list[Picture | None] = []
    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch") as pool:
        try:
            for picture in pool.map(lambda task: _picture(runtime, session, task, side), tasks):
                pictures.append(picture)
                done += 1
                progress(done / len(tasks), "fetching images")
        finally:
            pool.shutdown(cancel_futures=True)
    count(runtime.redis, "images_failed", pictures.count(None))
    return pictures


def keep(session: Session, version: str, item: Scored) -> JSON:
    """Store one result with its map and heatmap; return the prediction to push."""
    detection = item.detection
    prediction = encode.prediction(item.task.id, detection, regions(detection), session.controls, version)
    value = config.image_of(item.task.data, session.controls.value) or ""
    drawn = images.heatmap(item.picture, detection.anomaly_map, detection.threshold)
    session.store.keep_heatmap(version, value, drawn)
    extra = {
        "anomaly_score": detection.score,
        "threshold": detection.threshold,
        "image": image_key(value),
        "controls": repr(session.controls),
    }
    session.store.keep_record(version, item.task.id, prediction | {"anomaly": extra}, detection.anomaly_map)
    return prediction


def open_context(settings: Settings, connection: Redis) -> Runtime:
    """Build what the jobs share, once in a worker process."""
    return Runtime(settings, connection)


ALLOWED: Mapping[str, Callable[..., Any]] = {"anomaly_workers.jobs.score": score, "anomaly_workers.jobs.fit": fit}
"""The only functions a worker calls, whatever Redis says."""


def _stored(session: Session, version: str, task: Task) -> JSON | None:
    """Return what this version said of the same image for the same label config, so that a rollback is exact."""
    record = session.store.record(version, task.id)
    if record is None:
        return None
    about = record.pop("anomaly")
    same_image = about["image"] == image_key(config.image_of(task.data, session.controls.value) or "")
    return record if same_image and about["controls"] == repr(session.controls) else None


def _picture(runtime: Runtime, session: Session, task: Task, side: int) -> Picture | None:
    value = config.image_of(task.data, session.controls.value) or ""
    fetched = False
    try:
        content = session.fetcher.fetch(value, task_id=task.id)
        fetched = True
        return images.load(content, side=side, max_megapixels=runtime.settings.max_megapixels)
    except ImageError as error:
        # What arrived and cannot be decoded stays broken; what did not arrive may arrive later.
        session.store.keep_failure(task.id, str(error), value, permanent=fetched)
        logger.warning("project %d, task %d: %s", session.store.id, task.id, error)
        return None


def _part(progress: Progress, start: float, end: float, stage: str = "") -> Progress:
    """Map a step's own progress onto its part of the job's."""
    return lambda fraction, name: progress(start + (end - start) * fraction, stage or name)
