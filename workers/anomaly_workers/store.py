"""Files that outlive every process: projects, versions, predictions, heatmaps.

    DATA_DIR/secrets.json                         password and heatmap key, mode 0600
    DATA_DIR/projects/<project>/connection.json   Label Studio's address and token, mode 0600
                               /config.xml        the label config last seen
                               /configs/<time>.xml  label configs that `connect` replaced
                               /current           name of the deployed version, one atomic pointer
                               /rollout           name of the version that is being scored to replace it
                               /announced         name of the version that Label Studio was told to show
                               /history.jsonl     every deployment, appended
                               /title             its title in Label Studio
                               /policy.json       what people decided: review order, threshold
                               /queue.json        the review queue as Label Studio knows it
                               /names.json        for which controls all predictions were looked at last
                               /tabs.json         ids of our Data Manager tabs
                               /deleted.json      tasks that are gone from Label Studio
                               /versions/<version>/card.json, detector.json, detector.safetensors
                               /records/<version>/<task // 1000>/<task>.json, <task>.png (16-bit anomaly map),
                                                                <task>.npy (its hottest patches)
                               /calmed/<version>/<entry>.npy (patches that count as normal since a rejected alarm)
                               /learnt                       number of the last feedback entry that was learnt from
                               /heatmaps/<version>/<key[:2]>/<key>.png
                               /failures/<task>.json
                               /pictures/                    decoded uploads, may be removed at any time
                               /feedback/log.jsonl, masks/<digest>.png, lock

Every write goes to a temporary name first and is renamed, so that a reader sees the old file or the new one. That also
lets versions of the same weights share maps, patches and heatmaps as hard links: a file never changes in place.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import time
from base64 import urlsafe_b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hmac import compare_digest
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_workers.errors import StoreError
from anomaly_workers.types import JSON, Connection

PERMANENT = -1

MOST_DELETED = 100_000
"""Deleted tasks that are remembered for a project."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task has no prediction.

    Attributes:
        task: task id.
        reason: one line.
        image: the task's image value.
        attempts: how often it was tried; PERMANENT if trying again cannot help.
        at: seconds since the epoch of the last try.
    """

    task: int
    reason: str
    image: str
    attempts: int
    at: float

    def is_due(self, image: str, now: float) -> bool:
        """Whether the task deserves another try: its image changed, or a passing fault had time to pass."""
        if self.image and image != self.image:
            return True
        return self.attempts != PERMANENT and now - self.at > min(3600.0, 20.0 * 2.0**self.attempts)


class Store:
    """The data directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def project(self, project: int) -> ProjectStore:
        """Return the part of one project; nothing is created until something is written."""
        return ProjectStore(self.root / "projects" / str(int(project)), int(project))

    def projects(self) -> list[ProjectStore]:
        """Return every project that is connected, by id."""
        folder = self.root / "projects"
        if not folder.is_dir():
            return []
        ids = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        return [self.project(project) for project in ids if self.project(project).is_connected]

    def secret(self, name: str) -> str:
        """Return the named secret, made at the first call and kept with mode 0600."""
        path = self.root / "secrets" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write_once(path, secrets.token_urlsafe(24).encode())
        return path.read_text().strip()

    def heatmap_token(self, project: int) -> str:
        """Return the unguessable part of a project's heatmap address."""
        return hashlib.blake2s(f"heatmap {project}".encode(), key=self.secret("heatmap")[:32].encode()).hexdigest()[:32]

    def owns_heatmap(self, project: int, token: str) -> bool:
        """Check a heatmap address in constant time."""
        return compare_digest(self.heatmap_token(project).encode(), token.encode(errors="replace"))


class ProjectStore:
    """What is known of one project."""

    def __init__(self, folder: Path, project: int) -> None:
        self.folder = folder
        self.id = project

    # -- the project itself

    @property
    def is_connected(self) -> bool:
        """Whether `connect` stored how to reach Label Studio and nobody disconnected it."""
        return (self.folder / "connection.json").exists()

    def connect(self, connection: Connection) -> None:
        """Remember how to reach Label Studio."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "connection.json", json.dumps(asdict(connection)).encode(), mode=0o600)

    def disconnect(self) -> None:
        """Forget the credentials; versions and records stay."""
        (self.folder / "connection.json").unlink(missing_ok=True)

    def connection(self) -> Connection:
        """Return how to reach Label Studio.

        Raises:
            StoreError: the project is not connected.
        """
        path = self.folder / "connection.json"
        if not path.exists():
            raise StoreError(f"Project {self.id} is not connected. Run: ls-anomaly connect --project {self.id}")
        return Connection(**_read_json(path))

    @property
    def label_config(self) -> str:
        """The label config last seen, empty if none."""
        path = self.folder / "config.xml"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def keep_label_config(self, xml: str) -> None:
        """Remember the label config."""
        if xml and xml != self.label_config:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "config.xml", xml.encode())

    def keep_replaced_config(self, xml: str) -> Path:
        """Keep a label config that is about to be replaced, so that it can be put back; return where."""
        folder = self.folder / "configs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(2)}.xml"
        _write(path, xml.encode())
        return path

    @property
    def title(self) -> str:
        """The project's title in Label Studio when it was connected, empty if not known."""
        return self._pointer("title")

    def keep_title(self, title: str) -> None:
        """Remember the project's title."""
        _write(self.folder / "title", " ".join(title.split()).encode())

    def document(self, name: str) -> JSON:
        """Return a small document of the project, empty if there is none."""
        path = self.folder / f"{_safe(name)}.json"
        return _read_json(path) if path.exists() else {}

    def keep_document(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a small document of the project."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / f"{_safe(name)}.json", json.dumps(content, indent=1).encode())

    @property
    def deleted(self) -> frozenset[int]:
        """The tasks that are gone from Label Studio."""
        return frozenset(self.document("deleted").get("tasks", ()))

    def keep_deleted(self, tasks: Iterable[int]) -> None:
        """Remember that tasks are gone from Label Studio; the newest ids, if they are too many."""
        gone = sorted(self.deleted.union(tasks))
        self.keep_document("deleted", {"tasks": gone[-MOST_DELETED:]})

    # -- versions

    @property
    def current(self) -> str:
        """The deployed version, empty before the first."""
        return self._pointer("current")

    @property
    def rollout(self) -> str:
        """The version that is being scored to replace `current`, empty if none."""
        return self._pointer("rollout")

    @property
    def target(self) -> str:
        """The version that open tasks should be scored with now."""
        return self.rollout or self.current

    @property
    def announced(self) -> str:
        """The version that Label Studio was told to show, empty if none."""
        return self._pointer("announced")

    def keep_announced(self, version: str) -> None:
        """Note which version Label Studio was told to show."""
        _write(self.folder / "announced", version.encode())

    def versions(self) -> list[JSON]:
        """Return the cards of all versions, oldest first."""
        cards = [_read_json(path) for path in (self.folder / "versions").glob("[!.]*/card.json")]
        return sorted(cards, key=lambda card: int(card["number"]))

    def card(self, version: str) -> JSON:
        """Return a version's card.

        Raises:
            StoreError: there is no such version.
        """
        path = self.version_folder(version) / "card.json"
        if not path.exists():
            raise StoreError(f"Project {self.id} has no version {version!r}. See: ls-anomaly versions -p {self.id}")
        return _read_json(path)

    def version_folder(self, version: str) -> Path:
        """Return where a version's files are."""
        return self.folder / "versions" / _safe(version)

    def family(self, version: str) -> frozenset[str]:
        """Return the versions that share a version's weights, itself among them; they differ in the threshold alone."""
        cards = {str(card["version"]): str(card.get("weights_of") or card["version"]) for card in self.versions()}
        root = cards.get(version, version)
        return frozenset(name for name, weights in cards.items() if weights == root) | {version}

    @contextmanager
    def new_version(self) -> Iterator[Path]:
        """Yield a scratch folder for a version's weights; remove it unless `publish` took it."""
        scratch = self.folder / "versions" / f".new-{os.getpid()}-{secrets.token_hex(4)}"
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def publish(self, scratch: Path, card: Mapping[str, Any]) -> str:
        """Make an immutable version of `scratch`; return its name, `<detector>-v<number>-<hash of the weights>`."""
        number = max((int(known["number"]) for known in self.versions()), default=0) + 1
        digest = _digest(scratch)
        version = f"{card['detector']}-v{number}-{digest[:8]}"
        full = {"version": version, "number": number, "sha256": digest, "created": _now(), **card}
        _write(scratch / "card.json", json.dumps(full, indent=2).encode())
        os.rename(scratch, self.version_folder(version))
        return version

    def roll_out(self, version: str) -> None:
        """Start replacing the deployed version; the first version is deployed at once."""
        self.card(version)
        if not self.current:
            self.deploy(version, reason="first version")
        elif version == self.current:
            (self.folder / "rollout").unlink(missing_ok=True)
        else:
            _write(self.folder / "rollout", version.encode())

    def deploy(self, version: str, *, reason: str) -> None:
        """Switch the pointer to `version` and note it in the history."""
        self.card(version)
        previous = self.current
        entry = {"at": _now(), "from": previous, "to": version, "reason": reason}
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as history:
            history.write(json.dumps(entry) + "\n")
        _write(self.folder / "current", version.encode())
        if self.rollout == version:
            (self.folder / "rollout").unlink(missing_ok=True)

    def history(self) -> list[JSON]:
        """Return every deployment, oldest first."""
        path = self.folder / "history.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]

    # -- records: what a version said of a task

    def keep_record(
        self,
        version: str,
        task: int,
        record: Mapping[str, Any],
        anomaly_map: NDArray[np.float32],
        *,
        hottest: NDArray[np.float16] | None = None,
    ) -> None:
        """Keep a prediction as it will be pushed, with its map and its hottest patches (k, d)."""
        path = self._record(version, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path.with_suffix(".png"), _encode_map(anomaly_map))
        if hottest is not None:
            _write(path.with_suffix(".npy"), _encode_rows(hottest))
        _write(path, json.dumps(record).encode())

    def mark_pushed(self, version: str, tasks: Mapping[int, bool]) -> None:
        """Note which records are in Label Studio."""
        for task, pushed in tasks.items():
            mark = self._record(version, task).with_suffix(".pushed")
            if pushed:
                mark.touch()
            else:
                mark.unlink(missing_ok=True)

    def record(self, version: str, task: int) -> JSON | None:
        """Return a prediction as pushed, None if this version did not score the task."""
        path = self._record(version, task)
        return _read_json(path) if path.exists() else None

    def is_pushed(self, version: str, task: int) -> bool:
        """Whether Label Studio took the record."""
        return self._record(version, task).with_suffix(".pushed").exists()

    def pushed(self, version: str) -> int:
        """Return how many of a version's records Label Studio took."""
        folder = self.folder / "records" / _safe(version)
        return sum(1 for _ in folder.glob("*/*.pushed"))

    def anomaly_map(self, version: str, task: int) -> NDArray[np.float32] | None:
        """Return the stored map, (h, w) float32 in [0, 1], None if there is none."""
        path = self._record(version, task).with_suffix(".png")
        return _decode_map(path.read_bytes()) if path.exists() else None

    def hottest(self, version: str) -> Iterator[tuple[int, NDArray[np.float16]]]:
        """Yield each task that a version scored, with its hottest patches (k, d)."""
        for path in sorted((self.folder / "records" / _safe(version)).glob("*/*.npy")):
            yield int(path.stem), _decode_rows(path)

    def derive_maps(self, source: str, version: str) -> None:
        """Let a version share the maps and hottest patches of another one of its family."""
        root = self.folder / "records"
        for pattern in ("*/[!.]*.png", "*/[!.]*.npy"):
            _share_all(root / _safe(source), root / _safe(version), pattern)

    def derive_record(self, version: str, task: int, record: Mapping[str, Any]) -> bool:
        """Keep a record whose map the version shares with another one; False if there is no such map."""
        path = self._record(version, task)
        if not path.with_suffix(".png").exists():
            return False
        _write(path, json.dumps(record).encode())
        return True

    # -- rejected alarms: patches that count as normal besides what a version was fitted on

    def keep_calmed(self, version: str, entry: int, patches: NDArray[np.float16]) -> None:
        """Keep the patches (k, d) that a feedback entry makes normal."""
        path = self._calmed(version) / f"{int(entry)}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, _encode_rows(patches))

    def forget_calmed(self, version: str, entry: int) -> None:
        """Take back what a feedback entry made normal."""
        (self._calmed(version) / f"{int(entry)}.npy").unlink(missing_ok=True)

    def calmed(self, version: str) -> tuple[int, ...]:
        """Return the numbers of the feedback entries that made patches normal for a version."""
        return tuple(sorted(int(path.stem) for path in self._calmed(version).glob("[0-9]*.npy")))

    def calmed_patches(self, version: str, entries: Sequence[int]) -> NDArray[np.float16]:
        """Return the patches (k, d) of some feedback entries together."""
        rows = [_decode_rows(self._calmed(version) / f"{entry}.npy") for entry in entries]
        return np.concatenate(rows) if rows else np.zeros((0, 0), np.float16)

    def derive_calmed(self, source: str, version: str) -> None:
        """Make normal for a version what is so for another one of its family, and nothing else."""
        for entry in set(self.calmed(version)) - set(self.calmed(source)):
            self.forget_calmed(version, entry)
        _share_all(self._calmed(source), self._calmed(version), "[0-9]*.npy")

    @property
    def learnt(self) -> int:
        """The number of the last feedback entry that a learning run has seen."""
        return int(self._pointer("learnt") or 0)

    def keep_learnt(self, entry: int) -> None:
        """Note the last feedback entry that a learning run has seen."""
        _write(self.folder / "learnt", str(int(entry)).encode())

    # -- heatmaps

    def keep_heatmap(self, version: str, image: str, picture: bytes) -> None:
        """Keep a heatmap under its image's address."""
        path = self._heatmap(version, image)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, picture)

    def heatmap(self, image: str) -> Path | None:
        """Return the newest heatmap of an image: the deployed version's, or the one about to replace it."""
        candidates = [self._heatmap(version, image) for version in (self.current, self.rollout) if version]
        return next((path for path in candidates if path.exists()), None)

    def heatmap_of(self, key: str) -> Path | None:
        """Return the deployed version's heatmap of the image that has a key; see `image_key`."""
        path = self._heatmap_file(self.current, key) if self.current and key else None
        return path if path is not None and path.exists() else None

    def derive_heatmaps(self, source: str, version: str) -> None:
        """Let a version share another version's heatmaps, until they are drawn again."""
        root = self.folder / "heatmaps"
        _share_all(root / _safe(source), root / _safe(version), "*/[!.]*.png")

    def shares_heatmap(self, source: str, version: str, image: str) -> bool:
        """Tell whether a version still shows another version's heatmap of an image."""
        before, path = self._heatmap(source, image), self._heatmap(version, image)
        return before.exists() and path.exists() and before.samefile(path)

    # -- failures

    def keep_failure(self, task: int, reason: str, image: str, *, permanent: bool) -> None:
        """Note why a task could not be scored."""
        known = self.failure(task)
        attempts = PERMANENT if permanent else (known.attempts + 1 if known and known.attempts >= 0 else 1)
        failure = Failure(task, " ".join(reason.split()), image[:500], attempts, time.time())
        path = self.folder / "failures" / f"{int(task)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(asdict(failure)).encode())

    def forget_failures(self, tasks: Iterator[int] | list[int]) -> None:
        """Forget failures of tasks that were scored after all, or are gone."""
        for task in tasks:
            (self.folder / "failures" / f"{int(task)}.json").unlink(missing_ok=True)

    def failure(self, task: int) -> Failure | None:
        """Return why a task could not be scored, None if nothing is known."""
        path = self.folder / "failures" / f"{int(task)}.json"
        return Failure(**_read_json(path)) if path.exists() else None

    def failing(self) -> frozenset[int]:
        """Return the ids of the tasks that could not be scored, without reading why."""
        folder = self.folder / "failures"
        names = os.listdir(folder) if folder.is_dir() else []
        return frozenset(int(name.removesuffix(".json")) for name in names if name[0].isdigit())

    def failures(self) -> list[Failure]:
        """Return all failures, by task."""
        found = [self.failure(task) for task in sorted(self.failing())]
        return [failure for failure in found if failure is not None]

    # -- paths

    def _pointer(self, name: str) -> str:
        path = self.folder / name
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            return ""

    def _record(self, version: str, task: int) -> Path:
        return self.folder / "records" / _safe(version) / str(int(task) // 1000) / f"{int(task)}.json"

    def _calmed(self, version: str) -> Path:
        return self.folder / "calmed" / _safe(version)

    def _heatmap(self, version: str, image: str) -> Path:
        return self._heatmap_file(version, image_key(image))

    def _heatmap_file(self, version: str, key: str) -> Path:
        return self.folder / "heatmaps" / _safe(version) / key[:2] / f"{key}.png"


def image_key(value: str) -> str:
    """Return the same key for an image's raw value and for what Label Studio's page makes of it.

    `s3://bucket/a.png` is shown as `/tasks/83/resolve/?fileuri=<base64>`, `/data/upload/…` with or without a host.
    """
    parts = urlsplit(value)
    path = parts.path
    if path.startswith("/tasks/") and "fileuri=" in parts.query:
        encoded = parse_qs(parts.query)["fileuri"][0]
        value = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode(errors="replace")
    elif "/data/upload/" in path or "/data/local-files/" in path:
        start = path.index("/data/")
        value = path[start:] + (f"?{parts.query}" if parts.query else "")
    return hashlib.sha256(value.encode()).hexdigest()[:40]


def _encode_map(anomaly_map: NDArray[np.float32]) -> bytes:
    levels = np.round(np.clip(anomaly_map, 0.0, 1.0) * 65535).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _decode_map(content: bytes) -> NDArray[np.float32]:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture, dtype=np.float32) / np.float32(65535)


def _encode_rows(rows: NDArray[np.float16]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


def _decode_rows(path: Path) -> NDArray[np.float16]:
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float16)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path} cannot be read: {error}. Restore it from a backup or remove it.") from error


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def _safe(name: str) -> str:
    if not name or name.startswith(".") or not all(letter.isalnum() or letter in "._-" for letter in name):
        raise StoreError(f"{name!r} is not a version name.")
    return name


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _read_json(path: Path) -> JSON:
    try:
        return cast(JSON, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}. Restore it from a backup or remove it.") from error


def _write(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    os.replace(scratch, path)


def share(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, a copy where the file system has no hard links; neither ever changes.

    Raises:
        FileNotFoundError: there is no `source`.
    """
    if target.exists():
        if source.samefile(target):
            return
        target.unlink()
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def _share_all(source: Path, target: Path, pattern: str) -> None:
    for path in source.glob(pattern):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # taken back meanwhile
            share(path, place)


def _write_once(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    try:
        os.link(scratch, path)  # unlike rename, fails when another process was first
    except FileExistsError:
        pass
    finally:
        scratch.unlink()
