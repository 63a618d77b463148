"""The command `ls-anomaly threshold`: where a project's alarms begin, and what that flags."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from anomaly_workers import operating, policy
from anomaly_workers.client import Client
from anomaly_workers.errors import ConfigError
from anomaly_workers.policy import Policy
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings
from anomaly_workers.store import ProjectStore
from anomaly_workers.types import JSON

POLL_SECONDS = 0.2


def choice(*, fpr: float | None, f1: bool, at: float | None) -> JSON:
    """Return what the command line changes of a policy, empty if nothing.

    Raises:
        ConfigError: more than one rule is given.
    """
    given: list[JSON] = [{"rule": "f1", "value": 0.0}] if f1 else []
    given += [{"rule": rule, "value": value} for rule, value in (("fpr", fpr), ("number", at)) if value is not None]
    if len(given) > 1:
        raise ConfigError("Give one of --fpr, --f1 and --at.")
    return given[0] if given else {}


def decide(store: ProjectStore, settings: Settings, changes: JSON) -> Policy:
    """Change a project's rule.

    Raises:
        ConfigError: the rule makes no sense, or has nothing to go by yet; nothing is changed then.
    """
    chosen = replace(policy.read(store), **changes)
    if store.current:
        operating.threshold_for(chosen, operating.evidence(store, store.current), settings)
    return policy.change(store, changes)


def move(store: ProjectStore, settings: Settings, queue: Queues, console: Console, *, wait: bool) -> None:
    """Have the workers move the threshold; return when Label Studio shows its verdicts, or at once.

    Raises:
        ConfigError: no worker runs, or the job failed; it names the reason.
    """
    if not store.current:
        console.print("kept: the first version is made with it")
        return
    job = queue.enqueue_threshold(store.id)
    if not wait:
        console.print(f"queued {job}; see ls-anomaly jobs")
        return
    if not queue.workers():
        raise ConfigError("No worker is running, so the threshold waits. Start them: ls-anomaly up")
    with console.status("moving the threshold"):
        while not _is_there(store, settings):
            ended = [one for one in queue.jobs(store.id) if one.id == job and one.state in ("failed", "cancelled")]
            if ended:
                raise ConfigError(f"The threshold was not moved: {ended[0].message}")
            time.sleep(POLL_SECONDS)


def show(store: ProjectStore, settings: Settings, client: Client, console: Console) -> None:
    """Print the rule, the threshold, and what share of the images that we know of it flags."""
    chosen = policy.read(store)
    rate = chosen.value or settings.target_fpr
    said = {
        "fpr": f"a false-positive rate of {rate:g}",
        "f1": "the best F1 on confirmed images",
        "number": f"the number {chosen.value:g}",
    }
    console.print(f"rule: {said[chosen.rule]}", highlight=False)
    if not store.current:
        console.print("no version yet: the first is made when the project has images")
        return
    threshold = float(store.card(store.current)["threshold"])
    known = operating.evidence(store, store.current)
    console.print(f"threshold: {threshold:.4f}, of {store.current}", highlight=False)
    rows = [
        ("normals it was fitted on", list(known.normals)),
        ("confirmed normals", known.confirmed_normals),
        ("confirmed defects", known.defects),
        ("open tasks", _open_scores(store, client)),
    ]
    for name, scores in rows:
        console.print(f"flags of {name}: {_share(scores, threshold)}", highlight=False)
    if operating.is_due(store, settings):
        console.print("the workers have not moved it yet: see ls-anomaly jobs")


def _is_there(store: ProjectStore, settings: Settings) -> bool:
    return not store.rollout and operating.is_near(operating.wanted(store, settings), store.card(store.current))


def _open_scores(store: ProjectStore, client: Client) -> list[float]:
    records = (store.record(store.current, task.id) for task in client.open_tasks(store.id))
    return [float(record["anomaly"]["anomaly_score"]) for record in records if record]


def _share(scores: Sequence[float], threshold: float) -> str:
    if not scores:
        return "none known"
    flagged = sum(score >= threshold for score in scores)
    return f"{flagged} of {len(scores)} ({flagged / len(scores):.1%})"
