"""The adapter, served by the real label-studio-ml 1.0.9 in a venv of its own, to a real Label Studio."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from anomaly_workers import counters, queues, sample, server
from anomaly_workers.client import Client
from anomaly_workers.instance import Instance
from anomaly_workers.settings import Settings, load_settings, to_environ
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.supervisor import Supervisor
from anomaly_workers.tokens import TokenAuth

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / ".venv-label-studio-ml" / "bin"
IMAGES = 12
PATIENCE = 240.0
CONFIG = """<View><Image name="image" value="$image"/>
<Choices name="verdict" toName="image"><Choice value="Normal"/><Choice value="Anomaly"/></Choices>
<BrushLabels name="mask" toName="image"><Label value="Defect"/></BrushLabels>
<Number name="score" toName="image"/></View>"""
MODEL = "from anomaly_backend.label_studio_ml import AnomalyBackend\n"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Site:
    """Label Studio with a project, label-studio-ml, Redis; and workers once they are started.

    Attributes:
        http: Label Studio, asked as its own pages ask.
        client: the same, as the workers ask.
        project: the project.
        backend: the ML backend as Label Studio knows it.
        settings: what the adapter and the workers were given.
        store: the project's part of the store.
        queues: the queues between them.
        tasks: the project's tasks.
    """

    http: httpx.Client
    client: Client
    project: int
    backend: dict[str, Any]
    settings: Settings
    store: ProjectStore
    queues: queues.Queues
    tasks: list[int] = field(default_factory=list)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.http.request(method, path, json=body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer.json() if answer.content else None

    def versions(self, task: int) -> list[str]:
        """The versions of a task's predictions in Label Studio, read without asking the ML backend."""
        return [str(one["model_version"]) for one in self.client.predictions(self.project, tasks=[task]).get(task, [])]

    def webhooks(self) -> float:
        return counters.totals(self.queues.connection)["webhooks"]


@pytest.fixture(scope="module")
def site(label_studio: Instance, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A project with images, registered as on Label Studio's settings page, and no worker yet."""
    need(LIBRARY / "label-studio-ml")
    folder = tmp_path_factory.mktemp("label-studio-ml")
    reach = {"label_studio_url": label_studio.url, "label_studio_token": label_studio.token}
    settings = load_settings({}, data_dir=folder / "data", sweep_seconds=2.0, settle_seconds=1.0, **reach)
    auth = TokenAuth(label_studio.url, label_studio.token)
    with (
        redis_of(settings) as queue,
        served(settings, folder) as address,
        httpx.Client(base_url=label_studio.url, auth=auth, timeout=120) as http,
        project_of(client) as project,
    ):
        backend = http.post("/api/ml/", json={"project": project, "url": address, "title": "anomaly"}).json()
        site = Site(http, client, project, backend, settings, Store(settings.data_dir).project(project), queue)
        site.tasks.extend(import_washers(client, project, IMAGES))
        yield site


@pytest.fixture(scope="module")
def scored(site: Site) -> Iterator[Site]:
    """The same, with a worker that has scored everything."""
    supervisor = Supervisor(site.settings, server.ensure(site.settings), workers=1)
    supervisor.start()
    try:
        wait(lambda: site.store.current)
        wait(lambda: len(site.client.prediction_counts(site.project, site.store.current)) == len(site.tasks))
        wait(lambda: site.client.project(site.project).model_version == site.store.current)
        yield site
    finally:
        supervisor.stop()


def test_registering_connects_and_names_a_version_before_there_is_one(site: Site) -> None:
    assert (site.backend["state"], site.backend["model_version"]) == ("CO", "anomaly-pending")
    assert site.store.is_connected


def test_a_pending_task_opens_without_a_prediction_and_is_queued(site: Site) -> None:
    assert site.ask("GET", f"/api/tasks/{site.tasks[0]}?project={site.project}")["predictions"] == []
    wait(lambda: any(job.kind == "fit" for job in site.queues.jobs(site.project)))


def test_every_task_gets_one_prediction_of_the_deployed_version(scored: Site) -> None:
    found = {task: scored.versions(task) for task in scored.tasks}
    assert found == {task: [scored.store.current] for task in scored.tasks}


def test_label_studio_is_told_the_deployed_version(scored: Site) -> None:
    assert scored.ask("GET", f"/api/ml/{scored.backend['id']}")["model_version"] == scored.store.current


def test_opening_a_task_shows_its_prediction_and_adds_none(scored: Site) -> None:
    task = scored.tasks[1]
    opened = [scored.ask("GET", f"/api/tasks/{task}?project={scored.project}") for _ in range(3)][-1]
    assert [one["model_version"] for one in opened["predictions"]] == [scored.store.current]
    assert {region["from_name"] for region in opened["predictions"][0]["result"]} >= {"verdict", "score"}
    assert scored.versions(task) == [scored.store.current]


def test_retrieving_predictions_of_all_tasks_adds_none(scored: Site) -> None:
    selected = {"selectedItems": {"all": True, "excluded": []}}
    scored.ask("POST", f"/api/dm/actions?id=retrieve_tasks_predictions&project={scored.project}", selected)
    assert scored.client.versions(scored.project) == {scored.store.current: len(scored.tasks)}


def test_the_label_stream_in_live_mode_shows_predictions_and_adds_none(scored: Site) -> None:
    scored.client.set_model_version(scored.project, "anomaly")
    try:
        shown = [scored.ask("GET", f"/api/projects/{scored.project}/next") for _ in range(3)][-1]
    finally:
        scored.client.set_model_version(scored.project, scored.store.current)
    assert [one["model_version"] for one in shown["predictions"]] == [scored.store.current]
    assert scored.versions(shown["id"]) == [scored.store.current]


def test_a_deleted_prediction_is_answered_from_the_store(scored: Site) -> None:
    task = scored.tasks[2]
    known = scored.client.predictions(scored.project, tasks=[task])[task][0]
    scored.client.delete_prediction(known["id"])
    [shown, *_] = scored.ask("GET", f"/api/tasks/{task}?project={scored.project}")["predictions"]
    assert [shown[name] for name in ("result", "model_version")] == [known["result"], known["model_version"]]
    # The queue may have given the old one a place at its front as score; the new one waits for the next ranking.
    record = scored.store.record(scored.store.current, task)
    assert record is not None
    assert shown["score"] == record["score"]
    # The sweep may have pushed it at the same moment; then the next one removes the double.
    wait(lambda: scored.versions(task) == [scored.store.current])


def test_an_image_that_comes_later_is_scored_on_arrival(scored: Site) -> None:
    [task] = import_washers(scored.client, scored.project, 1)
    scored.tasks.append(task)
    wait(lambda: scored.versions(task) == [scored.store.current])
    assert scored.store.is_pushed(scored.store.current, task)


def test_a_submitted_annotation_is_kept_and_reaches_the_adapter(scored: Site) -> None:
    before, task = scored.webhooks(), scored.tasks[3]
    [prediction] = scored.client.predictions(scored.project, tasks=[task])[task]
    annotation = scored.client.annotate(task, prediction["result"], parent_prediction=prediction["id"])
    assert [one["id"] for one in scored.ask("GET", f"/api/tasks/{task}/annotations/")] == [annotation]
    wait(lambda: scored.webhooks() > before)


def test_a_click_with_auto_annotation_on_outlines_the_defect_under_it(scored: Site) -> None:
    number, task = scored.backend["id"], scored.tasks[5]
    scored.ask("PATCH", f"/api/ml/{number}", scored.backend | {"is_interactive": True, "extra_params": None})
    click = {"type": "keypointlabels", "value": {"x": 50, "y": 20}, "original_width": 320, "original_height": 320}
    asked = {"task": task, "context": {"result": [click]}}
    answer = scored.ask("POST", f"/api/ml/{number}/interactive-annotating", asked)["data"]
    assert [region["from_name"] for region in answer["result"]] == ["mask"]
    assert answer["model_version"] == scored.store.current


def test_start_training_fits_again_and_one_verdict_does_not_pass_the_gate(scored: Site) -> None:
    before = scored.store.current
    scored.ask("POST", f"/api/ml/{scored.backend['id']}/train", {})
    wait(lambda: len(scored.store.versions()) == 2)
    card = scored.store.versions()[-1]
    assert scored.store.current == before
    assert not card["decision"]["promote"]
    assert "the gate needs 3 of each" in card["decision"]["reason"]
    scored.store.roll_out(card["version"])  # as `ls-anomaly promote` does
    wait(lambda: scored.store.current == card["version"] and before not in scored.client.versions(scored.project))
    assert scored.ask("GET", f"/api/ml/{scored.backend['id']}")["model_version"] == scored.store.current


def need(command: Path) -> Path:
    """Skip on a laptop, fail in CI."""
    if not command.exists():
        reason = f"{command.relative_to(ROOT)} is absent, see the Makefile"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return command


@contextmanager
def project_of(client: Client) -> Iterator[int]:
    """Make a project and delete it in the end: Label Studio would go on sending events."""
    project = client.create_project("Washers", CONFIG).id
    try:
        yield project
    finally:
        client.delete_project(project)


@contextmanager
def redis_of(settings: Settings) -> Iterator[queues.Queues]:
    try:
        with queues.connect(server.ensure(settings)) as connection:
            yield queues.Queues(connection, settings)
    finally:
        server.stop(settings)


@contextmanager
def served(settings: Settings, folder: Path) -> Iterator[str]:
    """Make a backend with `label-studio-ml init` and start it as `label-studio-ml start` does; yield its address."""
    (folder / "anomaly.py").write_text(MODEL)
    create = [str(LIBRARY / "label-studio-ml"), "init", "backend", "--script", "anomaly.py:AnomalyBackend"]
    subprocess.run(create, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    port = free_port()
    command = [str(LIBRARY / "python"), "_wsgi.py", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "backend.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder / "backend",
            env=os.environ | to_environ(settings),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/health"))
        assert process.poll() is None, (folder / "backend.log").read_text()
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait(10)


def import_washers(client: Client, project: int, count: int) -> list[int]:
    """Upload washers, every sixth of them scratched, and make tasks of them."""
    random = np.random.default_rng(count)
    files = []
    for index in range(count):
        washer = sample.washer(random, defect="scratch" if index % 6 == 5 else "good")
        files.append((f"{count}-{index}.png", png(washer)))
    return client.import_tasks(project, [{"data": {"image": url}} for url in client.upload(project, files)])


def png(picture: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def answers(address: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(address, timeout=1).is_success
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(done: Callable[[], object], seconds: float = PATIENCE) -> None:
    begin = time.monotonic()
    while not done():
        assert time.monotonic() - begin < seconds, "it did not happen in time"
        time.sleep(0.3)
