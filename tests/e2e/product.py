"""The whole product on this machine, for the tests that look at it as a user does."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page

from anomaly_workers import instance, queues, sample, server
from anomaly_workers.client import Client
from anomaly_workers.enrol import enrol
from anomaly_workers.labelstudio import config
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings, to_environ
from anomaly_workers.store import ProjectStore, Store

PATIENCE = 240.0


@dataclass(frozen=True)
class Product:
    """A running Label Studio, front end, Redis and worker."""

    label_studio: instance.Instance
    settings: Settings
    client: Client

    def project(self, title: str) -> ProjectStore:
        """Create and connect a project."""
        report = enrol(self.settings, self.label_studio.url, self.label_studio.token, create=title)
        return Store(self.settings.data_dir).project(report.project)

    def queues(self) -> Queues:
        return Queues(queues.connect(server.ensure(self.settings)), self.settings)

    def add(self, store: ProjectStore, files: Sequence[tuple[str, bytes]], *, normal: bool = False) -> list[int]:
        """Upload files and make tasks of them, annotated as normal if asked; return the task ids in order."""
        controls = config.parse(store.label_config)
        assert controls.choices is not None
        annotation = {
            "result": [
                {
                    "from_name": controls.choices.name,
                    "to_name": controls.image,
                    "type": "choices",
                    "value": {"choices": [controls.normal]},
                }
            ]
        }
        addresses = self.client.upload(store.id, files)
        extra = {"annotations": [annotation]} if normal else {}
        return self.client.import_tasks(
            store.id, [{"data": {controls.value: address}} | extra for address in addresses]
        )

    def add_washers(self, store: ProjectStore, count: int = 24, *, seed: int = 0) -> list[int]:
        """Add normal washers as open tasks, enough for a first fit."""
        return self.add(store, washers(count, seed=seed))

    def scored(self, store: ProjectStore, *, but: Sequence[int] = ()) -> dict[int, list[str]]:
        """Wait until every open task but some has a prediction of the deployed version; return versions by task."""
        wait_for(lambda: store.current and not store.rollout, "a deployed version")
        wait_for(
            lambda: {task.id for task in self.client.open_tasks(store.id, without_version=store.current)} <= set(but),
            "a prediction for every open task",
        )
        return self.versions(store)

    def versions(self, store: ProjectStore) -> dict[int, list[str]]:
        """Return the versions of the predictions of each open task."""
        found = self.client.predictions(store.id)
        return {
            task.id: [one["model_version"] for one in found.get(task.id, [])]
            for task in self.client.open_tasks(store.id)
        }


def open_task(page: Page, product: Product, store: ProjectStore, task: int) -> None:
    with page.expect_response(lambda answer: "/heatmap/" in answer.url) as heatmap:
        page.goto(f"{product.label_studio.url}/projects/{store.id}/data?task={task}")
    assert heatmap.value.status == 200
    assert heatmap.value.headers["cache-control"] == "no-cache", "not the picture that says it is pending"
    page.locator(".konvajs-content canvas").first.wait_for()
    page.wait_for_timeout(3000)  # the canvas draws masks after it draws the image


def washers(count: int, *, defect: str = "good", seed: int = 0, side: int = sample.SIDE) -> list[tuple[str, bytes]]:
    """Draw washers as JPEG files."""
    random = np.random.default_rng(seed)
    return [
        (f"{defect}-{index}.jpg", encoded(sample.washer(random, defect=defect).resize((side, side)), "JPEG"))
        for index in range(count)
    ]


def encoded(picture: Image.Image, kind: str) -> bytes:
    """Return a picture as a file of the kind."""
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def crowding() -> float:
    """How many processes wait for each core, at least 1: bounds in seconds are for a machine of one's own."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def command(product: Product, *arguments: str) -> str:
    """Run `ls-anomaly` as a user does."""
    program = Path(sys.executable).with_name("ls-anomaly")
    environment = os.environ | to_environ(product.settings)
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition: Callable[[], object], what: str, *, seconds: float = PATIENCE) -> None:
    """Wait until a condition holds; fail with what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)
