"""The review queue in Label Studio: two people side by side, and the tabs they find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from product import Product, wait_for, washers

from anomaly_workers import instance, policy, sweep, tabs
from anomaly_workers.active.places import FRONT
from anomaly_workers.enrol import enrol, front_password, page_address
from anomaly_workers.labelstudio import config
from anomaly_workers.store import ProjectStore

EACH = 20
ARTIFACTS = Path(__file__).resolve().parents[2] / "artifacts"


@pytest.fixture(scope="module")
def project(product: Product) -> ProjectStore:
    store = product.project("review queue")
    enrol(product.settings, product.label_studio.url, product.label_studio.token, project=store.id, annotators=2)
    product.add(store, [*washers(36, seed=3), *washers(8, defect="stain", seed=4), *washers(6, defect="chip", seed=5)])
    product.scored(store)
    wait_for(lambda: store.document(sweep.QUEUE).get("complete"), "the review queue to be in order")
    return store


@pytest.fixture
def pages(browser: Browser, product: Product) -> Iterator[tuple[Page, Page]]:
    first, second = product.label_studio.email, "second@example.com"
    instance.personal_token(product.label_studio.url, second, product.label_studio.password, sign_up=True)
    found = [logged_in(browser, product, email) for email in (first, second)]
    yield found[0], found[1]
    for page in found:
        page.context.close()


def test_the_front_of_the_queue_is_in_the_order_of_the_strategy(product: Product, project: ProjectStore) -> None:
    queue = project.document(sweep.QUEUE)
    stored = product.client.predictions(project.id)
    scores = {task: stored[task][0]["score"] for task in stored}

    by_score = sorted(scores, key=scores.__getitem__)

    assert queue["strategy"] == policy.read(project).strategy == "mix"
    assert by_score[: len(queue["front"])] == queue["front"]
    assert all(0 < scores[task] < FRONT for task in queue["front"])
    clusters = {task: stored[task][0]["cluster"] for task in stored}
    assert len(set(clusters.values())) > 1
    assert None not in clusters.values()


def test_two_people_side_by_side_never_get_the_same_task(
    product: Product, project: ProjectStore, pages: tuple[Page, Page]
) -> None:
    links = tabs.links(project, product.label_studio.url)
    mine = [address for title, address in links.items() if title.startswith("Review next")]
    assert len(mine) == 2
    before = {task: found[0]["score"] for task, found in product.client.predictions(project.id).items()}
    done: list[list[int]] = [[], []]
    shown = [next_task(page, lambda page=page, to=to: page.goto(to)) for page, to in zip(pages, mine, strict=True)]
    for _ in range(EACH):
        for who, page in enumerate(pages):
            done[who].append(shown[who])
            page.locator("button:has-text('Submit')").first.wait_for()
            shown[who] = next_task(page, page.locator("button:has-text('Submit')").first.click)
    ARTIFACTS.mkdir(exist_ok=True)
    pages[0].screenshot(path=ARTIFACTS / "review_queue_task.png")
    pages[0].goto(mine[0].removesuffix("&labeling=1"))
    pages[0].get_by_text("Review next (1 of 2)").first.wait_for()
    pages[0].wait_for_timeout(4000)
    pages[0].screenshot(path=ARTIFACTS / "review_queue.png")

    assert not set(done[0]) & set(done[1])
    assert len({*done[0], *done[1]}) == 2 * EACH
    for seen in done:
        first = seen[:4]  # later ones may have been reordered by what was learnt meanwhile
        assert first == sorted(first, key=before.__getitem__)
    others = [task for task in before if task not in {*done[0], *done[1]}]
    assert max(before[task] for seen in done for task in seen[:4]) <= min(before[task] for task in others)


def test_a_threshold_chosen_on_the_page_changes_what_label_studio_shows(
    browser: Browser, product: Product, project: ProjectStore
) -> None:
    password = {"username": product.settings.user, "password": front_password(product.settings)}
    page = browser.new_context(viewport={"width": 1280, "height": 1300}, http_credentials=password).new_page()
    page.set_default_timeout(120_000)
    page.goto(page_address(product.settings, project.id))
    page.get_by_role("heading", name="Threshold").wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=ARTIFACTS / "project_page.png")
    before = project.current

    page.get_by_role("slider", name="Threshold").fill("0.05")
    page.get_by_role("button", name="Use this threshold").click()

    wait_for(lambda: project.current != before and not project.rollout, "the threshold's version")
    controls = config.parse(project.label_config)
    open_now = [task.id for task in product.client.open_tasks(project.id)]
    wait_for(
        lambda: all(
            [one["model_version"] for one in found] == [project.current]
            and controls.anomaly in str(found[0]["result"][0]["value"])
            for found in product.client.predictions(project.id, tasks=open_now).values()
        ),
        "every open task to be an anomaly",
    )
    assert product.client.project(project.id).model_version == project.current
    page.context.close()


def next_task(page: Page, step: Callable[[], object]) -> int:
    """Take a step that makes the label stream show a task, and return the task's id."""
    with page.expect_response(lambda answer: "next_task" in answer.url) as answer:
        step()
    return int(answer.value.json()["id"])


def logged_in(browser: Browser, product: Product, email: str) -> Page:
    page = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
    page.set_default_timeout(120_000)
    page.goto(f"{product.label_studio.url}/user/login/")
    page.fill("input[name=email]", email)
    page.fill("input[name=password]", product.label_studio.password)
    page.click("[type=submit]")
    page.wait_for_url(lambda address: "login" not in address)
    return page
