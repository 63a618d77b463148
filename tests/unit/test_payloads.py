"""Every recorded request of Label Studio 1.23.2 is read; rubbish is refused with a reason."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import payloads
from anomaly_workers.types import Task

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "payloads/recorded.json").read_text())


def body(name: str) -> Any:
    return RECORDED[name]["body"]


@pytest.mark.parametrize("name", [name for name in RECORDED if name.startswith("webhook")])
def test_every_recorded_event_is_read(name: str) -> None:
    found = payloads.event(body(name))
    assert found.action == body(name)["action"]
    assert found.project == body(name)["project"]["id"]
    assert found.label_config.startswith("<View")


@pytest.mark.parametrize("name", [name for name in RECORDED if name.startswith("setup")])
def test_every_recorded_set_up_is_read(name: str) -> None:
    found = payloads.setup(body(name))
    assert str(found.project) == body(name)["project"].split(".")[0]
    assert "<Image" in found.label_config


@pytest.mark.parametrize("name", [name for name in RECORDED if name.startswith("predict")])
def test_every_recorded_prediction_request_is_read(name: str) -> None:
    found = payloads.predict(body(name))
    assert [task.id for task in found.tasks] == [task["id"] for task in body(name)["tasks"]]
    assert all(task.data for task in found.tasks)
    assert (found.context is not None) == (name == "predict_interactive")


def test_bulk_annotations_come_as_lists() -> None:
    found = payloads.event(body("webhook_ANNOTATIONS_CREATED_bulk"))
    assert found.annotations == (5,)
    assert found.tasks == (Task(69, {"image": "http://localhost:9099/x.png", "i": 0}),)


def test_deleted_annotations_name_no_task() -> None:
    found = payloads.event(body("webhook_ANNOTATIONS_DELETED"))
    assert found.annotations
    assert found.tasks == ()


def test_deleted_tasks_have_ids_alone() -> None:
    assert payloads.event(body("webhook_TASKS_DELETED")).tasks[0].data == {}


def test_a_skip_is_told_from_an_annotation() -> None:
    found = payloads.event(body("webhook_ANNOTATION_CREATED_skip"))
    assert found.cancelled == found.annotations
    assert payloads.event(body("webhook_ANNOTATION_CREATED")).cancelled == ()


def test_an_updated_annotation_has_the_time_that_tells_repeats() -> None:
    assert payloads.event(body("webhook_ANNOTATION_UPDATED_patch")).updated_at.startswith("2026-")


def test_a_training_request_has_no_tasks() -> None:
    found = payloads.event(body("webhook_START_TRAINING_button"))
    assert (found.action, found.tasks, found.annotations) == ("START_TRAINING", (), ())


RUBBISH: list[Any] = [
    None,
    [],
    "x",
    3,
    {},
    {"action": 1},
    {"action": "X"},
    {"action": "X", "project": []},
    {"action": "X", "project": {"id": "drop table"}},
    {"action": "X", "project": {"id": True}},
    {"action": "X", "project": {"id": 1}, "tasks": [{"id": None}]},
    {"action": "X", "project": {"id": 1}, "tasks": [{"data": {}}]},
    {"action": "X", "project": {"id": 1}, "annotation": {"task": 3}},
    {"action": "X", "project": {"id": 1}, "annotation": {"id": 3, "task": "x"}},
    {"project": "1.5", "tasks": None},
    {"project": "x", "tasks": []},
    {"project": "1", "tasks": [None]},
    {"project": "1", "tasks": [{"id": -1}]},
    {"project": "9" * 40, "tasks": []},
]


@pytest.mark.parametrize("rubbish", RUBBISH)
@pytest.mark.parametrize("read", [payloads.event, payloads.predict, payloads.setup])
def test_rubbish_is_refused_with_a_reason_or_read_as_nothing(read: Any, rubbish: Any) -> None:
    with contextlib.suppress(ConfigError):
        assert read(rubbish).project > 0


def test_odd_fields_are_ignored() -> None:
    found = payloads.predict({"project": 7, "tasks": [{"id": 1, "data": []}], "params": [], "label_config": 5})
    assert found == payloads.Predict(7, (Task(1, {}),), "", None)
