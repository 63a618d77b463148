"""What annotators say reaches the log and calms the map: real Label Studio, real workers."""

from __future__ import annotations

import time
from typing import Any

import pytest
from product import Product, wait_for, washers

from anomaly_workers.feedback import FeedbackLog
from anomaly_workers.labelstudio import config
from anomaly_workers.store import ProjectStore

SECONDS = 10.0
"""From Submit to a calm map."""


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
    before = {task: project.record(version, task) for task in (rejected, twin, defect)}
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
    assert seconds < SECONDS
    assert project.current == version
    assert project.record(version, defect) == before[defect], "a real defect stays as it was"
    [example] = FeedbackLog(project).examples([rejected])
    assert (example.anomaly, example.judged, example.version) == (False, ("false alarm",), version)
    assert [entry.annotation for entry in FeedbackLog(project).entries()] == [annotation]

    # Taken back: the alarm is there again, exactly as it was.
    product.client.update_annotation(annotation, result=[choice(project, anomaly=True)])
    wait_for(lambda: said(product, project, twin) == [controls.anomaly], "the alarm to come back")
    after = project.record(version, twin)
    assert after is not None
    assert before[twin] is not None
    assert after["anomaly"]["anomaly_score"] == before[twin]["anomaly"]["anomaly_score"]
    assert project.calmed(version) == ()
