"""Boxes and clicks with Auto-Annotation on, in a real browser: Label Studio asks, the stored map answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, expect
from product import Product, washers

from anomaly_workers.enrol import enrol
from anomaly_workers.labelstudio import config, encode
from anomaly_workers.store import ProjectStore, Store, image_key
from anomaly_workers.types import Detection

CONFIG = """<View><Image name="image" value="$image"/>
<BrushLabels name="defect" toName="image"><Label value="Anomaly"/></BrushLabels>
<KeyPointLabels name="point" toName="image" smart="true" smartOnly="true"><Label value="Find at"/></KeyPointLabels>
<RectangleLabels name="box" toName="image" smart="true" smartOnly="true"><Label value="Find in box"/></RectangleLabels>
</View>"""


def scored(product: Product) -> tuple[ProjectStore, int]:
    """A connected project with one task and what a worker would have stored of it."""
    project = product.client.create_project("Auto-annotation", CONFIG).id
    enrol(product.settings, product.label_studio.url, product.label_studio.token, project=project, heatmap=False)
    store = Store(product.settings.data_dir).project(project)
    with store.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(b"never loaded")
        (scratch / "detector.json").write_text('{"calibration": {"limit": 1.0, "unit": 1.0}}')
        version = store.publish(
            scratch, {"detector": "patchcore", "image_size": 256, "mode": "x", "images": 1, "project_images": 1}
        )
    [address] = product.client.upload(project, washers(1))
    [task] = product.client.import_tasks(project, [{"data": {"image": address}}])
    anomaly_map = np.full((256, 256), 0.1, np.float32)
    anomaly_map[100:140, 100:140] = 0.9
    detection = Detection(0.4, 0.5, anomaly_map, (256, 256))
    prediction = encode.prediction(task, detection, [], config.parse(CONFIG), version)
    about = {"anomaly_score": 0.4, "threshold": 0.5, "size": [256, 256], "calmed": 0, "parts": []}
    about |= {"image": image_key(address), "controls": repr(config.parse(CONFIG))}
    store.keep_record(version, task, prediction | {"anomaly": about}, anomaly_map)
    product.client.import_predictions(project, [prediction])
    store.roll_out(version)
    return store, task


@pytest.fixture
def task_page(product: Product, page: Page) -> Page:
    """The page of a scored task with Auto-Annotation on."""
    store, task = scored(product)
    page.evaluate("localStorage.setItem('autoAnnotation', 'true')")
    page.goto(f"{product.label_studio.url}/projects/{store.id}/data?task={task}")
    page.locator(".konvajs-content canvas").first.wait_for()
    page.wait_for_timeout(3000)  # the tools come after the image
    return page


def asked(page: Page, tool: str, label: str, gesture: Callable[[float, float], None]) -> tuple[Any, Any]:
    """Take a smart tool, make the gesture at a place of the image; return what was sent and what came back."""
    page.locator(".lsf-tool_smart").first.hover()
    page.wait_for_timeout(1000)  # the list of smart tools slides in
    chosen = page.locator(f".lsf-toolbar__smart [aria-label={tool}]")
    chosen.click(force=True)
    expect(chosen).to_have_class(re.compile("lsf-tool_active"))
    tag = page.locator(".lsf-label", has_text=label).first
    tag.click()
    expect(tag).to_have_class(re.compile("lsf-label_selected"))
    box = page.locator(".konvajs-content").first.bounding_box()
    assert box is not None
    with page.expect_response(lambda answer: "interactive-annotating" in answer.url, timeout=60_000) as answer:
        gesture(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"])
    return answer.value.request.post_data_json["context"]["result"], answer.value.json()["data"]["result"]


def test_a_box_brings_the_mask_of_the_defect(task_page: Page) -> None:
    def drag(x: float, y: float) -> None:
        task_page.mouse.move(x, y)
        task_page.mouse.down()
        task_page.mouse.move(x + 60, y + 40, steps=5)
        task_page.mouse.up()

    assert_mask(*asked(task_page, "rectangle-tool", "Find in box", drag), hint="rectanglelabels")


def test_a_click_brings_the_mask_of_the_defect(task_page: Page) -> None:
    assert_mask(*asked(task_page, "key-point-tool", "Find at", task_page.mouse.click), hint="keypointlabels")


def assert_mask(sent: Any, found: Any, *, hint: str) -> None:
    assert sent[-1]["type"] == hint
    [region] = found
    assert (region["from_name"], region["value"]["brushlabels"]) == ("defect", ["Anomaly"])
