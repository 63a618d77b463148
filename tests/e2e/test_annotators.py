"""What annotators say reaches the log and calms the map: real Label Studio, real workers."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from product import Product, crowding, wait_for, washers

from anomaly_workers.enrol import front_password
from anomaly_workers.feedback import FeedbackLog
from anomaly_workers.labelstudio import config
from anomaly_workers.store import ProjectStore

SECONDS = 10.0
"""From Submit to a calm map."""

TRAINING_SECONDS = 0.2


@pytest.fixture(scope="module")
def project(product: Product) -> ProjectStore:
    store = product.project("feedback")
    product.add_washers(store, 30)
    return store


def choice(store: ProjectStore, *, anomaly: bool) -> dict[str, Any]:
    controls = config.parse(store.label_config)
    assert controls.choices is not None
    return {
        "from_name": controls.choices.name,
        "to_name": controls.image,
        "type": "choices",
        "value": {"choices": [controls.anomaly if anomaly else controls.normal]},
    }


def score(store: ProjectStore, version: str, task: int) -> float:
    record = store.record(version, task)
    assert record is not None
    return float(record["anomaly"]["anomaly_score"])


def said(product: Product, store: ProjectStore, task: int) -> list[str]:
    """The verdicts of the deployed version's predictions of a task."""
    return [
        region["value"]["choices"][0]
        for prediction in product.client.predictions(store.id, tasks=[task])[task]
        if prediction["model_version"] == store.current
        for region in prediction["result"]
        if region["type"] == "choices"
    ]


def test_a_rejected_alarm_is_calm_within_seconds_and_so_is_its_look_alike(
    product: Product, project: ProjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    controls = config.parse(project.label_config)
    [stain] = washers(1, defect="stain", seed=77)
    [other] = washers(1, defect="chip", seed=5)
    rejected, twin, defect = product.add(project, [stain, ("twin.jpg", stain[1]), other])
    product.scored(project)
    version = project.current
    scores = {task: score(project, version, task) for task in (rejected, twin, defect)}
    assert {task: said(product, project, task) for task in (rejected, twin, defect)} == dict.fromkeys(
        (rejected, twin, defect), [controls.anomaly]
    )

    began = time.monotonic()
    annotation = product.client.annotate(rejected, [choice(project, anomaly=False)])
    for task in (rejected, twin):
        wait_for(lambda task=task: said(product, project, task) == [controls.normal], f"task {task} to calm down")
    seconds = time.monotonic() - began
    with capsys.disabled():
        print(f"\na rejected alarm and its look-alike were calm {seconds:.1f} s after Submit")
    assert seconds < SECONDS * crowding()
    assert project.current == version
    assert score(project, version, defect) == pytest.approx(scores[defect], abs=0.02), "a real defect stays as it was"
    [example] = FeedbackLog(project).examples([rejected])
    assert (example.anomaly, example.judged, example.version) == (False, ("false alarm",), version)
    assert [entry.annotation for entry in FeedbackLog(project).entries()] == [annotation]

    # Taken back: the alarm is there again, exactly as it was.
    product.client.update_annotation(annotation, result=[choice(project, anomaly=True)])
    wait_for(lambda: said(product, project, twin) == [controls.anomaly], "the alarm to come back")
    assert score(project, version, twin) == pytest.approx(scores[twin], abs=1e-6)
    assert project.calmed(version) == ()


def test_lost_webhooks_are_made_up_for_and_repeated_ones_count_once(product: Product, project: ProjectStore) -> None:
    client, log = product.client, FeedbackLog(project)
    tasks = [task.id for task in client.open_tasks(project.id)][:4]
    before = set(log.current())
    for hook in client.webhooks(project.id):
        client.delete_webhook(hook.id)  # from here on every event is lost
    made = [client.annotate(task, [choice(project, anomaly=False)]) for task in tasks]
    client.update_annotation(made[0], result=[choice(project, anomaly=True)])
    client.delete_task(tasks[1])

    def matches() -> bool:
        theirs = {one: stamp.updated_at for one, stamp in client.annotation_stamps(project.id).items()}
        return {one: entry.updated_at for one, entry in log.current().items()} == theirs

    wait_for(matches, "the log to equal Label Studio's list without any webhook")
    assert before | set(made) - {made[1]} <= set(log.current())
    assert log.current()[made[0]].anomaly is True

    entries = len(log.entries())
    event = {
        "action": "ANNOTATION_UPDATED",
        "project": {"id": project.id},
        "annotation": {"id": made[0], "task": tasks[0]},
    }
    address = f"http://127.0.0.1:{product.settings.port}/webhook"
    auth = (product.settings.user, front_password(product.settings))
    for _ in range(5):
        assert httpx.post(address, json=event, auth=auth).status_code == 201
    time.sleep(4)
    assert len(log.entries()) == entries


def test_start_training_answers_at_once(
    product: Product, project: ProjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://127.0.0.1:{product.settings.port}/webhook"
    auth = (product.settings.user, front_password(product.settings))
    taken = []
    for _ in range(3):
        began = time.monotonic()
        answer = httpx.post(address, json={"action": "START_TRAINING", "project": {"id": project.id}}, auth=auth)
        taken.append(time.monotonic() - began)
        assert answer.json()["job"].startswith("fit-")
    with capsys.disabled():
        print(f"\nSTART_TRAINING answered in {', '.join(f'{one * 1000:.0f}' for one in taken)} ms")
    assert min(taken) < TRAINING_SECONDS * crowding()
    wait_for(lambda: not product.queues().fitting(project.id), "the training run to end")
    assert project.versions()[-1]["decision"]["reason"]
