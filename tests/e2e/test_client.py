"""The client against a real Label Studio."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from anomaly_workers.client import Client
from anomaly_workers.errors import ImageError, LabelStudioError, Unauthorized
from anomaly_workers.fetch import Fetcher
from anomaly_workers.instance import Instance
from anomaly_workers.labelstudio import config, encode, template
from anomaly_workers.settings import load_settings
from anomaly_workers.types import JSON, Connection, Detection, Region

MASK_TAGS = ("BrushLabels", "BitmaskLabels", "PolygonLabels", "RectangleLabels")
Make = Callable[[str], int]


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def filled(client: Client, project: int, count: int) -> list[int]:
    return client.import_tasks(project, [{"data": {"image": f"http://x/{place}.png"}} for place in range(count)])


def predictions(tasks: list[int], version: str, xml: str) -> list[JSON]:
    controls = config.parse(xml)
    mask = np.zeros((12, 16), bool)
    mask[3:6, 4:9] = True
    detection = Detection(0.9, 0.5, mask.astype(np.float32), (48, 64))
    return [encode.prediction(task, detection, [Region(mask, 0.8)], controls, version) for task in tasks]


def default_xml() -> str:
    return template.default_config("http://localhost:9/heatmap")


@pytest.fixture
def project(new_project: Make) -> int:
    return new_project(default_xml())


def test_who_and_what(client: Client, label_studio: Instance) -> None:
    assert client.version() == "1.23.2"
    assert client.whoami() == label_studio.email


def test_a_wrong_token_is_unauthorized(label_studio: Instance) -> None:
    for token in ("0" * 40, label_studio.token[:-4] + "AAAA"):
        with Client(Connection(label_studio.url, 0, token)) as other, pytest.raises(Unauthorized, match="token"):
            other.whoami()


def test_an_unknown_project_is_an_error_with_its_status(client: Client) -> None:
    with pytest.raises(LabelStudioError, match="Check the project id") as caught:
        client.project(99999)
    assert caught.value.status == 404


def test_open_tasks_are_paged_with_raw_data(client: Client, project: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly_workers.client.PAGE", 3)
    tasks = filled(client, project, 8)
    client.annotate(tasks[2], [])
    found = list(client.open_tasks(project))
    assert [task.id for task in found] == [task for task in tasks if task != tasks[2]]
    assert found[0].data == {"image": "http://x/0.png"}
    assert len(list(client.all_tasks(project))) == 8


def test_predictions_are_imported_counted_and_replaced(client: Client, project: int) -> None:
    tasks = filled(client, project, 6)
    assert client.import_predictions(project, predictions(tasks[:4], "v1", default_xml())) == []
    assert client.import_predictions(project, predictions(tasks[:1], "v1", default_xml())) == []
    assert client.import_predictions(project, predictions(tasks, "v10", default_xml())) == []
    client.set_model_version(project, "v10")
    assert client.versions(project) == {"v1": 5, "v10": 6}
    assert client.prediction_counts(project, "v1") == {tasks[0]: 2, tasks[1]: 1, tasks[2]: 1, tasks[3]: 1}
    assert client.prediction_counts(project, "v10", tasks=tasks[4:]) == {tasks[4]: 1, tasks[5]: 1}
    assert [task.id for task in client.open_tasks(project, without_version="v1")] == tasks[4:]
    twice = client.prediction_ids(project, "v1", tasks=tasks[:1])[tasks[0]]
    client.delete_prediction(twice[1])
    client.delete_prediction(twice[1])
    assert client.prediction_counts(project, "v1", tasks=tasks[:1]) == {tasks[0]: 1}
    assert client.delete_version(project, "v1") == 4
    assert client.project(project).model_version == "v10"
    assert list(client.open_tasks(project, without_version="v10")) == []


def test_a_version_that_no_prediction_has_is_refused(client: Client, project: int) -> None:
    with pytest.raises(LabelStudioError, match="model_version"):
        client.set_model_version(project, "never")


def test_dropped_and_refused_predictions_are_named(client: Client, project: int) -> None:
    tasks = filled(client, project, 5)
    sent = predictions([*tasks, 999999], "v1", default_xml())
    sent[1] = sent[1] | {"score": 7.5}
    sent[3] = sent[3] | {"result": [sent[3]["result"][0] | {"from_name": "nothing"}]}
    rejected = client.import_predictions(project, sent)
    assert sorted(item.task_id for item in rejected) == sorted([tasks[1], tasks[3], 999999])
    assert all(item.reason for item in rejected)
    assert client.prediction_counts(project, "v1") == dict.fromkeys((tasks[0], tasks[2], tasks[4]), 1)


@pytest.mark.parametrize("lost", ["answer", "request"])
def test_a_broken_connection_stores_nothing_twice(
    label_studio: Instance, client: Client, project: int, lost: str
) -> None:
    tasks = filled(client, project, 4)
    transport = Breaking(lost)
    with Client(
        Connection(label_studio.url, project, label_studio.token), transport=transport, sleep=lambda _seconds: None
    ) as flaky:
        assert flaky.import_predictions(project, predictions(tasks, "v1", default_xml())) == []
    assert transport.broken
    assert client.prediction_counts(project, "v1") == dict.fromkeys(tasks, 1)


class Breaking(httpx.HTTPTransport):
    """Breaks the first import, before or after Label Studio got it."""

    def __init__(self, lost: str) -> None:
        super().__init__()
        self.lost, self.broken = lost, False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.broken or not request.url.path.endswith("/import/predictions"):
            return super().handle_request(request)
        self.broken = True
        if self.lost == "answer":
            super().handle_request(request).close()
        raise httpx.ReadError("broken for the test", request=request)


@pytest.mark.parametrize("tag", MASK_TAGS)
def test_predictions_of_every_mask_control_are_taken(client: Client, new_project: Make, tag: str) -> None:
    xml = (
        f'<View><Image name="img" value="$image"/><Choices name="c" toName="img"><Choice value="OK"/>'
        f'<Choice value="NOK"/></Choices><{tag} name="m" toName="img"><Label value="Kratzer"/></{tag}>'
        '<Number name="n" toName="img"/></View>'
    )
    project = new_project(xml)
    tasks = filled(client, project, 1)
    sent = predictions(tasks, "v", xml)
    assert client.import_predictions(project, sent) == []
    stored = client.predictions(project)[tasks[0]][0]
    assert stored["result"] == sent[0]["result"]
    assert stored["score"] == sent[0]["score"]


def test_uploads_become_tasks_and_are_fetched_with_the_token(
    client: Client, project: int, label_studio: Instance
) -> None:
    addresses = client.upload(project, [("a b.png", picture(1)), ("ü.png", picture(2)), ("a b.png", picture(3))])
    normal = [{"from_name": "verdict", "to_name": "image", "type": "choices", "value": {"choices": ["normal"]}}]
    tasks = client.import_tasks(
        project, [{"data": {"image": address}, "annotations": [{"result": normal}]} for address in addresses]
    )
    found = {item.task.id: item for item in client.annotated_tasks(project)}
    assert list(found) == tasks
    assert found[tasks[0]].annotations[0]["result"][0]["value"] == {"choices": ["normal"]}
    assert found[tasks[0]].task.data["image"] == addresses[0]
    assert client.download(addresses[1]) == picture(2)
    with Fetcher(Connection(label_studio.url, project, label_studio.token), load_settings({})) as fetcher:
        for place, address in enumerate(addresses):
            for form in (address, address[1:], label_studio.url + address):
                assert fetcher.fetch(form, task_id=tasks[place]) == picture(place + 1)
        with pytest.raises(ImageError, match="upload is gone"):
            fetcher.fetch("/data/upload/1/none.png", task_id=tasks[0])
    with (
        Fetcher(Connection(label_studio.url, project, "0" * 40), load_settings({})) as stranger,
        pytest.raises(ImageError, match="token"),
    ):
        stranger.fetch(addresses[0], task_id=tasks[0])


def test_a_plain_upload_makes_a_task_although_the_heatmap_panel_is_there(client: Client, project: int) -> None:
    answer = client._send("POST", f"/api/projects/{project}/import", files=[("file", ("x.png", picture(9)))])
    assert answer["task_count"] == 1


def test_skips_are_no_annotations(client: Client, project: int) -> None:
    tasks = filled(client, project, 2)
    client.annotate(tasks[0], [], was_cancelled=True)
    client.annotate(tasks[1], [])
    assert [item.task.id for item in client.annotated_tasks(project) if item.annotations] == [tasks[1]]


def test_annotations_that_changed_since_a_moment_are_found(client: Client, project: int) -> None:
    tasks = filled(client, project, 3)
    annotations = [client.annotate(task, []) for task in tasks]
    newest = max(one["updated_at"] for item in client.annotated_tasks(project) for one in item.annotations)
    time.sleep(1.5)
    since = (datetime.fromisoformat(newest) + timedelta(seconds=1.4)).isoformat().replace("+00:00", "Z")
    assert list(client.annotated_tasks(project, since=since)) == []
    client.update_annotation(annotations[1], result=[])
    assert [item.task.id for item in client.annotated_tasks(project, since=since)] == [tasks[1]]


def test_webhooks_are_listed_changed_and_deleted(client: Client, project: int) -> None:
    made = client.create_webhook(project, "http://127.0.0.1:9/webhook", headers={"A": "b"}, actions=["TASKS_CREATED"])
    assert client.webhooks(project) == [made]
    changed = client.update_webhook(made.id, headers={"C": "d"}, actions=["TASKS_DELETED"])
    assert (dict(changed.headers), changed.actions) == ({"C": "d"}, ("TASKS_DELETED",))
    client.delete_webhook(made.id)
    client.delete_webhook(made.id)
    assert client.webhooks(project) == []


def test_importing_stays_light() -> None:
    code = (
        "import sys; from anomaly_workers import client, connect, doctor, fetch, instance; "
        "from anomaly_workers.labelstudio import decode, encode, payloads, template; "
        "print({'pandas', 'torch', 'cv2', 'label_studio_sdk'} & set(sys.modules))"
    )
    heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert heavy.strip() == "set()"


def answering(*answers: tuple[int, Any]) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A Label Studio that gives these answers in turn, and what it was asked."""
    left, asked = list(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        status, body = left.pop(0)
        return httpx.Response(status, json=body) if isinstance(body, dict) else httpx.Response(status, text=body)

    return httpx.MockTransport(answer), asked


def scripted(*answers: tuple[int, Any]) -> tuple[Client, list[httpx.Request]]:
    transport, asked = answering(*answers)
    return Client(Connection("http://ls", 1, "legacy"), transport=transport, sleep=lambda _seconds: None), asked


def test_reading_is_tried_again_while_the_database_is_locked() -> None:
    client, asked = scripted((500, {"detail": "database is locked"}), (503, "busy"), (200, {"release": "1"}))
    assert client.version() == "1"
    assert len(asked) == 3


def test_a_post_that_may_have_been_done_is_not_repeated() -> None:
    client, asked = scripted((502, "bad gateway"), (201, {"id": 1}))
    with pytest.raises(LabelStudioError, match="502"):
        client.annotate(1, [])
    assert len(asked) == 1


def test_something_else_at_the_address_is_told() -> None:
    client, _asked = scripted((200, "<html>"))
    with pytest.raises(LabelStudioError, match="did not answer like Label Studio"):
        client.version()


def test_live_mode_survives_the_deletion_of_an_old_version() -> None:
    project = {"id": 1, "model_version": "live"}
    client, asked = scripted(
        (200, project), (200, {"deleted_predictions": 2}), (200, project | {"model_version": None}), (200, project)
    )
    assert client.delete_version(1, "old") == 2
    assert (asked[-1].method, asked[-1].content) == ("PATCH", b'{"model_version":"live"}')
