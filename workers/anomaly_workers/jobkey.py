"""The identity of a job: a value, so that the same work asked twice is one job."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

_PLAIN = re.compile(r"[A-Za-z0-9-]")
_ESCAPE = re.compile(r"_([0-9a-f]{2})")
_SCORE = re.compile(r"score-(\d+)-(.+)-([0-9a-f]{16})")
_FIT = re.compile(r"fit-(\d+)-(.+)")
_WHOLE = re.compile(r"([a-z]+)-(\d+)-.+")


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
class _WholeKey:
    """A job about a whole project, of which one at a time is enough."""

    project: int
    kind: ClassVar[str]
    what: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.kind}-{self.project}-{self.what}"


class FeedbackKey(_WholeKey):
    """One look at a project's annotations."""

    __slots__ = ()
    kind = "feedback"
    what = "look"


class ThresholdKey(_WholeKey):
    """One move of a project's threshold to where its policy wants it."""

    __slots__ = ()
    kind = "threshold"
    what = "move"


class RankKey(_WholeKey):
    """One ordering of a project's review queue."""

    __slots__ = ()
    kind = "rank"
    what = "queue"


JobKey = ScoreKey | FitKey | FeedbackKey | ThresholdKey | RankKey

_WHOLE_KEYS: dict[str, type[FeedbackKey | ThresholdKey | RankKey]] = {
    key.kind: key for key in (FeedbackKey, ThresholdKey, RankKey)
}


def parse_key(job_id: str) -> JobKey | None:
    """Return the key that renders to `job_id`, None if it is none of ours."""
    if match := _SCORE.fullmatch(job_id):
        return ScoreKey(int(match[1]), _unescape(match[2]), match[3])
    if match := _FIT.fullmatch(job_id):
        return FitKey(int(match[1]), _unescape(match[2]))
    if (match := _WHOLE.fullmatch(job_id)) and (key := _WHOLE_KEYS.get(match[1])):
        return key(int(match[2]))
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
