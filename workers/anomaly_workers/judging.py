"""Judging again: a moved threshold gives new verdicts and regions from stored maps, without the network.

A version is immutable, so the new threshold makes another one of the same weights. Its records are written first, then
it is rolled out: whatever this job does not live to do, the sweep does, and pushes what is stored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from anomaly_workers import images, operating, policy, push
from anomaly_workers.counters import count
from anomaly_workers.detectors.regions import regions
from anomaly_workers.errors import LabelStudioError
from anomaly_workers.labelstudio import config, encode
from anomaly_workers.policy import Policy
from anomaly_workers.runtime import Runtime, Session
from anomaly_workers.store import ProjectStore, image_key, share
from anomaly_workers.types import JSON, Detection, Progress, Task

logger = logging.getLogger(__name__)

KIND = "threshold"
PUSHED_AT_ONCE = 500
JUDGES = 4
"""Threads: reading, decoding and writing leave the interpreter to others."""

DRAWN_BETWEEN = 20
"""Heatmaps drawn between two looks at what is urgent: each move draws that many at least, so that two cannot take turns
for ever."""

_OWN = ("version", "number", "sha256", "created", "fit_seconds")
_NO_MAP = np.zeros((0, 0), np.float32)


def threshold(runtime: Runtime, progress: Progress, *, project: int) -> dict[str, int | str]:
    """Move the deployed version's threshold to where the project's policy wants it, then draw the heatmaps anew."""
    session = runtime.session(project)
    store, old = session.store, session.store.current
    if not old:
        return {"waiting": "there is no version yet: the first one is made with this threshold"}
    chosen, limit = policy.read(store), operating.wanted(store, runtime.settings)
    if operating.is_near(limit, store.card(old)):
        return _heatmaps(runtime, session, old, list(session.client.open_tasks(project)), progress)
    version = _known(store, old, limit)
    if store.rollout and store.rollout != version:
        return {"waiting": f"{store.rollout} is being rolled out"}  # the sweep asks again when it is deployed
    progress(0.0, "reading maps")
    tasks = list(session.client.open_tasks(project))
    version = version or _derived(store, old, limit, chosen)
    store.derive_maps(old, version)
    store.derive_calmed(old, version)
    store.derive_heatmaps(old, version)
    found = _judged(session, old, version, tasks, limit, progress)
    if store.current != old or store.rollout not in ("", version):
        return {"skipped": f"{store.target} is wanted by now"}  # the sweep moves the threshold of that one
    store.roll_out(version)
    pushed = 0
    for start in range(0, len(found), PUSHED_AT_ONCE):
        progress(0.5 + 0.2 * start / len(found), "pushing")
        part = found[start : start + PUSHED_AT_ONCE]
        pushed += push.predictions(runtime.redis, session.client, store, version, part)
    count(runtime.redis, "predictions_pushed", pushed)
    if not _deployed(runtime, session, version, announce=bool(found)):
        return {"skipped": f"{store.target} took the place of {version}"}
    logger.info("project %d: %s deployed with threshold %.4f", project, version, limit)
    _remove(runtime, session, old)
    return _heatmaps(runtime, session, version, tasks, progress) | {"judged": len(found), "pushed": pushed}


def _known(store: ProjectStore, parent: str, limit: float) -> str:
    """Return the version that an earlier move made of `parent`, which was interrupted or rolled back; "" if none."""
    cards = (card for card in store.versions() if card.get("kind") == KIND and card["parent"] == parent)
    return next((str(card["version"]) for card in cards if operating.is_near(limit, card)), "")


def _derived(store: ProjectStore, parent: str, limit: float, chosen: Policy) -> str:
    """Publish a version with the weights of `parent` and another threshold."""
    card, folder = store.card(parent), store.version_folder(parent)
    before = float(card["threshold"])
    named = {
        "fpr": f"false-positive rate {chosen.value or card['target_fpr']:g}",
        "f1": "best F1",
        "number": "as given",
    }
    changed = {
        "parent": parent,
        "weights_of": card.get("weights_of") or parent,
        "kind": KIND,
        "run": KIND,
        "threshold": limit,
        "rule": chosen.rule,
        "value": chosen.value,
        "decision": {"promote": True, "reason": f"threshold {before:.4f} -> {limit:.4f}: {named[chosen.rule]}"},
    }
    saved = json.loads((folder / "detector.json").read_text()) | {"threshold": limit}
    with store.new_version() as scratch:
        share(folder / "detector.safetensors", scratch / "detector.safetensors")
        (scratch / "detector.json").write_text(json.dumps(saved, indent=1))
        return store.publish(scratch, {name: value for name, value in card.items() if name not in _OWN} | changed)


def _judged(
    session: Session, old: str, version: str, tasks: Sequence[Task], limit: float, progress: Progress
) -> list[JSON]:
    """Store what a version says of each task that an older one has a map of; return the predictions to push.

    The others are left to the sweep: not scored yet, or another image since.
    """
    found = []
    with ThreadPoolExecutor(JUDGES, thread_name_prefix="judge") as pool:
        try:
            for done, prediction in enumerate(pool.map(lambda task: _kept(session, old, version, task, limit), tasks)):
                progress(0.5 * done / len(tasks), "judging again")
                found += [prediction] if prediction else []
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _kept(session: Session, old: str, version: str, task: Task, limit: float) -> JSON | None:
    record = session.store.record(old, task.id)
    if record is None or record["anomaly"]["image"] != image_key(_image(session, task)):
        return None
    detection = _detection(session, old, task, record, limit)
    if detection is None:
        return None
    prediction = encode.prediction(task.id, detection, regions(detection), session.controls, version)
    about = record["anomaly"] | {"threshold": limit, "controls": repr(session.controls)}
    return prediction if session.store.derive_record(version, task.id, prediction | {"anomaly": about}) else None


def _detection(session: Session, old: str, task: Task, record: JSON, limit: float) -> Detection | None:
    """Return what was stored of a task as it was detected; the map only where it has regions."""
    score = float(record["anomaly"]["anomaly_score"])
    if score < limit:
        return Detection(score, limit, _NO_MAP, (0, 0))
    anomaly_map, size = session.store.anomaly_map(old, task.id), _size(session, old, task, record)
    if anomaly_map is None or size is None:
        return None
    return Detection(score, limit, anomaly_map, size)


def _size(session: Session, old: str, task: Task, record: JSON) -> tuple[int, int] | None:
    """Return an image's (height, width); records of earlier releases hold it with their regions alone."""
    if stored := record["anomaly"].get("size"):
        return int(stored[0]), int(stored[1])
    for region in record["result"]:
        if "original_height" in region:
            return int(region["original_height"]), int(region["original_width"])
    picture = session.pictures.get(_image(session, task), side=int(session.store.card(old)["image_size"]))
    return picture.size if picture else None


def _deployed(runtime: Runtime, session: Session, version: str, *, announce: bool) -> bool:
    """Deploy a version that is rolled out; False if another one is by now."""
    store = session.store
    with push.writing(runtime.redis, store.id):
        if store.rollout == version:
            store.deploy(version, reason=str(store.card(version)["decision"]["reason"]))
        elif store.current != version:  # the sweep may have been first
            return False
        if announce:
            push.announce(session.client, store, version)
    return True


def _remove(runtime: Runtime, session: Session, old: str) -> None:
    """Remove a replaced version's predictions.

    Label Studio takes its time over that. If somebody waits for this worker, or it fails, it is left to the sweep.
    """
    if runtime.queues.depth()["interactive"]:
        return
    try:
        if old in session.client.versions(session.store.id):
            session.client.delete_version(session.store.id, old)
    except LabelStudioError as error:
        logger.warning("project %d: %s is removed later: %s", session.store.id, old, error)


def _heatmaps(
    runtime: Runtime, session: Session, version: str, tasks: Sequence[Task], progress: Progress
) -> dict[str, int | str]:
    """Draw the outlines of a threshold version anew, least certain first, where the picture is kept on disk.

    What is urgent goes first: the rest is then drawn by another move, for which nothing else is left to do.
    """
    store, card = session.store, session.store.card(version)
    if card.get("kind") != KIND:
        return {"drawn": 0}
    family = [store.card(one) for one in store.family(version)]
    lowest = min(float(one["threshold"]) for one in family)
    drawn = 0
    due = [task for task in tasks if store.shares_heatmap(str(card["parent"]), version, _image(session, task))]
    for done, task in enumerate(due):
        progress(0.7 + 0.3 * done / len(due), "drawing heatmaps")
        new = _drawn(session, version, task, card, lowest=lowest)
        drawn += new
        if new and drawn % DRAWN_BETWEEN == 0 and runtime.queues.depth()["interactive"]:
            runtime.queues.enqueue_threshold(store.id)
            break
    return {"drawn": drawn}


def _drawn(session: Session, version: str, task: Task, card: JSON, *, lowest: float) -> bool:
    """Draw one heatmap if it has an outline with any of the thresholds, and if its picture is at hand."""
    anomaly_map = session.store.anomaly_map(version, task.id)
    if anomaly_map is None or float(anomaly_map.max()) < lowest:
        return False
    image = _image(session, task)
    picture = session.pictures.get(image, side=int(card["image_size"]))
    if picture is None:
        return False
    session.store.keep_heatmap(version, image, images.heatmap(picture, anomaly_map, float(card["threshold"])))
    return True


def _image(session: Session, task: Task) -> str:
    return config.image_of(task.data, session.controls.value) or ""
