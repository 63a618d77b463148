"""What a page is made of, read from files once and never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from anomaly_workers.policy import Policy
from anomaly_workers.queues import WorkerInfo
from anomaly_workers.store import Failure
from anomaly_workers.types import JSON, JobInfo


@dataclass(frozen=True, slots=True)
class Scored:
    """What the deployed version says of one task.

    Attributes:
        task: task id.
        score: anomaly score in [0, 1].
        threshold: its operating point.
        image: key of its heatmap.
        parts: (bank's, head's) raw scores, None where the version has no head.
        first_at: seconds since the epoch at which a version first scored the task.
        scored_at: the same of this version.
    """

    task: int
    score: float
    threshold: float
    image: str
    parts: tuple[float, float] | None
    first_at: float
    scored_at: float

    @property
    def is_anomaly(self) -> bool:
        """The verdict."""
        return self.score >= self.threshold


@dataclass(frozen=True, slots=True)
class Review:
    """What the annotators of one task say together.

    Attributes:
        task: task id.
        image: the task's raw image value.
        at: seconds since the epoch of its first annotation.
        anomaly: the majority's verdict, None on a tie or without any.
        judged: the newest verdict against the prediction's: "confirmed", "missed", "false alarm", ...
        annotators: how many people annotated it.
        version: the version that the first of them saw, "" if none.
        score: that version's anomaly score before the verdict was known, None if it is not known.
    """

    task: int
    image: str
    at: float
    anomaly: bool | None
    judged: str
    annotators: int
    version: str
    score: float | None


@dataclass(frozen=True, slots=True)
class Work:
    """What waits and who works.

    Attributes:
        depth: waiting jobs by queue.
        workers: the living workers of all hosts.
        jobs: the project's jobs, what runs first.
        totals: the counters of all projects since Redis began.
    """

    depth: Mapping[str, int]
    workers: tuple[WorkerInfo, ...]
    jobs: tuple[JobInfo, ...]
    totals: Mapping[str, float]


@dataclass(frozen=True)
class Snapshot:
    """All that a project's page shows.

    Attributes:
        project: project id.
        title: its title in Label Studio when it was connected, "" if not known.
        url: address of its Label Studio, "" if it is not connected any more.
        current: the deployed version, "" before the first.
        rollout: the version that is about to replace it, "" if none.
        policy: what people decided.
        scored: the deployed version's records, by task.
        reviews: in the order of the first annotation.
        skipped: tasks that were only skipped.
        cards: every version's card, oldest first.
        history: every deployment, oldest first.
        failures: tasks that could not be scored.
        tabs: Data Manager tabs, id by title.
        work: None when Redis does not answer or was not asked.
        target_fpr: the configured share of normal images that may raise an alarm.
        at: seconds since the epoch.
        card: the deployed version's card, empty before the first.
        family: the versions that share its weights, and so its scores.
    """

    project: int
    title: str
    url: str
    current: str
    rollout: str
    policy: Policy
    scored: tuple[Scored, ...]
    reviews: tuple[Review, ...]
    skipped: frozenset[int]
    cards: tuple[JSON, ...]
    history: tuple[JSON, ...]
    failures: tuple[Failure, ...]
    tabs: Mapping[str, int]
    work: Work | None
    target_fpr: float
    at: float
    card: JSON = field(default_factory=dict)
    family: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """What people call it."""
        return self.title or f"Project {self.project}"

    @cached_property
    def reviewed(self) -> frozenset[int]:
        """Ids of the tasks that nobody needs to look at any more."""
        return frozenset(review.task for review in self.reviews) | self.skipped

    @cached_property
    def records(self) -> Mapping[int, Scored]:
        """The deployed version's records by task."""
        return {one.task: one for one in self.scored}

    def record(self, task: int) -> Scored | None:
        """Return what the deployed version says of a task, None if it did not score it."""
        return self.records.get(task)

    @cached_property
    def open(self) -> tuple[Scored, ...]:
        """The scored tasks that nobody reviewed."""
        return tuple(one for one in self.scored if one.task not in self.reviewed)

    @cached_property
    def tasks(self) -> int:
        """How many tasks are known: scored, reviewed or refused."""
        return len(self.records.keys() | self.reviewed | {one.task for one in self.failures})


@dataclass(frozen=True, slots=True)
class Summary:
    """One line of the index.

    Attributes:
        project: project id.
        title: its title, or its number.
        current: the deployed version, "" before the first.
        scored: how many tasks that version scored.
        reviewed: how many tasks have a verdict or were skipped.
        defects: how many of them show a defect.
        failures: how many could not be scored.
        damaged: why its files cannot be read, "" if they can; the numbers say nothing then.
    """

    project: int
    title: str
    current: str = ""
    scored: int = 0
    reviewed: int = 0
    defects: int = 0
    failures: int = 0
    damaged: str = ""
