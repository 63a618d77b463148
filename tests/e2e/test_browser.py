"""What the inspector sees, in a real Chromium: the mask, the verdict and the heatmap; a correction is submitted."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from product import Product, open_task, washers

from anomaly_workers.labelstudio import config, decode
from anomaly_workers.store import ProjectStore

ARTIFACTS = Path(__file__).resolve().parents[2] / "artifacts"


@pytest.fixture(scope="module")
def inspected(product: Product) -> tuple[ProjectStore, list[int]]:
    """A project with stained washers to look at."""
    store = product.project("inspected")
    product.add(store, washers(30, seed=1), normal=True)
    defects = product.add(store, washers(2, defect="stain", seed=8))
    product.scored(store)
    return store, defects


def test_a_task_shows_the_mask_the_verdict_and_the_heatmap(
    page: Page, product: Product, inspected: tuple[ProjectStore, list[int]]
) -> None:
    store, defects = inspected
    open_task(page, product, store, defects[0])
    controls = config.parse(store.label_config)
    assert controls.anomaly is not None
    expect(page.get_by_role("checkbox", name=controls.anomaly)).to_be_checked()

    with_mask = shot(page.locator(".konvajs-content").first)
    page.screenshot(path=artifact("task.png"))
    (prediction,) = product.client.predictions(store.id, tasks=[defects[0]])[defects[0]]
    mask = drawn_mask(prediction["result"], store, with_mask.shape[:2])
    reddish = with_mask[..., 0].astype(int) - with_mask[..., 1:].max(axis=-1)
    assert reddish[mask].mean() > reddish[~mask].mean() + 20, "the mask's red is drawn where the mask is"

    heatmap = shot(page.locator(".konvajs-content").nth(1))
    colourful = np.ptp(heatmap.astype(int), axis=-1)
    inside = drawn_mask(prediction["result"], store, heatmap.shape[:2])
    assert colourful[inside].mean() > colourful[~inside].mean() + 40, "the heatmap glows where the defect is"


def test_a_corrected_mask_is_submitted_as_an_annotation(
    page: Page, product: Product, inspected: tuple[ProjectStore, list[int]]
) -> None:
    store, defects = inspected
    open_task(page, product, store, defects[1])
    page.locator(".lsf-outliner-item").first.wait_for()
    page.locator(".lsf-label").get_by_text(config.parse(store.label_config).mask_label or "").first.click()
    canvas = page.locator(".konvajs-content").first
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.12, steps=12)
    page.mouse.up()
    page.screenshot(path=artifact("corrected.png"))
    with page.expect_response(lambda answer: "/annotations" in answer.url and answer.request.method == "POST"):
        page.get_by_role("button", name="Submit").click()
    (annotated,) = [one for one in product.client.annotated_tasks(store.id) if one.task.id == defects[1]]
    result = annotated.annotations[0]["result"]
    judgement = decode.judgement(result, config.parse(store.label_config), (100, 100))
    assert judgement.anomaly is True
    assert judgement.mask[8:16, 12:28].any(), "the stroke that was added is part of the annotation"
    assert {mark.origin for mark in judgement.marks} == {"prediction", "manual"}


def shot(place: Locator) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(place.screenshot())).convert("RGB"))


def drawn_mask(result: list[dict[str, object]], store: ProjectStore, size: tuple[int, ...]) -> NDArray[np.bool_]:
    return decode.judgement(result, config.parse(store.label_config), (size[0], size[1])).mask


def artifact(name: str) -> Path:
    ARTIFACTS.mkdir(exist_ok=True)
    return ARTIFACTS / name
