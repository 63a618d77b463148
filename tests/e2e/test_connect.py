"""Connecting a project of a real Label Studio to a small stand-in for the front end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from anomaly_workers import doctor
from anomaly_workers.client import Client
from anomaly_workers.connect import TITLE, ConnectReport, Request, _subscribe, basic, connect, disconnect
from anomaly_workers.errors import ConfigError, LabelStudioError
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.types import Connection
from conftest import free_port

PASSWORD = "front-end-password"
PLAIN = (
    '<View><Image name="part" value="$image"/><Choices name="c" toName="part"><Choice value="OK"/>'
    '<Choice value="NOK"/></Choices></View>'
)
Make = Callable[[str], int]


@dataclass
class FrontEnd:
    """A front end that only answers, and remembers what it was sent."""

    port: int = field(default_factory=free_port)
    password: str = PASSWORD
    events: list[tuple[str, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def answer(self, path: str, body: Any, authorization: str) -> tuple[int, Any]:
        if path == "/webhook":
            self.events.append((body["action"], authorization))
        if path != "/health" and authorization != basic("label-studio", self.password):
            return 401, {}
        return 200, {"/health": {"status": "UP"}, "/setup": {"model_version": "v0"}}.get(path, {})


@pytest.fixture
def front_end() -> Iterator[FrontEnd]:
    one = FrontEnd()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: Any) -> None:
            status, said = one.answer(self.path, body, self.headers.get("Authorization", ""))
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", one.port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield one
        server.shutdown()
        thread.join()


def settings(url: str) -> Settings:
    return load_settings({}, backend_url=url)


def joined(client: Client, front: FrontEnd, **options: Any) -> ConnectReport:
    given: dict[str, Any] = {"password": PASSWORD} | options
    request = Request(heatmap_url=lambda project: f"{front.url}/heatmap/{project}/k", **given)
    return connect(client, settings(front.url), request)


def test_a_new_project_is_set_up_and_a_second_run_changes_nothing(client: Client, front_end: FrontEnd) -> None:
    report = joined(client, front_end, create="New line")
    try:
        project = client.project(report.project)
        assert project.model_version == ""
        assert (project.sampling, project.show_collab_predictions) == ("Uncertainty sampling", True)
        assert f"/heatmap/{report.project}/k?src=$image" in project.label_config
        assert (report.controls.normal, report.controls.mask_label) == ("normal", "Anomaly")
        [backend] = client.backends(report.project)
        assert (backend.title, backend.state, backend.is_interactive) == (TITLE, "CO", True)
        [webhook] = client.webhooks(report.project)
        assert webhook.headers["Authorization"] == basic("label-studio", PASSWORD)
        again = joined(client, front_end, create="New line")
        assert again.changes == ()
        assert (again.project, again.backend, again.webhook) == (report.project, report.backend, report.webhook)
        client.import_tasks(report.project, [{"data": {"image": "http://x/1.png"}}])
        assert front_end.events[-1] == ("TASKS_CREATED", basic("label-studio", PASSWORD))
    finally:
        client.delete_project(report.project)


def test_an_existing_project_keeps_its_config_unless_the_panel_is_asked_for(
    client: Client, front_end: FrontEnd, new_project: Make
) -> None:
    project = new_project(PLAIN)
    joined(client, front_end, project=project)
    assert client.project(project).label_config == PLAIN
    report = joined(client, front_end, project=project, add_heatmap=True)
    assert "anomaly_heatmap" in client.project(project).label_config
    assert len(report.changes) == 1
    assert joined(client, front_end, project=project, add_heatmap=True).changes == ()


def test_a_static_version_is_left_alone_and_live_mode_is_left(
    client: Client, front_end: FrontEnd, new_project: Make
) -> None:
    project = new_project(PLAIN)
    joined(client, front_end, project=project)
    [task] = client.import_tasks(project, [{"data": {"image": "http://x/1.png"}}])
    client.import_predictions(project, [{"task": task, "model_version": "v7", "score": 0.5, "result": []}])
    client.set_model_version(project, "v7")
    assert joined(client, front_end, project=project).changes == ()
    assert client.project(project).model_version == "v7"
    client.set_model_version(project, TITLE)
    assert len(joined(client, front_end, project=project).changes) == 1
    assert client.project(project).model_version == ""


def test_damage_is_repaired(client: Client, front_end: FrontEnd, new_project: Make) -> None:
    project = new_project(PLAIN)
    report = joined(client, front_end, project=project)
    client.create_backend(project, f"{front_end.url}/", title="again", user="label-studio", password=PASSWORD)
    client.create_webhook(project, f"{front_end.url}/webhook", headers={}, actions=["TASKS_CREATED"])
    client.update_webhook(report.webhook, headers={}, actions=["TASKS_CREATED"])
    assert joined(client, front_end, project=project).changes != ()
    assert [one.id for one in client.backends(project)] == [report.backend]
    assert [one.id for one in client.webhooks(project)] == [report.webhook]
    assert joined(client, front_end, project=project).changes == ()


class Repeating(httpx.HTTPTransport):
    """Registers every ML backend twice, as Label Studio itself does when its SQLite was locked the first time."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and request.url.path == "/api/ml/":
            super().handle_request(request).read()
        return super().handle_request(request)


def test_a_backend_that_label_studio_registers_twice_is_there_once(
    client: Client, front_end: FrontEnd, new_project: Make
) -> None:
    project = new_project(PLAIN)
    with Client(client.connection, transport=Repeating()) as repeating:
        report = joined(repeating, front_end, project=project)
    assert [one.id for one in client.backends(project)] == [report.backend]
    assert len(client.webhooks(project)) == 1
    assert joined(client, front_end, project=project).changes == ()


def test_a_new_password_reaches_backend_and_webhook(client: Client, front_end: FrontEnd, new_project: Make) -> None:
    project = new_project(PLAIN)
    joined(client, front_end, project=project)
    front_end.password = "another"
    joined(client, front_end, project=project, password="another")
    assert [one.state for one in client.backends(project)] == ["CO"]
    assert client.webhooks(project)[0].headers["Authorization"] == basic("label-studio", "another")


def test_a_wrong_password_is_told(client: Client, front_end: FrontEnd, new_project: Make) -> None:
    with pytest.raises(ConfigError, match="ANOMALY_PASSWORD"):
        joined(client, front_end, project=new_project(PLAIN), password="wrong")


def test_a_front_end_that_is_down_is_told(client: Client, new_project: Make) -> None:
    with pytest.raises(ConfigError, match="ANOMALY_BACKEND_URL"):
        joined(client, FrontEnd(), project=new_project(PLAIN))


@pytest.mark.parametrize("url", ["http://10.1.2.3:9090", "http://169.254.169.254"])
def test_a_refused_private_address_names_the_variables(client: Client, new_project: Make, url: str) -> None:
    project = new_project(PLAIN)
    with pytest.raises(ConfigError, match="USE_DEFAULT_BANNED_SUBNETS"):
        connect(client, settings(url), Request(PASSWORD, str, project=project))
    assert client.backends(project) == []


def test_an_unknown_name_is_told(client: Client, new_project: Make) -> None:
    with pytest.raises(ConfigError, match="cannot reach"):
        request = Request(PASSWORD, str, project=new_project(PLAIN))
        connect(client, settings("http://no-such-host.invalid"), request)


def test_a_host_name_that_webhooks_refuse_is_explained() -> None:
    refusal = {"detail": "Validation error", "validation_errors": {"url": ["Enter a valid URL."]}}
    transport = httpx.MockTransport(
        lambda request: httpx.Response(200, json=[]) if request.method == "GET" else httpx.Response(400, json=refusal)
    )
    with Client(Connection("http://ls", 1, "t"), transport=transport) as one, pytest.raises(ConfigError, match="dot"):
        _subscribe(one, 1, "http://web:9090", {}, [])


def test_a_project_that_predictions_cannot_fill_is_refused_untouched(
    client: Client, front_end: FrontEnd, new_project: Make
) -> None:
    project = new_project('<View><Image name="i" value="$image"/><Rating name="r" toName="i"/></View>')
    with pytest.raises(ConfigError, match="Rating"):
        joined(client, front_end, project=project)
    assert client.backends(project) == []


def test_one_of_project_and_title_is_needed(client: Client, front_end: FrontEnd) -> None:
    with pytest.raises(ConfigError, match="--create"):
        joined(client, front_end)


def test_disconnecting_removes_backend_and_webhook(client: Client, front_end: FrontEnd, new_project: Make) -> None:
    project = new_project(PLAIN)
    joined(client, front_end, project=project)
    disconnect(client, settings(front_end.url), project=project)
    assert client.backends(project) == []
    assert client.webhooks(project) == []


def test_the_doctor_finds_what_is_wrong_and_what_is_right(
    client: Client, front_end: FrontEnd, new_project: Make
) -> None:
    project = new_project(PLAIN)

    def examined(url: str = front_end.url) -> dict[str, doctor.Check]:
        def absent() -> str:
            raise LabelStudioError("no Redis")

        found = doctor.examine(
            settings(url),
            client=client,
            project=project,
            password=PASSWORD,
            probes=[("device", lambda: "cpu"), ("redis", absent)],
        )
        return {check.name: check for check in found}

    before = examined()
    assert (before["ML backend"].ok, before["webhook"].ok, before["review order"].ok) == (False, False, False)
    joined(client, front_end, project=project)
    after = examined()
    assert [name for name, check in after.items() if check.ok is False] == ["redis"]
    assert after["token"].detail.startswith("personal")
    assert after["model version"].ok is None
    away = examined("http://localhost:9")
    assert (away["front end"].ok, away["ML backend"].ok) == (False, False)
    assert all(check.fix for check in away.values() if check.ok is False)
