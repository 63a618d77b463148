"""Reads what a page shows from the store and the queues; Label Studio is never asked."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import cast

from redis.exceptions import RedisError

from anomaly_workers import policy
from anomaly_workers.counters import totals
from anomaly_workers.errors import StoreError
from anomaly_workers.feedback import Entry, FeedbackLog, latest, verdict
from anomaly_workers.pages.facts import Review, Scored, Snapshot, Summary, Work
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import JSON

UNSETTLED_SECONDS = 2.0
"""A folder that changed so recently may change again within the same tick of the file system's clock."""

TAIL = 4096
"""Bytes at a record's end that are read first."""

LOG = Path("feedback") / "log.jsonl"

_EXTRA = b'"anomaly": {'


@dataclass(frozen=True, slots=True)
class _Said:
    """What a page needs of a record.

    Attributes:
        written: seconds since the epoch at which its file was.
        first_at: the same of when its version first scored the task, as far as the record says so.
        score, image, parts: see `Scored`.
    """

    written: float
    first_at: float
    score: float
    image: str
    parts: tuple[float, float] | None


@dataclass(slots=True)
class _Folder:
    """A folder of records as it was listed.

    Attributes:
        changed: when the folder was, in nanoseconds.
        whole: whether every record's time was looked at.
        times: when each task was first scored.
        said: what those records say that were read.
    """

    changed: int = -1
    whole: bool = False
    times: dict[int, float] = field(default_factory=dict)
    said: dict[int, _Said] = field(default_factory=dict)


class Collector:
    """Reads projects, and again only what changed since; one a process, for any number of threads."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._folders: dict[int, dict[Path, _Folder]] = {}
        self._logs: dict[Path, tuple[tuple[int, int], list[Entry]]] = {}
        self._lock = Lock()

    def summaries(self) -> list[Summary]:
        """Return a line for every connected project, without reading what was said of its tasks."""
        return [self._summary(project) for project in self._store.projects()]

    def _summary(self, project: ProjectStore) -> Summary:
        try:
            return self._counted(project)
        except StoreError as error:
            return Summary(project.id, project.title or f"Project {project.id}", damaged=str(error))

    def snapshot(self, number: int, queues: Queues | None = None) -> Snapshot | None:
        """Return all that is known of a project, None if there is no such project.

        Raises:
            StoreError: a file is damaged.
        """
        project = self._store.project(number)
        if not project.folder.is_dir():
            return None
        current, cards = project.current, tuple(project.versions())
        card = next((card for card in cards if card["version"] == current), {})
        with self._lock:
            reviews, skipped = self._reviews(project)
            scored = self._scored(project, cards, card) if card else ()
        return Snapshot(
            project=number,
            title=project.title,
            url=_web(project.connection().url) if project.is_connected else "",
            current=current,
            rollout=project.rollout,
            policy=policy.read(project),
            scored=scored,
            reviews=reviews,
            skipped=skipped,
            cards=cards,
            history=tuple(project.history()),
            failures=tuple(project.failures()),
            tabs={str(title): int(view) for title, view in project.document("tabs").items()},
            work=work(queues, number) if queues else None,
            target_fpr=self._settings.target_fpr,
            at=time.time(),
            card=card,
            family=project.family(current) if current else frozenset(),
        )

    def _counted(self, project: ProjectStore) -> Summary:
        with self._lock:
            reviews, skipped = self._reviews(project)
        current = project.current
        return Summary(
            project=project.id,
            title=project.title or f"Project {project.id}",
            current=current,
            scored=_count(project.folder / "records" / current, project.deleted) if current else 0,
            reviewed=len(reviews) + len(skipped),
            defects=sum(bool(review.anomaly) for review in reviews),
            failures=len(project.failing()),
        )

    # -- records

    def _scored(self, project: ProjectStore, cards: Sequence[JSON], card: JSON) -> tuple[Scored, ...]:
        """What the deployed weights say of each task.

        A version with another threshold has records of the tasks that were open then; the scores of the others are
        those of its family.
        """
        current, threshold = str(card["version"]), float(card.get("threshold", 0.5))
        family, names = project.family(current), [str(one["version"]) for one in cards]  # oldest first
        known, fresh = self._folders.get(project.id, {}), {}
        said: dict[int, _Said] = {}
        scored: dict[int, float] = {}
        for version in (current, *(name for name in reversed(names) if name in family and name != current)):
            for path in _folders(project.folder / "records" / version):
                folder = fresh[path] = _read_folder(path, known.get(path, _Folder()), said)
                said |= {task: one for task, one in folder.said.items() if task not in said}
                _note_earliest(scored, folder.times)
        first: dict[int, float] = {}
        for version in (name for name in names if name not in family):
            for path in _folders(project.folder / "records" / version):
                folder = fresh[path] = _listed(path, known.get(path, _Folder()), first)
                _note_earliest(first, folder.times)
        self._folders[project.id] = fresh  # and what is not shown any more is forgotten
        _note_earliest(first, scored)
        gone = project.deleted
        return tuple(
            Scored(task, one.score, threshold, one.image, one.parts, first[task], scored[task])
            for task, one in sorted(said.items())
            if task not in gone
        )

    # -- feedback

    def _reviews(self, project: ProjectStore) -> tuple[tuple[Review, ...], frozenset[int]]:
        """The tasks with a verdict in the order of their first annotation, and those that were only skipped."""
        entries = self._entries(project)
        living = latest(entries)
        by_task: dict[int, list[Entry]] = {}
        for entry in living.values():
            if entry.kind != "skipped":
                by_task.setdefault(entry.task, []).append(entry)
        seen: dict[int, Entry] = {}
        for entry in entries:
            if entry.score is not None:
                seen.setdefault(entry.task, entry)
        try:
            reviews = [_review(of_task, seen.get(task)) for task, of_task in by_task.items()]
        except (TypeError, ValueError) as error:
            raise StoreError(f"{project.folder / LOG} has a time that cannot be read: {error}.") from error
        skipped = frozenset(entry.task for entry in living.values()) - by_task.keys()
        return tuple(sorted(reviews, key=lambda review: (review.at, review.task))), skipped

    def _entries(self, project: ProjectStore) -> list[Entry]:
        path = project.folder / LOG
        try:
            about = path.stat()
        except FileNotFoundError:
            return []
        stamp = (about.st_mtime_ns, about.st_size)
        known = self._logs.get(path)
        if known is None or known[0] != stamp:
            known = self._logs[path] = (stamp, FeedbackLog(project).entries())
        return known[1]


def work(queues: Queues, project: int | None) -> Work | None:
    """Return what waits and who works, None when Redis does not answer."""
    try:
        return Work(queues.depth(), tuple(queues.workers()), tuple(queues.jobs(project)), totals(queues.connection))
    except RedisError:
        return None


def _read_folder(path: Path, known: _Folder, found: Container[int]) -> _Folder:
    """List a folder of records unless it is as it was, and read those of tasks that are not found yet."""
    changed = path.stat().st_mtime_ns
    if known.changed == changed and known.whole and all(task in known.said or task in found for task in known.times):
        return known
    fresh = _Folder(_settled(changed), whole=True)
    for task, item in _records(path):
        before = known.said.get(task)
        if task in found:
            fresh.times[task] = item.stat().st_mtime
        elif before is not None and before.written == item.stat().st_mtime:
            fresh.said[task] = before
        elif (said := _read(item.path)) is not None:
            fresh.said[task] = said
    fresh.times |= {task: said.first_at for task, said in fresh.said.items()}
    return fresh


def _listed(path: Path, known: _Folder, older: Container[int]) -> _Folder:
    """List a folder of records unless it is as it was, without the tasks that an older one has."""
    changed = path.stat().st_mtime_ns
    if known.changed == changed:
        return _Folder(changed, times=known.times)
    times = {task: item.stat().st_mtime for task, item in _records(path) if task not in older}
    return _Folder(_settled(changed), times=times)


def _records(path: Path) -> Iterator[tuple[int, os.DirEntry[str]]]:
    with os.scandir(path) as listing:
        for item in listing:
            name, _, kind = item.name.partition(".")
            if kind == "json" and name.isdigit():
                yield int(name), item


def _settled(changed: int) -> int:
    return changed if time.time() - changed / 1e9 > UNSETTLED_SECONDS else -1


def _note_earliest(known: dict[int, float], times: Mapping[int, float]) -> None:
    known |= {task: at for task, at in times.items() if at < known.get(task, math.inf)}


def _read(path: str) -> _Said | None:
    """What a record says; with bare calls, half the time of a page's first 5,000 records."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None  # removed while we looked
    try:
        about = os.fstat(handle)
        tail = os.pread(handle, TAIL, max(0, about.st_size - TAIL))
        said = _said(tail) or _said(os.pread(handle, about.st_size, 0))
        return _needed(said, about.st_mtime) if said is not None else None
    except (ValueError, TypeError):
        return None  # damaged; a page shows the others
    finally:
        os.close(handle)


def _said(content: bytes) -> JSON | None:
    """What a record says beside its regions, which are most of it and stand before the rest; None if it is not there.

    Parsing 5,000 records whole takes seconds when their masks are large.
    """
    start = content.rfind(_EXTRA)
    about = _parsed(content[start + len(_EXTRA) - 1 : -1]) if start >= 0 else None
    if not _has_score(about):
        whole = _parsed(content)
        about = whole.get("anomaly") if isinstance(whole, dict) else None
    return cast(JSON, about) if _has_score(about) else None


def _parsed(content: bytes) -> object:
    try:
        return cast(object, json.loads(content))
    except ValueError:
        return None


def _has_score(about: object) -> bool:
    score = about.get("anomaly_score") if isinstance(about, dict) else None
    return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)


def _needed(said: JSON, written: float) -> _Said:
    parts: Sequence[float] = said.get("parts") or ()
    first = said.get("first_at")
    return _Said(
        written=written,
        first_at=min(written, _moment(first)) if first else written,
        score=float(said["anomaly_score"]),
        image=str(said.get("image", "")),
        parts=(float(parts[0]), float(parts[1])) if len(parts) == 2 else None,
    )


def _review(entries: Sequence[Entry], seen: Entry | None) -> Review:
    """Merge the living entries of one task; `seen` is the first of all that knew a score."""
    newest = max(entries, key=lambda entry: (_moment(entry.updated_at), entry.annotation))
    return Review(
        task=newest.task,
        image=newest.image,
        at=min(_moment(entry.created_at) for entry in entries),
        anomaly=verdict(entries),
        judged=newest.judged,
        annotators=len({entry.annotator for entry in entries}),
        version=seen.version if seen else "",
        score=seen.score if seen else None,
    )


def _moment(time_of: str) -> float:
    moment = datetime.fromisoformat(time_of)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _folders(path: Path) -> list[Path]:
    return [item for item in path.iterdir() if item.is_dir()] if path.is_dir() else []


def _count(records: Path, gone: Container[int]) -> int:
    return sum(task not in gone for path in _folders(records) for task, _ in _records(path))


def _web(url: str) -> str:
    """Only what a link may lead to."""
    return url.rstrip("/") if url.startswith(("http://", "https://")) else ""
