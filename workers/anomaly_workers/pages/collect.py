"""Reads what a page shows from the store and the queues; Label Studio is never asked."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from redis.exceptions import RedisError

from anomaly_workers import policy
from anomaly_workers.counters import totals
from anomaly_workers.feedback import Entry, FeedbackLog, verdict
from anomaly_workers.pages.facts import Review, Scored, Snapshot, Summary, Work
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import JSON

UNSETTLED_SECONDS = 2.0
"""A folder that changed so recently may change again within the same tick of the file system's clock."""

TAIL = 4096
"""Bytes at a record's end that are read first."""

_EXTRA = b'"anomaly": {'


@dataclass(slots=True)
class _Folder:
    """A folder of records as it was listed: when each was written, and what those that were read say."""

    changed: int = -1
    times: dict[int, float] = field(default_factory=dict)
    said: dict[int, JSON] = field(default_factory=dict)


class Collector:
    """Reads projects, and again only what changed since; one a process, for any number of threads."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._folders: dict[Path, _Folder] = {}
        self._logs: dict[Path, tuple[tuple[int, int], list[Entry]]] = {}
        self._lock = Lock()

    def summaries(self) -> list[Summary]:
        """Return a line for every connected project, without reading what was said of its tasks."""
        return [self._summary(project) for project in self._store.projects()]

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

    def _summary(self, project: ProjectStore) -> Summary:
        with self._lock:
            reviews, skipped = self._reviews(project)
        current = project.current
        return Summary(
            project=project.id,
            title=project.title or f"Project {project.id}",
            current=current,
            scored=_count(project.folder / "records" / current) if current else 0,
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
        family = project.family(current)
        first: dict[int, float] = {}
        scored: dict[int, float] = {}
        said: dict[str, dict[int, JSON]] = {}
        for version in (str(one["version"]) for one in cards):  # oldest first
            for path in _folders(project.folder / "records" / version):
                folder = self._listed(path, first, reading=version in family)
                first = folder.times | first
                if version in family:
                    scored = folder.times | scored
                    said.setdefault(version, {}).update(folder.said)
        merged: dict[int, JSON] = {}
        for version in sorted(said, key=lambda name: name == current):  # the deployed one wins
            merged |= said[version]
        return tuple(_scored(task, merged[task], threshold, first[task], scored[task]) for task in sorted(merged))

    def _listed(self, path: Path, older: Container[int], *, reading: bool) -> _Folder:
        """List a folder of records unless it is as it was; of what is not read, only tasks that no older one has."""
        known = self._folders.get(path, _Folder())
        changed = path.stat().st_mtime_ns
        if known.changed == changed and (known.said or not reading):
            return known
        fresh = _Folder(changed if time.time() - changed / 1e9 > UNSETTLED_SECONDS else -1)
        with os.scandir(path) as listing:
            for item in listing:
                name, _, kind = item.name.partition(".")
                if kind != "json" or not name.isdigit() or not (reading or int(name) not in older):
                    continue
                task = int(name)
                if not reading:
                    fresh.times[task] = item.stat().st_mtime
                elif task in known.said and known.times[task] == item.stat().st_mtime:
                    fresh.times[task], fresh.said[task] = known.times[task], known.said[task]
                elif (found := _read(item.path)) is not None:
                    fresh.times[task], fresh.said[task] = found
        self._folders[path] = fresh
        return fresh

    # -- feedback

    def _reviews(self, project: ProjectStore) -> tuple[tuple[Review, ...], frozenset[int]]:
        """The tasks with a verdict in the order of their first annotation, and those that were only skipped."""
        entries = self._entries(project)
        living: dict[int, Entry] = {}
        for entry in entries:
            if entry.kind == "deleted":
                living.pop(entry.annotation, None)
            else:
                living[entry.annotation] = entry
        by_task: dict[int, list[Entry]] = {}
        for entry in living.values():
            if entry.kind != "skipped":
                by_task.setdefault(entry.task, []).append(entry)
        seen: dict[int, Entry] = {}
        for entry in entries:
            if entry.score is not None:
                seen.setdefault(entry.task, entry)
        reviews = [_review(of_task, seen.get(task)) for task, of_task in by_task.items()]
        skipped = frozenset(entry.task for entry in living.values()) - by_task.keys()
        return tuple(sorted(reviews, key=lambda review: (review.at, review.task))), skipped

    def _entries(self, project: ProjectStore) -> list[Entry]:
        path = project.folder / "feedback" / "log.jsonl"
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


def _read(path: str) -> tuple[float, JSON] | None:
    """When a record was written and what it says; with bare calls, half the time of a page's first 5,000 records."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None  # removed while we looked
    try:
        about = os.fstat(handle)
        tail = os.pread(handle, TAIL, max(0, about.st_size - TAIL))
        said = _said(tail) or _said(os.pread(handle, about.st_size, 0))
    finally:
        os.close(handle)
    return (about.st_mtime, said) if said is not None else None


def _said(content: bytes) -> JSON | None:
    """What a record says beside its regions, which are most of it and stand before the rest; None if it is not there.

    Parsing 5,000 records whole takes seconds when their masks are large.
    """
    start = content.rfind(_EXTRA)
    try:
        about = json.loads(content[start + len(_EXTRA) - 1 : -1]) if start >= 0 else {}
        if "anomaly_score" not in about:
            about = json.loads(content)["anomaly"]
    except (ValueError, KeyError):
        return None  # damaged; a page shows the others
    return about if "anomaly_score" in about else None


def _scored(task: int, said: JSON, threshold: float, first_at: float, scored_at: float) -> Scored:
    parts: list[float] = said.get("parts") or []
    return Scored(
        task=task,
        score=float(said["anomaly_score"]),
        threshold=threshold,
        image=str(said.get("image", "")),
        parts=(float(parts[0]), float(parts[1])) if len(parts) == 2 else None,
        first_at=first_at,
        scored_at=scored_at,
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


def _count(records: Path) -> int:
    return sum(name.endswith(".json") and name[0].isdigit() for path in _folders(records) for name in os.listdir(path))


def _web(url: str) -> str:
    """Only what a link may lead to."""
    return url.rstrip("/") if url.startswith(("http://", "https://")) else ""
