"""The front end answers what Label Studio really sends, from a real Redis, at once."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from anomaly_backend.app import create_app
from anomaly_backend.dispatch import PENDING, Dispatcher
from anomaly_workers import queues, server
from anomaly_workers.queues import Queues
from anomaly_workers.settings import load_settings
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import Connection

CONFIG = """<View><Image name="image" value="$image"/>
<Choices name="verdict" toName="image"><Choice value="Normal"/><Choice value="Anomaly"/></Choices>
<BrushLabels name="mask" toName="image"><Label value="Defect"/></BrushLabels></View>"""
Recorded = Callable[[str], dict[str, Any]]


def project_of(body: dict[str, Any]) -> int:
    return int(body["project"]["id"])


class FrontEnd:
    """A front end with its store, asked as Label Studio asks."""

    def __init__(self, folder: Path) -> None:
        self.settings = load_settings({}, data_dir=folder, password="pass")
        self.queues = Queues(queues.connect(server.ensure(self.settings)), self.settings)
        self.dispatcher = Dispatcher(Store(folder), self.queues, self.settings)
        self.client: FlaskClient = create_app(self.settings, self.dispatcher).test_client()

    def post(self, path: str, body: Any) -> TestResponse:
        return self.client.post(path, json=body, auth=("label-studio", "pass"))

    def connected(self, project: int) -> ProjectStore:
        store = self.dispatcher.store.project(project)
        store.connect(Connection(url="http://label-studio", project=project, token="secret"))
        store.keep_label_config(CONFIG)
        return store

    def with_version(self, project: int) -> tuple[ProjectStore, str]:
        store = self.connected(project)
        with store.new_version() as scratch:
            (scratch / "detector.safetensors").write_bytes(b"weights")
            version = store.publish(scratch, {"detector": "patchcore"})
        store.roll_out(version)
        return store, version


@pytest.fixture
def front(tmp_path: Path) -> Iterator[FrontEnd]:
    front = FrontEnd(tmp_path)
    yield front
    front.queues.connection.close()
    server.stop(front.settings)


def test_importing_the_front_end_loads_no_torch() -> None:
    code = "import sys, anomaly_backend.app; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", ["/setup", "/predict", "/webhook", "/versions", "/metrics", "/", "/nowhere"])
def test_nobody_gets_in_without_the_password(front: FrontEnd, path: str) -> None:
    for headers in (
        {},
        {"Authorization": "Basic " + base64.b64encode(b"label-studio:wrong").decode()},
        {"Authorization": "Bearer pass"},
        {"Authorization": "Basic ?"},
    ):
        assert front.client.open(path, method="POST", json={}, headers=headers).status_code == 401


def test_health_is_open_and_says_up(front: FrontEnd) -> None:
    assert front.client.get("/health").json["status"] == "UP"  # type: ignore[index]


def test_setup_names_a_version_even_before_there_is_one(front: FrontEnd, recorded: Recorded) -> None:
    body = recorded("setup_register")
    assert front.post("/setup", body).json == {"model_version": PENDING}


def test_setup_names_the_deployed_version(front: FrontEnd, recorded: Recorded) -> None:
    body = recorded("setup_register")
    _, version = front.with_version(int(str(body["project"]).split(".")[0]))
    assert front.post("/setup", body).json == {"model_version": version}


def test_a_task_that_is_not_scored_is_answered_empty_and_queued_first(front: FrontEnd, recorded: Recorded) -> None:
    body = recorded("predict_task_open")
    front.with_version(3)
    assert front.post("/predict", body).json == {"results": [[]]}
    assert front.queues.depth() == {"interactive": 1, "score": 0, "learn": 0}


def test_a_scored_task_is_answered_with_the_deployed_version(front: FrontEnd, recorded: Recorded) -> None:
    body = recorded("predict_task_open")
    store, version = front.with_version(3)
    record = {"task": 69, "model_version": version, "score": 0.25, "result": [{"id": "a"}], "anomaly": {}}
    store.keep_record(version, 69, record, np.zeros((4, 4), np.float32))
    assert front.post("/predict", body).json == {"results": [[]]}, "not in Label Studio yet: the worker pushes it"
    store.mark_pushed(version, {69: True})
    answer = front.post("/predict", body).json
    assert answer == {"results": [{"result": [{"id": "a"}], "score": 0.25, "model_version": version}]}


def test_the_answers_keep_the_order_of_the_tasks(front: FrontEnd) -> None:
    store, version = front.with_version(3)
    for task in (1, 3):
        store.keep_record(version, task, {"score": task / 10, "result": [], "model_version": version}, np.zeros((1, 1)))
        store.mark_pushed(version, {task: True})
    tasks = [{"id": task, "data": {"image": f"/{task}.png"}} for task in (3, 2, 1)]
    results = front.post("/predict", {"tasks": tasks, "project": "3.1", "label_config": CONFIG}).json["results"]  # type: ignore[index]
    assert [result and result["score"] for result in results] == [0.3, [], 0.1]


def test_created_tasks_are_scored_on_arrival(front: FrontEnd, recorded: Recorded) -> None:
    body = recorded("webhook_TASKS_CREATED_import")
    front.with_version(project_of(body))
    assert front.post("/webhook", body).status_code == 201
    assert front.queues.depth()["score"] == 1


def test_the_first_tasks_of_a_project_start_a_fit(front: FrontEnd, recorded: Recorded) -> None:
    body = recorded("webhook_TASKS_CREATED_import")
    front.connected(project_of(body))
    front.post("/webhook", body)
    front.post("/webhook", body)
    assert front.queues.depth() == {"interactive": 0, "score": 0, "learn": 1}


def test_start_training_returns_its_job(front: FrontEnd, recorded: Recorded) -> None:
    body = recorded("webhook_START_TRAINING_button")
    front.connected(project_of(body))
    assert front.post("/webhook", body).json["job"].startswith("fit-")  # type: ignore[index]


def test_an_annotation_event_that_comes_five_times_is_one_look(front: FrontEnd, recorded: Recorded) -> None:
    body = recorded("webhook_ANNOTATION_CREATED")
    front.connected(project_of(body))
    answers = {front.post("/webhook", body).json["job"] for _ in range(5)}  # type: ignore[index]
    assert len(answers) == 1
    assert front.queues.depth() == {"interactive": 1, "score": 0, "learn": 0}


def test_every_recorded_webhook_is_taken(front: FrontEnd, shared: Path, recorded: Recorded) -> None:
    front.with_version(3)
    for path in sorted((shared / "label_studio" / "payloads").glob("webhook_*.json")):
        assert front.post("/webhook", recorded(path.stem)).status_code == 201, path.stem


def test_a_webhook_of_a_stranger_project_leaves_no_trace(front: FrontEnd, recorded: Recorded) -> None:
    assert front.post("/webhook", recorded("webhook_TASKS_CREATED_import")).status_code == 201
    assert front.queues.jobs() == []
    assert front.dispatcher.store.projects() == []


@pytest.mark.parametrize("body", [[], "text", None, {}, {"project": "x"}, {"project": 3, "tasks": "none"}])
def test_rubbish_gets_a_reason(front: FrontEnd, body: Any) -> None:
    for path in ("/setup", "/predict", "/webhook"):
        answer = front.post(path, body)
        assert answer.status_code in (200, 400), path
        assert answer.status_code == 200 or answer.json["error"]  # type: ignore[index]


def test_a_webhook_with_5000_tasks_is_answered_at_once(front: FrontEnd, recorded: Recorded) -> None:
    body = recorded("webhook_TASKS_CREATED_import")
    project = project_of(body)
    _, version = front.with_version(project)
    body["tasks"] = [
        body["tasks"][0] | {"id": number, "data": {"image": f"/data/upload/3/{number}.jpg"}}
        for number in range(1, 5001)
    ]
    started = time.monotonic()
    answer = front.post("/webhook", body)
    print(f"5,000 tasks: {time.monotonic() - started:.3f} s")
    assert answer.status_code == 201
    assert len(front.queues.busy(project, version)) == 5000


def test_a_heatmap_is_served_to_whoever_has_its_address(front: FrontEnd) -> None:
    store, version = front.with_version(3)
    store.keep_heatmap(version, "/data/upload/3/a b.jpg", b"\x89PNGpicture")
    token = front.dispatcher.store.heatmap_token(3)
    answer = front.client.get(f"/heatmap/3/{token}?src=/data/upload/3/a%20b.jpg")
    assert answer.data == b"\x89PNGpicture"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert front.client.get("/heatmap/3/guess?src=/data/upload/3/a%20b.jpg").status_code == 404


def test_a_pending_heatmap_is_a_picture_that_is_not_cached(front: FrontEnd) -> None:
    front.with_version(3)
    token = front.dispatcher.store.heatmap_token(3)
    answer = front.client.get(f"/heatmap/3/{token}?src=/data/upload/3/new.jpg")
    assert answer.data.startswith(b"\x89PNG")
    assert answer.headers["Cache-Control"] == "no-store"


def test_metrics_are_in_prometheus_format(front: FrontEnd) -> None:
    front.with_version(3)
    text = front.client.get("/metrics", auth=("label-studio", "pass")).text
    assert 'anomaly_queue_jobs{queue="score"} 0.0' in text
    assert "anomaly_images_scored_total 0.0" in text


def test_a_click_returns_the_defect_around_it(front: FrontEnd, recorded: Recorded) -> None:
    store, version = front.with_version(3)
    anomaly_map = np.full((64, 64), 0.1, np.float32)
    anomaly_map[8:16, 40:56] = 0.9
    body = recorded("predict_interactive")
    task = int(body["tasks"][0]["id"])
    store.keep_record(version, task, {"score": 0, "result": [], "model_version": version}, anomaly_map)
    click = {
        "original_width": 128,
        "original_height": 128,
        "from_name": "k",
        "to_name": "image",
        "type": "keypointlabels",
        "value": {"x": 75.0, "y": 18.0, "width": 0.3, "keypointlabels": ["Defect"]},
    }
    body["params"]["context"] = {"result": [click]}
    body["label_config"] = CONFIG
    (answer,) = front.post("/predict", body).json["results"]  # type: ignore[index]
    assert [region["from_name"] for region in answer["result"]] == ["mask"]
