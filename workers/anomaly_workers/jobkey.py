"""The identity of a job: a value, so that the same work asked twice is one job."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

_PLAIN = re.compile(r"[A-Za-z0-9-]")
_ESCAPE = re.compile(r"_([0-9a-f]{2})")
_SCORE = re.compile(r"score-(\d+)-(.+)-([0-9a-f]{16})")
_FIT = re.compile(r"fit-(\d+)-(.+)")
_FEEDBACK = re.compile(r"feedback-(\d+)-.+")
_THRESHOLD = re.compile(r"threshold-(\d+)-.+")
_RANK = re.compile(r"rank-(\d+)-.+")


@dataclass(frozen=True, slots=True)
class ScoreKey:
    """Scoring of one batch of tasks with one version."""

    project: int
    version: str
    batch: str
    kind = "score"

    @classmethod
    def of(cls, project: int, version: str, task_ids: Iterable[int]) -> ScoreKey:
        """Name the batch after its tasks, in whatever order they come."""
        listed = ",".join(str(number) for number in sorted(task_ids))
        return cls(project, version, hashlib.sha256(listed.encode()).hexdigest()[:16])

    def __str__(self) -> str:
        return f"score-{self.project}-{_escape(self.version)}-{self.batch}"


@dataclass(frozen=True, slots=True)
class FitKey:
    """One fit of a project's detector."""

    project: int
    run: str
    kind = "fit"

    def __str__(self) -> str:
        return f"fit-{self.project}-{_escape(self.run)}"


@dataclass(frozen=True, slots=True)
class FeedbackKey:
    """One look at a project's annotations."""

    project: int
    kind = "feedback"

    def __str__(self) -> str:
        return f"feedback-{self.project}-look"


@dataclass(frozen=True, slots=True)
class ThresholdKey:
    """One move of a project's threshold to where its policy wants it."""

    project: int
    kind = "threshold"

    def __str__(self) -> str:
        return f"threshold-{self.project}-move"


@dataclass(frozen=True, slots=True)
class RankKey:
    """One ordering of a project's review queue."""

    project: int
    kind = "rank"

    def __str__(self) -> str:
        return f"rank-{self.project}-queue"


JobKey = ScoreKey | FitKey | FeedbackKey | ThresholdKey | RankKey


def parse_key(job_id: str) -> JobKey | None:
    """Return the key that renders to `job_id`, None if it is none of ours."""
    if match := _SCORE.fullmatch(job_id):
        return ScoreKey(int(match[1]), _unescape(match[2]), match[3])
    if match := _FIT.fullmatch(job_id):
        return FitKey(int(match[1]), _unescape(match[2]))
    if match := _FEEDBACK.fullmatch(job_id):
        return FeedbackKey(int(match[1]))
    if match := _THRESHOLD.fullmatch(job_id):
        return ThresholdKey(int(match[1]))
    if match := _RANK.fullmatch(job_id):
        return RankKey(int(match[1]))
    return None


def _escape(text: str) -> str:
    """Keep to the characters of an RQ job id; all others become _xx, byte by byte."""
    return "".join(
        character if _PLAIN.match(character) else "".join(f"_{byte:02x}" for byte in character.encode())
        for character in text
    )


def _unescape(text: str) -> str:
    parts = _ESCAPE.split(text)
    raw = b"".join(part.encode() if index % 2 == 0 else bytes.fromhex(part) for index, part in enumerate(parts))
    return raw.decode(errors="replace")
