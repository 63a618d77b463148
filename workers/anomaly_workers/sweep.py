"""The sweep: finds every open task without a prediction of the wanted version, whatever a lost webhook said.

Runs in a process of its own (`python -m anomaly_workers.sweep`), on one machine at a time.
"""

from __future__ import annotations

import argparse
import logging
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from redis import Redis
from redis.exceptions import LockError, RedisError

from anomaly_workers import lifeline, operating, policy, push, queues, server
from anomaly_workers.client import Client, Project
from anomaly_workers.counters import count
from anomaly_workers.errors import AnomalyError, LabelStudioError
from anomaly_workers.feedback import Example, FeedbackLog
from anomaly_workers.labelstudio import config
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import Controls, Task

logger = logging.getLogger(__name__)

ENOUGH_NORMALS = 20
"""Fewest confirmed normal images without which nothing unconfirmed is fitted on."""

QUEUE = "queue"
"""The document that says how the review queue was ordered last."""

NAMES = "names"
"""The document that says for which version and controls all predictions were looked at last."""

REORDER_AFTER = 5
"""New feedback entries, or new predictions, after which the review queue is ordered again."""

REORDER_SECONDS = 300
"""Time after which it is ordered again for fewer new predictions."""

GROWTH = 2.0
"""A version fitted on few images is replaced once the project has this many times as many."""

ENOUGH_OF_EACH = 3
"""Confirmed images of either kind before a project learns by itself; the gate's least."""

LOOK_SECONDS = 60
"""How often annotations are looked at without a webhook that says so."""

FIT_AGAIN_SECONDS = 600
"""A fit, or a move of the threshold, that failed is not tried again sooner, unless somebody asks for it."""

DOUBLES_SECONDS = 600
"""How often all predictions of a project are compared with its tasks, beyond the rounds that give a reason to."""


@dataclass(frozen=True, slots=True)
class TrainingTasks:
    """What a detector is fitted on.

    Attributes:
        tasks: the tasks, evenly sampled down to the limit.
        confirmed: for each, whether a person said "normal".
        available: how many tasks the project had.
    """

    tasks: tuple[Task, ...]
    confirmed: tuple[bool, ...]
    available: int


def sweep_project(
    client: Client, store: ProjectStore, queue: Queues, settings: Settings, *, again: bool = False
) -> int:
    """Queue whatever is missing in one project, finish a rollout, mend doubles; return how many tasks were missing.

    Args:
        client: the project's Label Studio.
        store: the project's files.
        queue: where work is left.
        settings: the process's settings.
        again: also try what somebody cancelled, and what failed for good.

    Raises:
        LabelStudioError: Label Studio did not answer; the next round tries again.
    """
    info = client.project(store.id)
    store.keep_label_config(info.label_config)
    controls = config.parse(store.label_config)
    if not store.target:
        if info.tasks and _may_queue_fit(store, queue, again=again):
            queue.enqueue_fit(store.id, "first")
        return info.tasks
    rollout, target = store.rollout, store.target  # others may change them while Label Studio is asked
    if rollout and queue.under_way(store.id, "threshold"):
        return 0  # a move is pushing what it has judged
    missing = client.open_tasks(store.id, without_version=target)
    due = [task for task in missing if again or _is_due(store, task, controls.value)]
    busy = queue.busy(store.id, target)
    if not again and due:
        gone = queue.given_up(store.id, target)
        due = [task for task in due if task.id not in gone]
    if not due and not busy:  # what is under way gets the names of the config as it is now
        due = misnamed(client, store, target, controls, again=again)
    queue.enqueue_score(store.id, target, _by_priority(store, [task for task in due if task.id not in busy]))
    if not due:
        if rollout:
            finish_rollout(client, store, queue.connection, rollout)
        tidy(client, store, info, queue.connection)
        _queue_ranking(store, queue)
    _queue_upkeep(store, queue, settings)
    if may_learn(store, FeedbackLog(store), settings) and _may_queue_fit(store, queue, again=again):
        queue.enqueue_fit(store.id, "feedback")
    elif _has_grown(store, info, settings) and _may_queue_fit(store, queue, again=again):
        queue.enqueue_fit(store.id, "growth")
    return len(due)


def misnamed(
    client: Client, store: ProjectStore, version: str, controls: Controls, *, again: bool = False
) -> list[Task]:
    """Return the open tasks whose prediction fills controls that the label config no longer has, or has changed.

    Everything is read once after each change of the config and of the version, then no more; what could not be read
    lately is left out.
    """
    checked = {"version": version, "controls": repr(controls)}
    if store.document(NAMES) == checked:
        return []
    found = []
    for task in client.open_tasks(store.id):
        record = store.record(version, task.id)
        if record is not None and record.get("anomaly", {}).get("controls") != checked["controls"]:
            found.append(task)
    found = [task for task in found if again or _is_due(store, task, controls.value)]
    if not found:
        store.keep_document(NAMES, checked)
    return found


def finish_rollout(client: Client, store: ProjectStore, connection: Redis, version: str) -> None:
    """Deploy a version that every open task has a prediction of; at no moment does the label stream show none."""
    with push.writing(connection, store.id):
        if store.rollout != version:
            return  # somebody else was first, or wants another one
        store.deploy(version, reason="every open task is scored")
        if version in client.versions(store.id):  # not where every task is labelled
            push.announce(client, store, version)
    logger.info("project %d: %s deployed", store.id, version)


def tidy(client: Client, store: ProjectStore, info: Project, connection: Redis) -> None:
    """Remove predictions of our replaced versions, and doubles; predictions of others are never touched."""
    stored = client.versions(store.id)
    ours = {str(card["version"]) for card in store.versions()} - {store.current, store.rollout}
    old = sorted(ours & set(stored))
    settled = info.model_version == store.current or store.current not in stored
    if not old and settled and not _may_have_doubles(store, stored, connection):
        return
    with push.writing(connection, store.id):
        if info.model_version != store.current and store.current in stored:
            store.keep_announced("")
            push.announce(client, store, store.current)
        for version in old:
            if version not in (store.current, store.rollout):  # deployed since
                client.delete_version(store.id, version)
        counts = client.prediction_counts(store.id, store.current)
        doubled = [task for task, count in counts.items() if count > 1]
        if doubled:
            for ids in client.prediction_ids(store.id, store.current, tasks=doubled).values():
                for prediction in ids[:-1]:  # the newest stays
                    client.delete_prediction(prediction)


def is_out_of_order(store: ProjectStore, *, now: float) -> bool:
    """Whether the review queue was ordered for another version or strategy, or much came since, or long ago little."""
    if not store.current or store.rollout:
        return False
    last = store.document(QUEUE)
    ordered = (last.get("version"), last.get("strategy"), last.get("complete"))
    if ordered != (store.current, policy.read(store).strategy, True):
        return True
    pushed = abs(store.pushed(store.current) - int(last["pushed"]))
    if pushed and (pushed >= max(REORDER_AFTER, 0.01 * int(last["pushed"])) or now - last["at"] > REORDER_SECONDS):
        return True
    seen = max((entry.seq for entry in FeedbackLog(store).entries()), default=0)
    return seen - int(last["seen"]) >= REORDER_AFTER


def training_tasks(client: Client, store: ProjectStore, examples: Sequence[Example], *, limit: int) -> TrainingTasks:
    """Choose what to fit on: confirmed normals if there are enough, otherwise with them unlabelled images.

    Enough is half of what the deployed version was fitted on. Until then its unlabelled images stay in, for a few
    confirmed ones cover less than the many did. Images with a verdict of "anomaly" or none that holds are left out.
    """
    project = store.id
    confirmed = {example.task for example in examples if example.anomaly is False}
    judged = {example.task for example in examples}
    normal = client.tasks(project, sorted(confirmed))
    unlabelled = [task for task in client.open_tasks(project) if task.id not in judged]
    fitted = int(store.card(store.current)["images"]) if store.current else 0
    enough = len(normal) >= max(ENOUGH_NORMALS, fitted // 2)
    chosen = normal if enough else sorted([*normal, *unlabelled], key=lambda task: task.id)
    sample = _evenly(chosen, limit)
    return TrainingTasks(
        tasks=tuple(sample),
        confirmed=tuple(task.id in confirmed for task in sample),
        available=len(judged) + len(unlabelled),
    )


def may_learn(store: ProjectStore, log: FeedbackLog, settings: Settings) -> bool:
    """Whether there are enough new verdicts to learn from, or a few and none came for a while.

    Before there are enough confirmed images of either kind nothing could be compared, and so nothing be promoted.
    """
    if not store.current or store.rollout:
        return False
    entries = log.entries()
    new = {entry.task: entry for entry in entries if entry.seq > store.learnt and entry.anomaly is not None}
    if not new:
        return False
    said = [entry.anomaly for entry in log.current().values()]
    if min(said.count(True), said.count(False)) < ENOUGH_OF_EACH:
        return False
    newest = max(datetime.fromisoformat(entry.at) for entry in new.values())
    quiet = (datetime.now(UTC) - newest).total_seconds()
    return len(new) >= settings.learn_after or quiet >= settings.learn_quiet_seconds


def may_fit(images: int, project: int, connection: Redis, settings: Settings) -> bool:
    """Whether to fit now: there are enough images, or at least two and none came for a while."""
    if images >= settings.min_images:
        return True
    key, now = f"anomaly:settle:{project}", time.time()
    before = cast("bytes | None", connection.get(key))
    count, _, since = (before or b"0:0").decode().partition(":")
    if int(count) != images:
        connection.set(key, f"{images}:{now}", ex=3600)
        since = str(now)
    return images >= 2 and now - float(since) >= settings.settle_seconds


def run(settings: Settings, connection: Redis, stop: threading.Event) -> None:
    """Sweep every project, again and again, until `stop` is set."""
    store, queue = Store(settings.data_dir), Queues(connection, settings)
    while not stop.is_set():
        try:
            with connection.lock("anomaly:sweep", timeout=300, blocking_timeout=0.1):
                _sweep_all(store, queue, settings)
                count(connection, "sweeps")
        except LockError:
            logger.debug("another machine is sweeping")
        except RedisError as error:
            logger.warning("sweep: Redis does not answer: %s", error)
        stop.wait(settings.sweep_seconds)


def main() -> None:
    """Run the sweep as a process that ends with its parent."""
    parser = argparse.ArgumentParser(prog="python -m anomaly_workers.sweep", description=main.__doc__)
    parser.add_argument("--parent", type=int, help="end when the process with this id does")
    parent = parser.parse_args().parent
    settings = load_settings()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if parent:
        lifeline.follow(parent)
    run(settings, queues.connect(server.ensure(settings)), stop)


def _sweep_all(store: Store, queue: Queues, settings: Settings) -> None:
    for project in store.projects():
        try:
            with Client(project.connection()) as client:
                sweep_project(client, project, queue, settings)
        except LabelStudioError as error:
            if error.status == 404:
                logger.warning("project %d is gone from Label Studio; its versions are kept", project.id)
                project.disconnect()
            else:
                logger.warning("project %d: %s", project.id, error)
        except (AnomalyError, LockError, OSError, KeyError, ValueError) as error:  # a damaged file stops one project
            logger.warning("project %d: %r", project.id, error)


def _queue_ranking(store: ProjectStore, queue: Queues) -> None:
    if not is_out_of_order(store, now=time.time()) or queue.under_way(store.id, "rank"):
        return
    if not queue.gave_up_ranking(store.id, within=FIT_AGAIN_SECONDS):
        queue.enqueue_rank(store.id)


def _queue_upkeep(store: ProjectStore, queue: Queues, settings: Settings) -> None:
    if operating.is_due(store, settings) and not queue.gave_up_moving(store.id, within=FIT_AGAIN_SECONDS):
        queue.enqueue_threshold(store.id)
    if _time_to_look(store, queue.connection):
        queue.enqueue_feedback(store.id)


def _is_due(store: ProjectStore, task: Task, value: str) -> bool:
    failure = store.failure(task.id)
    return failure is None or failure.is_due(config.image_of(task.data, value) or "", time.time())


def _may_queue_fit(store: ProjectStore, queue: Queues, *, again: bool) -> bool:
    if queue.fitting(store.id):
        return False
    return again or not queue.gave_up_fitting(store.id, within=FIT_AGAIN_SECONDS)


def _time_to_look(store: ProjectStore, connection: Redis) -> bool:
    return bool(connection.set(f"anomaly:looked:{store.id}", 1, nx=True, ex=LOOK_SECONDS))


def _has_grown(store: ProjectStore, info: Project, settings: Settings) -> bool:
    if store.rollout:
        return False
    card = store.card(store.current)
    small = card["mode"] == "cold start" and int(card["images"]) < settings.max_fit_images
    seen = [int(known.get("project_tasks") or known["project_images"]) for known in store.versions()]  # kept back, too
    return small and info.tasks >= GROWTH * max(seen)


def _may_have_doubles(store: ProjectStore, stored: Mapping[str, int], connection: Redis) -> bool:
    """Whether Label Studio holds more predictions than tasks were pushed, or it is time to look anyway."""
    more = stored.get(store.current, 0) > store.pushed(store.current)
    regular = connection.set(f"anomaly:doubles:{store.id}", 1, nx=True, ex=DOUBLES_SECONDS)
    return more or bool(regular)


def _by_priority(store: ProjectStore, tasks: Sequence[Task]) -> Sequence[Task]:
    """Put first what the deployed version is least sure of: somebody will look there next."""
    if not store.rollout or not store.current:
        return tasks

    def confidence(task: Task) -> float:
        record = store.record(store.current, task.id)
        return float(record["score"]) if record else 0.0

    return sorted(tasks, key=confidence)


def _evenly(items: Sequence[Task], limit: int) -> Sequence[Task]:
    if len(items) <= limit:
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


if __name__ == "__main__":
    main()
