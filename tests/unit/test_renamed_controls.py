"""A label config that changed after its tasks were scored: predictions follow without the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from anomaly_workers import push, scoring, sweep
from anomaly_workers.client import Client
from anomaly_workers.detectors.regions import regions
from anomaly_workers.labelstudio import config, encode
from anomaly_workers.runtime import Runtime, Session
from anomaly_workers.store import ProjectStore, Store, image_key
from anomaly_workers.types import JSON, Detection, Task, no_progress

BEFORE = (
    '<View><Image name="i" value="$image"/><BrushLabels name="m" toName="i"><Label value="Defect"/></BrushLabels>'
    "</View>"
)
AFTER = BEFORE.replace("BrushLabels", "PolygonLabels").replace('"m"', '"outline"').replace("Defect", "Fehler")
TASKS = [Task(number, {"image": f"/data/upload/1/{number}.png"}) for number in (1, 2, 3)]


@pytest.fixture
def store(tmp_path: Path) -> ProjectStore:
    """Three tasks, scored with the config as it was."""
    store = Store(tmp_path).project(1)
    store.keep_label_config(BEFORE)
    with store.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(b"weights")
        version = store.publish(scratch, {"detector": "patchcore", "image_size": 256})
    store.roll_out(version)
    controls = config.parse(BEFORE)
    anomaly_map = np.full((32, 32), 0.1, np.float32)
    anomaly_map[8:20, 8:20] = 0.8
    detection = Detection(0.8, 0.5, anomaly_map, (64, 64))
    for task in TASKS:
        prediction = encode.prediction(task.id, detection, regions(detection), controls, version)
        about = {"anomaly_score": 0.8, "threshold": 0.5, "size": [64, 64], "controls": repr(controls), "calmed": 0}
        about["image"] = image_key(task.data["image"])
        hottest = np.ones((2, 4), np.float16)
        store.keep_record(version, task.id, prediction | {"anomaly": about}, anomaly_map, hottest=hottest)
    return store


class OpenTasks:
    """A Label Studio that only lists."""

    def __init__(self) -> None:
        self.asked = 0

    def open_tasks(self, _project: int) -> Iterator[Task]:
        self.asked += 1
        return iter(TASKS)


def session_of(store: ProjectStore, xml: str) -> Session:
    return cast("Session", SimpleNamespace(store=store, client=None, controls=config.parse(xml)))


def test_predictions_of_a_changed_config_are_found_once(store: ProjectStore) -> None:
    listing = OpenTasks()
    client = cast("Client", listing)
    assert sweep.misnamed(client, store, store.target, config.parse(BEFORE)) == []
    assert sweep.misnamed(client, store, store.target, config.parse(BEFORE)) == []
    assert listing.asked == 1
    assert sweep.misnamed(client, store, store.target, config.parse(AFTER)) == TASKS
    for task in TASKS:
        record = scoring.re_encoded(session_of(store, AFTER), store.current, task)
        assert record is not None
        store.derive_record(store.current, task.id, record)
    assert sweep.misnamed(client, store, store.target, config.parse(AFTER)) == []


def test_the_stored_map_is_put_into_the_new_names(store: ProjectStore) -> None:
    record = scoring.re_encoded(session_of(store, AFTER), store.current, TASKS[0])
    assert record is not None
    [region] = record["result"]
    assert (region["from_name"], region["type"]) == ("outline", "polygonlabels")
    assert region["value"]["polygonlabels"] == ["Fehler"]
    assert (region["original_width"], region["original_height"]) == (64, 64)
    assert record["score"] == store.record(store.current, 1)["score"]  # type: ignore[index]


def test_another_image_is_not_taken_for_the_same(store: ProjectStore) -> None:
    other = Task(1, {"image": "/data/upload/1/other.png"})
    assert scoring.re_encoded(session_of(store, AFTER), store.current, other) is None


def test_scoring_replaces_them_without_the_network(store: ProjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[JSON] = []

    def taken(_redis: object, _client: object, _store: object, _version: str, items: Sequence[JSON]) -> list[int]:
        sent.extend(items)
        return [int(item["task"]) for item in items]

    def refused(*_: object, **__: object) -> Any:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(push, "replacements", taken)
    monkeypatch.setattr(push, "predictions", lambda *given: len(given[-1]))
    monkeypatch.setattr(scoring, "count", lambda *_: None)
    runtime = SimpleNamespace(session=lambda _project: session_of(store, AFTER), redis=None, detector=refused)
    tasks = [{"id": task.id, "data": dict(task.data)} for task in TASKS]
    done: Mapping[str, Any] = scoring.score(
        cast("Runtime", runtime), no_progress, project=1, version=store.current, tasks=tasks
    )
    assert done == {"scored": 3, "pushed": 3, "failed": 0}
    assert {item["task"] for item in sent} == {1, 2, 3}
    assert all("anomaly" not in item and item["result"][0]["from_name"] == "outline" for item in sent)
    kept = store.record(store.current, 1)
    assert kept is not None
    assert kept["anomaly"]["controls"] == repr(config.parse(AFTER))
    assert len(list(store.hottest(store.current))) == 3, "what look-alikes are found by stays"
