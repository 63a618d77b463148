"""A moved threshold makes a version of the same weights that says what its detector would say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anomaly_workers import images, judging, policy
from anomaly_workers.detectors.regions import regions
from anomaly_workers.labelstudio import encode
from anomaly_workers.pictures import PictureCache
from anomaly_workers.runtime import Session
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.store import ProjectStore, Store, image_key
from anomaly_workers.types import JSON, Control, Controls, Detection, Picture, Task, no_progress

SIZE = (96, 128)
SCORES = {1: 0.2, 2: 0.45, 3: 0.55, 4: 0.9}
CONTROLS = Controls(
    image="image",
    value="image",
    choices=Control("Choices", "cls", "image", ("normal", "anomaly")),
    normal="normal",
    anomaly="anomaly",
    mask=Control("BrushLabels", "mask", "image", ("Defect",)),
    mask_label="Defect",
)


@dataclass
class LabelStudio:
    """The part of Label Studio that a move needs, in memory."""

    tasks: list[Task]
    held: list[JSON] = field(default_factory=list)
    shown: str = ""

    def open_tasks(self, _project: int) -> Iterator[Task]:
        return iter(self.tasks)

    def versions(self, _project: int) -> dict[str, int]:
        names = [one["model_version"] for one in self.held]
        return {name: names.count(name) for name in names}

    def prediction_counts(self, _project: int, version: str, *, tasks: list[int]) -> dict[int, int]:
        return {one["task"]: 1 for one in self.held if one["model_version"] == version and one["task"] in tasks}

    def import_predictions(self, _project: int, predictions: list[JSON]) -> list[Any]:
        self.held += predictions
        return []

    def set_model_version(self, _project: int, version: str) -> None:
        assert version in self.versions(0), "Label Studio takes no version without predictions"
        self.shown = version

    def delete_version(self, _project: int, version: str) -> int:
        assert self.shown != version, "the label stream would show no predictions"
        self.held = [one for one in self.held if one["model_version"] != version]
        return 0


class Redis:
    """Counters and locks of one process."""

    counted: dict[str, float]

    def __init__(self) -> None:
        self.counted = {}

    def hincrbyfloat(self, _key: str, name: str, amount: float) -> None:
        self.counted[name] = self.counted.get(name, 0.0) + amount

    @contextmanager
    def lock(self, _name: str, **_limits: float) -> Iterator[None]:
        yield


@dataclass
class Runtime:
    """What a worker keeps; it has no detector, so a network pass would fail."""

    settings: Settings
    opened: Session
    redis: Redis = field(default_factory=Redis)
    urgent: int = 0
    asked_again: int = 0

    @property
    def queues(self) -> Any:
        return SimpleNamespace(depth=lambda: {"interactive": self.urgent}, enqueue_threshold=self._again)

    def session(self, _project: int) -> Session:
        return self.opened

    def _again(self, _project: int) -> None:
        self.asked_again += 1


def anomaly_map(score: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A map with a wide plateau at 0.15 and a peak that has the score."""
    rows, columns = np.mgrid[:48, :64]
    away = np.hypot(rows - 20, columns - 30)
    return np.maximum(0.15, score - 0.02 * away).astype(np.float32)


def picture() -> Picture:
    return Picture(np.full((48, 64, 3), 90, np.uint8), size=SIZE)


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    """A project with one deployed version, which scored four tasks."""
    store = Store(tmp_path).project(3)
    tasks = [Task(task, {"image": f"/data/upload/3/{task}.png"}) for task in SCORES]
    client: Any = LabelStudio(tasks)
    pictures = PictureCache(tmp_path / "pictures", limit=1_000_000)
    fetcher: Any = None
    session = Session(store, client, fetcher, pictures, CONTROLS)
    card = {"detector": "patchcore", "kind": "bank", "threshold": 0.5, "target_fpr": 0.01, "image_size": 256}
    with store.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(b"weights")
        (scratch / "detector.json").write_text(json.dumps({"threshold": 0.5, "calibration": {"limit": 1, "unit": 1}}))
        version = store.publish(scratch, card | {"fit_seconds": 3.5, "tasks": [1, 2]})
    store.roll_out(version)
    for task in tasks:
        keep(session, version, task, SCORES[task.id])
        pictures.put(str(task.data["image"]), picture(), side=256)
    client.shown = version
    store.keep_calmed(version, 5, np.ones((2, 4), np.float16))
    return Runtime(load_settings({}, data_dir=tmp_path), session)


def keep(session: Session, version: str, task: Task, score: float) -> None:
    """Store and push what scoring stores and pushes."""
    detection = Detection(score, 0.5, anomaly_map(score), SIZE)
    prediction = encode.prediction(task.id, detection, regions(detection), CONTROLS, version)
    about = {"anomaly_score": score, "threshold": 0.5, "size": list(SIZE), "calmed": 0, "parts": []}
    about |= {"image": image_key(task.data["image"]), "controls": repr(CONTROLS)}
    hottest = np.ones((2, 4), np.float16)
    session.store.keep_record(version, task.id, prediction | {"anomaly": about}, detection.anomaly_map, hottest=hottest)
    session.store.keep_heatmap(version, str(task.data["image"]), images.heatmap(picture(), detection.anomaly_map, 0.5))
    session.client.import_predictions(session.store.id, [prediction])


def move(runtime: Runtime, threshold: float) -> dict[str, int | str]:
    policy.change(runtime.opened.store, {"rule": "number", "value": threshold})
    done: dict[str, int | str] = judging.threshold(runtime, no_progress, project=3)  # type: ignore[arg-type]
    return done


def label_studio(runtime: Runtime) -> LabelStudio:
    client: Any = runtime.opened.client
    return client  # type: ignore[no-any-return]


def changed(store: ProjectStore, version: str, task: int, **about: Any) -> None:
    """Change what is known of a record."""
    record = store.record(version, task)
    stored = store.anomaly_map(version, task)
    assert record is not None
    assert stored is not None
    known = {name: value for name, value in (record["anomaly"] | about).items() if value is not None}
    store.keep_record(version, task, record | {"anomaly": known}, stored)


@pytest.mark.parametrize("threshold", [0.3, 0.5001, 0.7, 0.95])
def test_every_prediction_is_what_a_detector_with_that_threshold_would_say(runtime: Runtime, threshold: float) -> None:
    store, first = runtime.opened.store, runtime.opened.store.current

    done = move(runtime, threshold)

    version, client = store.current, label_studio(runtime)
    assert version != first
    assert done["pushed"] == 4
    assert client.shown == version
    assert {one["model_version"] for one in client.held} == {version}
    for prediction in client.held:
        stored = store.anomaly_map(first, prediction["task"])
        assert stored is not None
        said = Detection(SCORES[prediction["task"]], threshold, stored, SIZE)
        assert prediction == encode.prediction(prediction["task"], said, regions(said), CONTROLS, version)
        assert store.is_pushed(version, prediction["task"])
    assert runtime.redis.counted == {"predictions_pushed": 4}, "no image was scored"


def test_the_new_version_has_the_weights_of_its_family_and_a_card_of_its_own(runtime: Runtime) -> None:
    store, first = runtime.opened.store, runtime.opened.store.current
    move(runtime, 0.7)
    second = store.current
    move(runtime, 0.3)
    third = store.current

    cards = [store.card(version) for version in (first, second, third)]
    assert [card["number"] for card in cards] == [1, 2, 3]
    assert [card.get("parent") for card in cards] == [None, first, second]
    assert [card.get("weights_of") for card in cards] == [None, first, first]
    assert [card["kind"] for card in cards] == ["bank", "threshold", "threshold"]
    assert (cards[2]["rule"], cards[2]["value"], cards[2]["threshold"]) == ("number", 0.3, 0.3)
    assert cards[2]["tasks"] == [1, 2]
    assert "fit_seconds" not in cards[2]
    assert "0.7000 -> 0.3000" in cards[2]["decision"]["reason"]
    weights = [store.version_folder(version) / "detector.safetensors" for version in (first, second, third)]
    assert weights[0].samefile(weights[2])
    assert json.loads((store.version_folder(third) / "detector.json").read_text())["threshold"] == 0.3
    assert json.loads((store.version_folder(first) / "detector.json").read_text())["threshold"] == 0.5


def test_what_was_calmed_stays_calm_and_look_alikes_are_still_found(runtime: Runtime) -> None:
    store, first = runtime.opened.store, runtime.opened.store.current
    move(runtime, 0.7)

    assert store.calmed(store.current) == store.calmed(first) == (5,)
    assert np.array_equal(store.calmed_patches(store.current, [5]), store.calmed_patches(first, [5]))
    assert [task for task, _ in store.hottest(store.current)] == [1, 2, 3, 4]


def test_the_same_threshold_again_changes_nothing(runtime: Runtime) -> None:
    store, first = runtime.opened.store, runtime.opened.store.current

    assert move(runtime, 0.5) == {"drawn": 0}

    assert store.current == first
    assert len(store.versions()) == 1


def test_back_to_a_threshold_that_was_rolled_back_uses_its_version_again(runtime: Runtime) -> None:
    store, first = runtime.opened.store, runtime.opened.store.current
    move(runtime, 0.7)
    second = store.current
    store.deploy(first, reason="rolled back")

    move(runtime, 0.7)

    assert store.current == second
    assert len(store.versions()) == 2


def test_a_move_waits_for_another_versions_rollout(runtime: Runtime) -> None:
    store, first = runtime.opened.store, runtime.opened.store.current
    with store.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(b"other")
        other = store.publish(scratch, {"detector": "patchcore", "kind": "bank", "threshold": 0.5})
    store.roll_out(other)

    assert "waiting" in move(runtime, 0.7)

    assert (store.current, store.rollout) == (first, other)


def test_a_move_that_was_cut_off_is_finished_by_the_next(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    store, client = runtime.opened.store, label_studio(runtime)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ProjectStore, "deploy", _killed)
        move(runtime, 0.7)
    assert store.rollout

    move(runtime, 0.7)

    assert store.card(store.current)["threshold"] == 0.7
    assert len(store.versions()) == 2
    assert client.versions(3) == {store.current: 4}


def test_another_image_or_a_lost_map_is_left_to_be_scored(runtime: Runtime) -> None:
    store, client = runtime.opened.store, label_studio(runtime)
    client.tasks[0] = replace(client.tasks[0], data={"image": "/data/upload/3/new.png"})
    (store.folder / "records" / store.current / "0/4.png").unlink()

    move(runtime, 0.3)

    assert {one["task"] for one in client.held} == {2, 3}
    assert store.record(store.current, 1) is None
    assert store.record(store.current, 4) is None


def test_records_of_earlier_releases_take_the_size_from_their_regions_or_the_kept_picture(runtime: Runtime) -> None:
    store, client = runtime.opened.store, label_studio(runtime)
    for task in (2, 4):
        changed(store, store.current, task, size=None)

    move(runtime, 0.3)

    sizes = {
        (region["original_height"], region["original_width"])
        for one in client.held
        for region in one["result"]
        if region["type"] == "brushlabels"
    }
    assert sizes == {SIZE}
    assert {one["task"] for one in client.held} == {1, 2, 3, 4}


def test_outlines_follow_and_maps_without_any_stay_as_they_are(runtime: Runtime) -> None:
    store, first = runtime.opened.store, runtime.opened.store.current

    assert move(runtime, 0.3)["drawn"] == 3

    for task in label_studio(runtime).tasks:
        image = str(task.data["image"])
        stored, path = store.anomaly_map(first, task.id), store.heatmap(image)
        assert stored is not None
        assert path is not None
        assert store.shares_heatmap(first, store.current, image) is (SCORES[task.id] < 0.3)
        if SCORES[task.id] >= 0.3:
            assert path.read_bytes() == images.heatmap(picture(), stored, 0.3)


def test_drawing_steps_aside_for_urgent_work_and_goes_on_later(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "DRAWN_BETWEEN", 1)
    runtime.urgent = 1
    assert move(runtime, 0.3)["drawn"] == 1  # not stopped by task 1, which has no outline
    assert runtime.asked_again == 1

    runtime.urgent = 0
    assert move(runtime, 0.3) == {"drawn": 2}
    assert runtime.asked_again == 1


def test_two_projects_that_wait_for_each_other_both_end(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "DRAWN_BETWEEN", 1)
    runtime.urgent = 1
    drawn = [move(runtime, 0.3)["drawn"] for _ in range(5)]

    assert drawn == [1, 1, 1, 0, 0]
    assert runtime.asked_again == 3


def _killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
