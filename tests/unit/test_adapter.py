"""The adapter gives the own front end's answers through both generations of label-studio-ml.

The library is replaced by its contract: what its servers pass to the model's constructor, `predict` and `fit`.
The real 1.0.9 is in tests/e2e/test_label_studio_ml.py; 2.x is not on PyPI.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flask import Flask, jsonify, request
from flask.testing import FlaskClient

from anomaly_backend.app import create_app
from anomaly_backend.dispatch import PENDING, Dispatcher
from anomaly_workers import server
from anomaly_workers.settings import load_settings
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import Connection

CONFIG = """<View><Image name="image" value="$image"/>
<Choices name="verdict" toName="image"><Choice value="Normal"/><Choice value="Anomaly"/></Choices></View>"""
Recorded = Callable[[str], dict[str, Any]]


class Base1:
    """The constructor of 1.0.9."""

    TRAIN_EVENTS = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATION_DELETED", "PROJECT_UPDATED")

    def __init__(self, label_config: Any = None, train_output: Any = None, **kwargs: Any) -> None:
        self.label_config = label_config
        self.train_output = train_output or {}
        self.hostname = kwargs.get("hostname", "")

    def process_event(self, event: str, data: Any, job_id: str, params: Any) -> Any:
        return self.fit((), event=event, data=data, job_id=job_id, **params) if event in self.TRAIN_EVENTS else None

    def fit(self, tasks: Any, workdir: Any = None, **kwargs: Any) -> Any:
        return {}


class Base2:
    """The constructor of 2.x, and its cache per project."""

    cache: dict[tuple[str, str], str]

    def __init__(self, project_id: Any = None, label_config: Any = None) -> None:
        self.project_id = project_id or ""
        if label_config is not None:
            self.set("label_config", label_config)
        if not self.get("model_version"):
            self.set("model_version", "0.0.1")
        self.setup()

    def setup(self) -> None:
        pass

    def get(self, key: str) -> str | None:
        return self.cache.get((self.project_id, key))

    def set(self, key: str, value: str) -> None:
        self.cache[self.project_id, key] = value

    @property
    def label_config(self) -> str | None:
        return self.get("label_config")


def serve1(model_class: Any) -> Flask:
    """1.0.9: one model for all projects, made anew at /setup; a webhook makes one more, in another process."""
    app, current = Flask("1.0.9"), {}

    @app.post("/setup")
    def setup() -> Any:
        body = request.get_json()
        known = {"hostname": body["hostname"], "access_token": body["access_token"], "model_version": None}
        current["model"] = model_class(label_config=body["schema"], **known)
        return jsonify({"model_version": "INITIAL"})

    @app.post("/predict")
    def predict() -> Any:
        body = request.get_json()
        return jsonify({"results": current["model"].predict(body["tasks"], **body["params"]), "model_version": "x"})

    @app.post("/webhook")
    def webhook() -> Any:
        data = request.get_json()
        event = data.pop("action")
        model = model_class(label_config=data["project"]["label_config"], train_output=None)
        return jsonify({"result": model.process_event(event, data, "1795346383", {"workdir": "."})})

    return app


def serve2(model_class: Any) -> Flask:
    """2.x: a model for each request, and a fixed list of events."""
    app = Flask("2.x")

    @app.post("/setup")
    def setup() -> Any:
        body = request.get_json()
        model = model_class(project_id=body["project"].split(".", 1)[0], label_config=body["schema"])
        return jsonify({"model_version": model.get("model_version")})

    @app.post("/predict")
    def predict() -> Any:
        body = request.get_json()
        params = body["params"]
        context = params.pop("context", {})
        model = model_class(project_id=str(body["project"]).split(".", 1)[0], label_config=body["label_config"])
        return jsonify({"results": model.predict(body["tasks"], context=context, **params)})

    @app.post("/webhook")
    def webhook() -> Any:
        data = request.get_json()
        event = data.pop("action")
        if event not in ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATION_DELETED", "START_TRAINING"):
            return jsonify({"status": "Unknown event"})
        model = model_class(str(data["project"]["id"]), label_config=data["project"]["label_config"])
        return jsonify({"result": model.fit(event, data), "status": "ok"})

    return app


class Served:
    """The adapter behind one generation of the library, and the own front end on the same store and Redis."""

    def __init__(self, module: ModuleType, serve: Callable[[Any], Flask]) -> None:
        self.module = module
        self.client: FlaskClient = serve(module.AnomalyBackend).test_client()

    @property
    def dispatcher(self) -> Dispatcher:
        found: Dispatcher = self.module._dispatcher(os.getpid())
        return found

    def post(self, path: str, body: Any) -> Any:
        response = self.client.post(path, json=body)
        assert response.status_code == 200
        return response.json

    def own(self, path: str, body: Any) -> Any:
        app = create_app(self.dispatcher.settings, self.dispatcher)
        return app.test_client().post(path, json=body, auth=("label-studio", "pass")).json

    def with_version(self, project: int) -> tuple[ProjectStore, str]:
        store = self.dispatcher.store.project(project)
        store.connect(Connection(url="http://label-studio", project=project, token="secret"))
        store.keep_label_config(CONFIG)
        with store.new_version() as scratch:
            (scratch / "detector.safetensors").write_bytes(f"weights of project {project}".encode())
            version = store.publish(scratch, {"detector": "patchcore"})
        store.roll_out(version)
        return store, version


@pytest.fixture(params=[(Base1, serve1), (Base2, serve2)], ids=["1.0.9", "2.x"])
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    base, serve = request.param
    monkeypatch.setattr(Base2, "cache", {}, raising=False)
    monkeypatch.setenv("ANOMALY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ANOMALY_PASSWORD", "pass")
    library = ModuleType("label_studio_ml.model")
    library.LabelStudioMLBase = base  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "label_studio_ml", ModuleType("label_studio_ml"))
    monkeypatch.setitem(sys.modules, "label_studio_ml.model", library)
    spec = find_spec("anomaly_backend.label_studio_ml")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    yield Served(module, serve)
    if module._dispatcher.cache_info().currsize:
        module._dispatcher(os.getpid()).queues.connection.close()
    server.stop(load_settings())


def score(store: ProjectStore, version: str, task: int) -> dict[str, Any]:
    """Keep a record of a task as a worker does, already in Label Studio."""
    record = {"task": task, "result": [{"task": task}], "score": 0.25, "model_version": version}
    store.keep_record(version, task, record | {"anomaly": {}}, np.zeros((4, 4), dtype=np.float32))
    store.mark_pushed(version, {task: True})
    return {name: record[name] for name in ("result", "score", "model_version")}


def test_importing_and_making_a_model_opens_nothing(served: Served, tmp_path: Path) -> None:
    served.module.AnomalyBackend()
    assert list(tmp_path.iterdir()) == []
    assert served.module._dispatcher.cache_info().currsize == 0


def test_setup_names_the_version_that_predictions_carry(served: Served, recorded: Recorded) -> None:
    body = recorded("setup_register")
    assert served.post("/setup", body) == {"model_version": PENDING}
    _, version = served.with_version(int(body["project"].split(".")[0]))
    assert served.post("/setup", body) == {"model_version": version} == served.own("/setup", body)


def test_a_pending_task_is_answered_empty_and_queued_first(served: Served, recorded: Recorded) -> None:
    body = recorded("predict_task_open")
    served.with_version(3)
    served.post("/setup", recorded("setup_register"))
    assert served.post("/predict", body)["results"] == [[]]
    assert served.dispatcher.queues.depth()["interactive"] == 1


def test_a_batch_keeps_its_order_with_scored_and_pending_tasks(served: Served, recorded: Recorded) -> None:
    body = recorded("predict_retrieve_batch") | {"project": "3.1795346383"}
    body["tasks"] = [{"id": task, "project": 3, "data": {"image": f"/{task}.png"}} for task in (11, 12, 13)]
    store, version = served.with_version(3)
    known = score(store, version, 12)
    served.post("/setup", recorded("setup_register"))
    assert served.post("/predict", body)["results"] == [[], known, []] == served.own("/predict", body)["results"]


def test_projects_in_one_process_do_not_mix(served: Served, recorded: Recorded) -> None:
    first, of_first = served.with_version(3)
    second, of_second = served.with_version(4)
    known = [score(first, of_first, 11), score(second, of_second, 12)]
    setup = recorded("setup_register")
    for project, version in ((3, of_first), (4, of_second)):
        assert served.post("/setup", setup | {"project": f"{project}.1795346383"}) == {"model_version": version}
    body = recorded("predict_task_open")
    body["tasks"] = [
        {"id": task, "project": project, "data": {"image": "/a.png"}} for project, task in ((3, 11), (4, 12), (4, 11))
    ]
    assert served.post("/predict", body)["results"] == [*known, []]


def test_an_interactive_request_is_not_taken_for_a_pending_task(served: Served, recorded: Recorded) -> None:
    served.with_version(3)
    served.post("/setup", recorded("setup_register"))
    body = recorded("predict_interactive")
    assert body["params"]["context"]
    assert served.post("/predict", body)["results"] == [[]]
    assert served.dispatcher.queues.depth()["interactive"] == 0


def test_start_training_queues_a_fit(served: Served, recorded: Recorded) -> None:
    body = recorded("webhook_START_TRAINING_button")
    served.with_version(body["project"]["id"])
    answer = served.post("/webhook", body)["result"]
    assert answer["job"] == served.dispatcher.queues.jobs()[0].id
    assert served.dispatcher.queues.depth()["learn"] == 1


@pytest.mark.parametrize("name", ["webhook_ANNOTATION_CREATED", "webhook_ANNOTATION_UPDATED_patch"])
def test_an_annotation_is_taken_like_the_own_front_end_takes_it(served: Served, recorded: Recorded, name: str) -> None:
    served.with_version(recorded(name)["project"]["id"])
    assert served.post("/webhook", recorded(name))["result"] == served.own("/webhook", recorded(name))


def test_new_tasks_are_queued_on_arrival_unless_2x_swallows_the_event(served: Served, recorded: Recorded) -> None:
    body = recorded("webhook_TASKS_CREATED_import")
    served.with_version(body["project"]["id"])
    answer = served.post("/webhook", body)
    assert (answer == {"status": "Unknown event"}) == (served.client.application.name == "2.x")
    assert (served.dispatcher.queues.depth()["score"] == 0) == (served.client.application.name == "2.x")


def test_a_forked_process_gets_connections_of_its_own(served: Served) -> None:
    assert served.module._dispatcher(1) is not served.module._dispatcher(os.getpid())
    served.module._dispatcher(1).queues.connection.close()


def test_the_store_is_that_of_the_own_front_end(served: Served, tmp_path: Path) -> None:
    assert served.dispatcher.store.root == Store(tmp_path).root
