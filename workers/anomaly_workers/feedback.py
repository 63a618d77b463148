"""Feedback: what annotators said of the predictions, kept as a log that is reconciled with Label Studio's own list.

    projects/<project>/feedback/log.jsonl            one entry a line, appended, never changed
                               /masks/<digest>.png   1-bit masks, longest side at most SIDE pixels, named by content
                               /lock                 held while the log grows

Webhooks only say when to look. A log that was lost is written again from the annotations that Label Studio still has.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_workers.client import Annotated, Stamp
from anomaly_workers.errors import StoreError
from anomaly_workers.labelstudio import config, decode, masks
from anomaly_workers.store import ProjectStore
from anomaly_workers.types import JSON, Controls, Task

SIDE = 512  # pixels of a kept mask's longest side
OVERLAP = timedelta(minutes=2)  # how far a round looks back before the newest change it knows
BATCH = 100  # tasks whose masks are in memory at once

Kind = Literal["submitted", "changed", "skipped", "deleted"]
Judged = Literal["confirmed", "missed", "false alarm", "agreed normal", "unknown"]
Origin = Literal["prediction", "prediction-changed", "manual", "none"]
Mask = NDArray[np.bool_]

_JUDGED: dict[tuple[bool, bool], Judged] = {  # (what the annotator said, what the prediction said)
    (True, True): "confirmed",
    (True, False): "missed",
    (False, True): "false alarm",
    (False, False): "agreed normal",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of one annotation, as a line of the log.

    Attributes:
        seq: place in the log, from 1.
        at: ISO time of the line.
        annotation: annotation id.
        task: task id.
        image: the task's raw image value.
        kind: what happened; the entry of a deleted annotation repeats what it had said.
        created_at: ISO time of the annotation's creation, by Label Studio's clock.
        updated_at: ISO time of the annotation's last change; with its id it tells an event that is known.
        annotator: user id, 0 if unknown.
        anomaly: the verdict, None if there is none.
        defect: digest of the mask of all marks; "" without marks, and when one of them could not be read.
        rejected: digest of the places where something was predicted and the annotator saw nothing, "" if none.
        origin: where the marks come from; "prediction" when each is as it was predicted.
        judged: the verdict against the prediction's.
        version: our version that the annotator saw, "" if none.
        score: that version's anomaly score in [0, 1], None if it is not known.
        lead_time: seconds the annotator took, None if unknown.
        parent_prediction: id of the prediction that the annotation began as, None if it did not.
        ground_truth: whether the annotation is marked so in Label Studio.
        unreadable: one reason for every mark that could not be read.
    """

    seq: int
    at: str
    annotation: int
    task: int
    image: str
    kind: Kind
    created_at: str
    updated_at: str
    annotator: int
    anomaly: bool | None = None
    defect: str = ""
    rejected: str = ""
    origin: Origin = "none"
    judged: Judged = "unknown"
    version: str = ""
    score: float | None = None
    lead_time: float | None = None
    parent_prediction: int | None = None
    ground_truth: bool = False
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What the annotators of a task say together; each counts once, with the newest of their annotations.

    Attributes:
        task: task id.
        image: the task's raw image value.
        anomaly: the majority's verdict; None on a tie or without any, and the task is nothing to learn from.
        defect: (h, w) bool, where most of those who drew saw the defect; None when it is not known.
        rejected: (h, w) bool, where most annotators saw nothing although something was predicted; None if nowhere.
        annotators: how many gave a verdict.
        annotations: their annotation ids, ascending.
        judged: their verdicts against the prediction, in the order of `annotations`.
        version: our version that the last of them saw, "" if none.
        score: that version's anomaly score in [0, 1], None if it is not known.
        first_at: ISO time of the task's first annotation.
    """

    task: int
    image: str
    anomaly: bool | None
    defect: Mask | None = field(repr=False)
    rejected: Mask | None = field(repr=False)
    annotators: int
    annotations: tuple[int, ...]
    judged: tuple[Judged, ...]
    version: str
    score: float | None
    first_at: str


class Listing(Protocol):
    """What the log is reconciled with; see `Client`."""

    def annotation_count(self, project: int) -> int:
        """Return how many annotations there are, skips included."""

    def annotation_stamps(self, project: int, *, since: str = "") -> Mapping[int, Stamp]:
        """Return the stamp of every annotation, or of those on tasks that changed since."""

    def annotations(self, project: int, tasks: Sequence[int]) -> Iterable[Annotated]:
        """Return those of `tasks` that exist, with all their annotations."""


def verdict(entries: Sequence[Entry]) -> bool | None:
    """Return what the living entries of one task say together; None on a tie or without any verdict."""
    return _majority([bool(vote.anomaly) for vote in _newest_of_each(entries) if vote.anomaly is not None])


class FeedbackLog:
    """The feedback of one project. Any number of processes may read it and reconcile it."""

    def __init__(self, store: ProjectStore) -> None:
        self._store = store
        self._folder = store.folder / "feedback"
        self._path = self._folder / "log.jsonl"

    def entries(self) -> list[Entry]:
        """Return every entry, oldest first; a line that a crash cut off is not one.

        Raises:
            StoreError: a line is damaged.
        """
        content = self._path.read_bytes() if self._path.exists() else b""
        *lines, _cut_off = content.split(b"\n")
        return [self._parsed(line, number) for number, line in enumerate(lines, 1)]

    def current(self) -> dict[int, Entry]:
        """Return the newest entry of every annotation that still exists, skips included, by annotation id."""
        return latest(self.entries())

    def examples(self, tasks: Collection[int] | None = None) -> list[Example]:
        """Return what the annotators of each task, or of each of `tasks`, say together, by task.

        Tasks that everybody skipped are left out.

        Raises:
            StoreError: the log or a mask is damaged.
        """
        by_task: dict[int, list[Entry]] = defaultdict(list)
        for entry in self.current().values():
            if entry.kind != "skipped" and (tasks is None or entry.task in tasks):
                by_task[entry.task].append(entry)
        return [self._example(by_task[task]) for task in sorted(by_task)]

    def mask(self, digest: str) -> Mask:
        """Return a kept mask, (h, w) bool with the image's aspect ratio.

        Raises:
            StoreError: the file is missing or damaged.
        """
        path = self._mask_path(digest)
        try:
            with Image.open(path) as picture:
                mask = np.asarray(picture.convert("1"), dtype=bool)
        except (OSError, SyntaxError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {error}. {self._remedy}") from error
        if _digest(mask) != digest:
            raise StoreError(f"{path} is not the mask that was kept. {self._remedy}")
        return mask

    def reconcile(self, client: Listing, controls: Controls) -> list[Entry]:
        """Append what is new, changed or gone in Label Studio, and return it.

        Recent changes are asked for first; everything is listed only if the number of annotations differs then, as
        after a deletion. Another process that reconciles meanwhile waits.

        Raises:
            LabelStudioError: Label Studio did not answer; what was appended until then stays.
            StoreError: the log is damaged.
        """
        with self._growing():
            known = self.entries()
            before = len(known)
            recent = client.annotation_stamps(self._store.id, since=_look_back(known))
            self._settle(client, controls, known, _changed(recent, latest(known)))
            living = latest(known)
            if client.annotation_count(self._store.id) != len(living):
                everything = client.annotation_stamps(self._store.id)
                gone = {entry.task for annotation, entry in living.items() if annotation not in everything}
                self._settle(client, controls, known, _changed(everything, living) | gone)
            return known[before:]

    # -- growing

    @contextmanager
    def _growing(self) -> Iterator[None]:
        """Hold the right to append, with the log ending in a whole line."""
        (self._folder / "masks").mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, whatever becomes of this process
            self._mend()
            yield

    def _mend(self) -> None:
        with self._path.open("a+b") as log:
            size = log.seek(0, os.SEEK_END)
            if size and os.pread(log.fileno(), 1, size - 1) != b"\n":
                log.truncate(self._path.read_bytes().rfind(b"\n") + 1)

    def _settle(self, client: Listing, controls: Controls, known: list[Entry], tasks: set[int]) -> None:
        """Append to `known` and to the log what changed on some tasks, as Label Studio has them now."""
        if not tasks:
            return
        reader = _Reader(self._store, controls)
        living: dict[int, dict[int, Entry]] = defaultdict(dict)
        for annotation, entry in latest(known).items():
            living[entry.task][annotation] = entry
        ordered = sorted(tasks)
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            found = {item.task.id: item for item in client.annotations(self._store.id, batch)}
            news = [entry for task in batch for entry in self._news(reader, found.get(task), living[task])]
            known += self._append(news, after=known[-1].seq if known else 0)

    def _news(self, reader: _Reader, item: Annotated | None, living: Mapping[int, Entry]) -> Iterator[Entry]:
        """Entries, not numbered yet, that bring one task up to date; `item` is None for a task that is gone."""
        present = {int(one["id"]): one for one in item.annotations} if item else {}
        for annotation, entry in sorted(living.items()):
            if annotation not in present:
                yield replace(entry, kind="deleted")
        for annotation, content in sorted(present.items()):
            before = living.get(annotation)
            if item and (before is None or before.updated_at != content["updated_at"]):
                reading = reader.read(item.task, content, is_new=before is None)
                yield replace(reading.entry, defect=self._keep(reading.defect), rejected=self._keep(reading.rejected))

    def _append(self, entries: Sequence[Entry], *, after: int) -> list[Entry]:
        if not entries:
            return []
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        numbered = [replace(entry, seq=seq, at=now) for seq, entry in enumerate(entries, after + 1)]
        _sync_folder(self._folder / "masks")
        with self._path.open("ab") as log:
            log.write(b"".join(json.dumps(asdict(entry)).encode() + b"\n" for entry in numbered))
            log.flush()
            os.fsync(log.fileno())
        _sync_folder(self._folder)
        return numbered

    def _keep(self, mask: Mask | None) -> str:
        """Store a mask and return its digest, "" for none."""
        if mask is None or not mask.any():
            return ""
        digest = _digest(mask)
        path = self._mask_path(digest)
        if not path.exists():
            scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            with scratch.open("wb") as file:
                Image.fromarray(mask).save(file, "PNG")
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        return digest

    def _mask_path(self, digest: str) -> Path:
        return self._folder / "masks" / f"{digest}.png"

    @property
    def _remedy(self) -> str:
        return (
            f"Restore {self._folder} from a backup, or remove it: "
            "it is written again from the annotations that Label Studio still has."
        )

    def _parsed(self, line: bytes, number: int) -> Entry:
        try:
            fields = json.loads(line)
            return Entry(**{**fields, "unreadable": tuple(fields["unreadable"])})
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{self._path}, line {number}, cannot be read: {error}. {self._remedy}") from error

    # -- merging

    def _example(self, entries: Sequence[Entry]) -> Example:
        """Merge the living entries of one task."""
        votes = [entry for entry in _newest_of_each(entries) if entry.anomaly is not None]
        anomaly = _majority([bool(vote.anomaly) for vote in votes])
        drawn = [vote.defect for vote in votes if vote.anomaly and vote.defect]
        rejected = [vote.rejected for vote in votes if vote.rejected]
        ordered = sorted(entries, key=_age)
        seen = next((entry for entry in reversed(ordered) if entry.version), None)
        return Example(
            task=ordered[-1].task,
            image=ordered[-1].image,
            anomaly=anomaly,
            defect=self._agreed(drawn, of=len(drawn)) if anomaly else None,
            rejected=self._agreed(rejected, of=len(votes)) if anomaly is not None else None,
            annotators=len(votes),
            annotations=tuple(vote.annotation for vote in votes),
            judged=tuple(vote.judged for vote in votes),
            version=seen.version if seen else "",
            score=seen.score if seen else None,
            first_at=min((entry.created_at for entry in entries), key=_moment),
        )

    def _agreed(self, digests: Sequence[str], *, of: int) -> Mask | None:
        """Where more than half `of` the annotators marked; None if nowhere."""
        if not digests:
            return None
        first, *rest = [self.mask(digest) for digest in sorted(digests)]
        size = (first.shape[0], first.shape[1])
        marks = [first, *(masks.enlarged(mask, size) for mask in rest)]
        agreed: Mask = 2 * np.sum(marks, axis=0) > of
        return agreed if agreed.any() else None


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """An annotation's entry, not numbered yet, with the masks that are still to be kept."""

    entry: Entry
    defect: Mask | None = None
    rejected: Mask | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """A prediction of ours that the annotator saw: its regions, its verdict, and whether the annotation began as it."""

    version: str
    regions: Sequence[Mapping[str, Any]]
    score: float | None
    anomaly: bool | None
    began: bool


class _Reader:
    """Reads annotations of one project against what our versions predicted."""

    def __init__(self, store: ProjectStore, controls: Controls) -> None:
        self._store = store
        self._controls = controls
        names = [store.current, store.rollout, *(str(card["version"]) for card in reversed(store.versions()))]
        self._versions = [name for name in dict.fromkeys(names) if name]  # likeliest first

    def read(self, task: Task, annotation: JSON, *, is_new: bool) -> _Reading:
        """Return what an annotation says of its task."""
        entry = Entry(
            seq=0,
            at="",
            annotation=int(annotation["id"]),
            task=task.id,
            image=config.image_of(task.data, self._controls.value) or "",
            kind="submitted" if is_new else "changed",
            created_at=str(annotation.get("created_at") or annotation["updated_at"]),
            updated_at=str(annotation["updated_at"]),
            annotator=_user(annotation.get("completed_by")),
            lead_time=annotation.get("lead_time"),
            parent_prediction=annotation.get("parent_prediction"),
            ground_truth=bool(annotation.get("ground_truth")),
        )
        if annotation.get("was_cancelled"):
            return _Reading(replace(entry, kind="skipped"))
        regions = [region for region in annotation.get("result") or () if isinstance(region, Mapping)]
        return self._judged(entry, regions)

    def _judged(self, entry: Entry, result: Sequence[Mapping[str, Any]]) -> _Reading:
        seen = self._seen(entry, _ids(result))
        size = _bounded([*result, *(seen.regions if seen else ())])
        said = decode.judgement(result, self._controls, size)
        anomaly = self._verdict(said)
        full = replace(
            entry,
            anomaly=anomaly,
            origin=_origin(said.marks),
            judged=_against(anomaly, seen),
            version=seen.version if seen else "",
            score=seen.score if seen else None,
            unreadable=said.unreadable,
        )
        drawn = said.mask if anomaly is not False and not said.unreadable else None
        return _Reading(full, defect=drawn, rejected=self._rejected(anomaly, said, seen, _ids(result)))

    def _verdict(self, said: decode.Judgement) -> bool | None:
        """The choice decides; where the label config offers none, the marks do."""
        if self._controls.choices is not None:
            return said.anomaly
        if said.marks or said.unreadable:
            return True
        return None if self._controls.mask is None else False

    def _rejected(
        self, anomaly: bool | None, said: decode.Judgement, seen: _Seen | None, kept: frozenset[str]
    ) -> Mask | None:
        """All predicted places of a normal image; of an anomalous one, those deleted and not drawn again."""
        if anomaly is None or seen is None or (anomaly and (said.unreadable or not seen.began)):
            return None
        gone = [region for region in seen.regions if not anomaly or str(region.get("id")) not in kept]
        rejected = decode.judgement(gone, self._controls, (said.mask.shape[0], said.mask.shape[1])).mask
        return rejected & ~said.mask if anomaly else rejected

    def _seen(self, entry: Entry, ids: frozenset[str]) -> _Seen | None:
        """The prediction that shares region ids with an annotation, else the deployed version's."""
        for version in self._versions:
            record = self._store.record(version, entry.task)
            if record and ids & _ids(record["result"]):
                return _shown(version, record, began=True)
        current = self._store.current
        record = self._store.record(current, entry.task) if current else None
        return _shown(current, record, began=entry.parent_prediction is not None) if record else None


def _shown(version: str, record: JSON, *, began: bool) -> _Seen:
    about = record.get("anomaly") or {}
    score, threshold = about.get("anomaly_score"), about.get("threshold")
    anomaly = None if score is None or threshold is None else score >= threshold
    return _Seen(version, record["result"], score, anomaly, began)


def _against(anomaly: bool | None, seen: _Seen | None) -> Judged:
    if anomaly is None or seen is None or seen.anomaly is None:
        return "unknown"
    return _JUDGED[anomaly, seen.anomaly]


def _origin(marks: Sequence[decode.Mark]) -> Origin:
    origins = {mark.origin for mark in marks}
    if not origins:
        return "none"
    if origins == {"prediction"}:
        return "prediction"
    return "manual" if origins == {"manual"} else "prediction-changed"


def _bounded(regions: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(height, width) of kept masks: that of the image the regions are on, shrunk to SIDE; (1, 1) without regions."""
    for region in regions:
        height, width = (region.get(f"original_{side}") for side in ("height", "width"))
        if isinstance(height, int | float) and isinstance(width, int | float) and 0 < height * width < 1e12:
            shrink = min(1.0, SIDE / max(height, width))
            return max(1, round(height * shrink)), max(1, round(width * shrink))
    return 1, 1


def _ids(result: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    return frozenset(str(region["id"]) for region in result if region.get("id"))


def _user(completed_by: Any) -> int:
    """The id of `5` or `{"id": 5, …}`."""
    user = completed_by.get("id") if isinstance(completed_by, Mapping) else completed_by
    return int(user or 0)


def latest(entries: Iterable[Entry]) -> dict[int, Entry]:
    """Return the latest entry of each annotation that was not deleted since."""
    found: dict[int, Entry] = {}
    for entry in entries:
        if entry.kind == "deleted":
            found.pop(entry.annotation, None)
        else:
            found[entry.annotation] = entry
    return found


def _changed(stamps: Mapping[int, Stamp], living: Mapping[int, Entry]) -> set[int]:
    """Tasks with annotations that the log does not know as they are."""
    return {
        stamp.task
        for annotation, stamp in stamps.items()
        if annotation not in living or living[annotation].updated_at != stamp.updated_at
    }


def _look_back(entries: Sequence[Entry]) -> str:
    """The ISO time from which on changes may be unknown, "" if all may be; a clock that ran ahead hides nothing."""
    if not entries:
        return ""
    newest = min(max(_moment(entry.updated_at) for entry in entries), datetime.now(UTC))
    return (newest - OVERLAP).isoformat().replace("+00:00", "Z")


def _newest_of_each(entries: Sequence[Entry]) -> list[Entry]:
    """The newest entry of each annotator, by annotation id."""
    newest = {entry.annotator: entry for entry in sorted(entries, key=_age)}
    return sorted(newest.values(), key=lambda entry: entry.annotation)


def _majority(verdicts: Sequence[bool]) -> bool | None:
    anomalous = sum(verdicts)
    normal = len(verdicts) - anomalous
    return None if anomalous == normal else anomalous > normal


def _age(entry: Entry) -> tuple[datetime, int]:
    return _moment(entry.updated_at), entry.annotation


def _moment(time_of: str) -> datetime:
    moment = datetime.fromisoformat(time_of)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _digest(mask: Mask) -> str:
    height, width = mask.shape
    return hashlib.sha256(f"{height}x{width}:".encode() + np.packbits(mask).tobytes()).hexdigest()[:40]


def _sync_folder(folder: Path) -> None:
    """Make renames and new files of a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
