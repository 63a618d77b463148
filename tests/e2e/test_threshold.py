"""A moved threshold changes verdicts and masks from stored maps: real Label Studio, real worker, no network pass."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from product import Product, command, crowding, wait_for, washers

from anomaly_workers import counters, instance, policy
from anomaly_workers.client import Client
from anomaly_workers.feedback import FeedbackLog
from anomaly_workers.labelstudio import config
from anomaly_workers.settings import load_settings, to_environ
from anomaly_workers.stack import Stack
from anomaly_workers.store import ProjectStore
from conftest import free_port

SECONDS = 15.0
"""From the decision to 500 changed tasks in Label Studio: 5 on two cores that do nothing else, many times that when
others use them."""


@pytest.fixture(scope="module")
def small(
    label_studio: instance.Instance, client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Product]:
    """The product with quick fits and quick scoring."""
    quick = {"image_size": 128, "max_fit_images": 40}
    settings = load_settings({}, data_dir=tmp_path_factory.mktemp("threshold"), port=free_port(), **quick)
    running = Stack(settings)
    try:
        running.start()
        yield Product(label_studio, settings, client)
    finally:
        running.stop()


def verdicts(predictions: dict[int, list[dict[str, Any]]], version: str) -> dict[int, list[str]]:
    """Return the choices of a version's predictions by task."""
    return {
        task: [
            region["value"]["choices"][0]
            for one in found
            if one["model_version"] == version
            for region in one["result"]
            if region["type"] == "choices"
        ]
        for task, found in predictions.items()
    }


def scores(store: ProjectStore, tasks: list[int]) -> dict[int, float]:
    records = {task: store.record(store.current, task) for task in tasks}
    return {task: record["anomaly"]["anomaly_score"] for task, record in records.items() if record}


@pytest.mark.timeout(1200)
def test_a_moved_threshold_changes_500_tasks_without_the_network_and_rolls_back_exactly(
    small: Product, capsys: pytest.CaptureFixture[str]
) -> None:
    store = small.project("threshold")
    drawn = [*washers(80, seed=1), *washers(20, defect="stain", seed=2)]
    files = [(f"{copy}-{name}", file) for copy in range(5) for name, file in drawn[3 * copy :] + drawn[: 3 * copy]]
    tasks = small.add(store, files)
    wait_for(lambda: store.current and store.pushed(store.current) == len(tasks), "500 predictions", seconds=600)
    wait_for(lambda: small.client.project(store.id).model_version == store.current, "the version to be shown")
    first, controls, redis = store.current, config.parse(store.label_config), small.queues().connection
    assert controls.choices is not None
    calm = min(tasks, key=scores(store, tasks).__getitem__)
    choice = {"from_name": controls.choices.name, "to_name": controls.image, "type": "choices"}
    small.client.annotate(calm, [choice | {"value": {"choices": [controls.normal]}}])
    wait_for(lambda: len(FeedbackLog(store).entries()) == 1, "the annotation to be read")
    before, annotated = small.client.predictions(store.id), _annotations(small, store, calm)
    counted = counters.totals(redis)["images_scored"]
    known = scores(store, [task for task in tasks if task != calm])
    limit = float(np.quantile(list(known.values()), 0.4))
    expected = {task: [controls.anomaly if score >= limit else controls.normal] for task, score in known.items()}

    began = time.monotonic()
    policy.change(store, {"rule": "number", "value": limit})
    small.queues().enqueue_threshold(store.id)
    while small.client.project(store.id).model_version == first:
        assert time.monotonic() - began < 120, "the threshold was not moved"
        time.sleep(0.05)
    seconds = time.monotonic() - began

    second, changed = store.current, small.client.predictions(store.id)
    assert small.client.project(store.id).model_version == second != first
    said = verdicts(changed, second)
    assert {task: said[task] for task in known} == expected
    flips = sum(verdicts(before, first)[task] != said[task] for task in known)
    masked = [task for task in known if said[task] == [controls.anomaly]]
    with capsys.disabled():
        print(
            f"\n{flips} of {len(known)} verdicts changed, {len(masked)} masks drawn, {seconds:.1f} s after the decision"
        )
    assert flips > 50
    assert seconds < SECONDS * crowding()
    assert all(_masks(changed[task], second) for task in masked)
    wait_for(lambda: small.client.versions(store.id) == {second: len(known)}, "one prediction a task")
    assert all(len(small.client.predictions(store.id)[task]) == 1 for task in masked[:1])
    assert _annotations(small, store, calm) == annotated

    shown = command(small, "threshold", "-p", str(store.id))
    assert f"threshold: {limit:.4f}" in shown
    assert f"open tasks: {len(masked)} of {len(known)}" in shown

    command(small, "rollback", "-p", str(store.id))
    wait_for(lambda: store.current == first and not store.rollout, "the first version again")
    wait_for(lambda: small.client.versions(store.id) == {first: len(known)}, "its predictions alone")
    after = small.client.predictions(store.id)
    assert {task: _results(after[task]) for task in known} == {task: _results(before[task]) for task in known}
    assert policy.read(store).rule == "fpr", "or the sweep would move it away again"
    assert counters.totals(redis)["images_scored"] == counted, "the network ran"


def test_a_rule_with_nothing_to_go_by_is_refused_in_one_line(small: Product) -> None:
    store = small.project("too early")
    small.add_washers(store, 12)
    small.scored(store)
    program = Path(sys.executable).with_name("ls-anomaly")
    environment = os.environ | to_environ(small.settings)
    refused = [program, "threshold", "-p", str(store.id), "--f1"]
    done = subprocess.run(refused, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "0 defects and 0 normals" in done.stderr
    assert policy.read(store).rule == "fpr"

    version = store.current
    said = command(small, "threshold", "-p", str(store.id), "--fpr", "0.2")
    assert store.current != version
    assert store.card(store.current)["threshold"] < 0.5
    assert "a false-positive rate of 0.2" in said


def _results(predictions: list[dict[str, Any]]) -> list[Any]:
    return [one["result"] for one in predictions]


def _masks(predictions: list[dict[str, Any]], version: str) -> list[Any]:
    found = [one for one in predictions if one["model_version"] == version]
    return [region for one in found for region in one["result"] if region["type"] == "brushlabels"]


def _annotations(product: Product, store: ProjectStore, task: int) -> list[dict[str, Any]]:
    return [one for found in product.client.annotations(store.id, [task]) for one in found.annotations]
