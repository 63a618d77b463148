"""A real Label Studio for the end-to-end tests, one a session."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from product import Product

from anomaly_workers import instance
from anomaly_workers.client import Client
from anomaly_workers.settings import load_settings
from anomaly_workers.stack import Stack
from anomaly_workers.types import Connection

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ROOT = Path(__file__).resolve().parents[2]
EMAIL, PASSWORD = "inspector@example.com", "correct-horse-9"


def free_port() -> int:
    """A port nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def label_studio_command() -> Path:
    """The `label-studio` to test against; skips on a laptop without one, fails in CI."""
    command = Path(os.environ.get("LABEL_STUDIO_BIN") or ROOT / ".venv-label-studio/bin/label-studio")
    if command.is_file():
        return command
    reason = "there is no Label Studio: run `make test`, or set LABEL_STUDIO_BIN to its command"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI must not skip it")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[instance.Instance]:
    """A running Label Studio with a user and a personal access token."""
    command, folder = label_studio_command(), tmp_path_factory.mktemp("label-studio")
    with instance.start(command, folder=folder, port=free_port(), email=EMAIL, password=PASSWORD) as running:
        yield running


@pytest.fixture(scope="session")
def client(label_studio: instance.Instance) -> Iterator[Client]:
    """A client of that Label Studio."""
    with Client(Connection(label_studio.url, 0, label_studio.token)) as one:
        yield one


@pytest.fixture
def new_project(client: Client) -> Iterator[Callable[[str], int]]:
    """Make projects that end with the test."""
    made: list[int] = []

    def make(label_config: str) -> int:
        made.append(client.create_project(f"project {len(made)}", label_config).id)
        return made[-1]

    yield make
    for project in made:
        client.delete_project(project)


@pytest.fixture(scope="session")
def product(
    label_studio: instance.Instance, client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Product]:
    """The whole product, with one worker, connected to that Label Studio."""
    settings = load_settings(
        {}, data_dir=tmp_path_factory.mktemp("anomaly"), port=free_port(), sweep_seconds=2.0, settle_seconds=1.0
    )
    running = Stack(settings)
    try:
        running.start()
        yield Product(label_studio, settings, client)
    finally:
        running.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    command = shutil.which("chromium")
    if command is None:
        if os.environ.get("CI"):
            pytest.fail("there is no Chromium, and CI must not skip it: run `make browser`")
        pytest.skip("there is no Chromium: install Debian's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=command, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser: Browser, product: Product) -> Iterator[Page]:
    page = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{product.label_studio.url}/user/login/")
    page.fill("input[name=email]", product.label_studio.email)
    page.fill("input[name=password]", product.label_studio.password)
    page.click("[type=submit]")
    page.wait_for_url(lambda address: "login" not in address)
    yield page
    page.context.close()
