"""The slow way to learn: fitting versions on what looks normal, and on what annotators confirmed."""

from __future__ import annotations

import time

import numpy as np

from anomaly_workers import scoring, sweep
from anomaly_workers.counters import count
from anomaly_workers.runtime import Runtime
from anomaly_workers.types import Progress


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
    pictures = scoring.gather(
        runtime, session, chosen.tasks, side=detector.side, progress=scoring.part(progress, 0.0, 0.3, "fetching images")
    )
    usable = [index for index, picture in enumerate(pictures) if picture is not None]
    if len(usable) < 2:
        return {"waiting": len(usable)}
    confirmed = [chosen.confirmed[index] for index in usable]
    detector.fit(
        [picture for picture in pictures if picture is not None],
        confirmed=confirmed if any(confirmed) else (),
        progress=scoring.part(progress, 0.3, 0.95),
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
