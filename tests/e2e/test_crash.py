"""Whatever is killed, every task ends with exactly one prediction."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from product import Product, wait_for, washers
from redis import Redis

from anomaly_workers import instance, server
from anomaly_workers.client import Client
from anomaly_workers.settings import load_settings
from anomaly_workers.stack import Stack
from conftest import free_port

IMAGES = 500


class Fragile(Product):
    """A product of its own that may be broken."""


@pytest.fixture
def fragile(label_studio: instance.Instance, client: Client, tmp_path: Path) -> Iterator[tuple[Product, Stack]]:
    settings = load_settings(
        {},
        data_dir=tmp_path,
        port=free_port(),
        workers=2,
        sweep_seconds=2.0,
        settle_seconds=1.0,
        image_size=64,
        max_fit_images=30,
    )
    running = Stack(settings)
    try:
        running.start()
        yield Product(label_studio, settings, client), running
    finally:
        running.stop()


@pytest.mark.timeout(900)
def test_kills_of_worker_redis_and_everything_lose_and_double_nothing(fragile: tuple[Product, Stack]) -> None:
    product, running = fragile
    store = product.project("fragile")
    product.add_washers(store, 24)
    product.scored(store)
    few = washers(20, seed=9, side=96)
    product.add(store, [(f"{number}-{name}", content) for number in range(IMAGES // 20) for name, content in few])

    def pushed() -> int:
        return product.client.versions(store.id).get(store.current, 0)

    wait_for(lambda: pushed() > 60, "the first batches")
    for worker in running.worker_pids[:1]:
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: pushed() > 160, "work to go on after a worker was killed")
    _kill_redis(product)
    wait_for(lambda: pushed() > 260, "work to go on after Redis was killed")
    for worker in running.worker_pids:
        os.kill(worker, signal.SIGKILL)
    _kill_redis(product)
    versions = product.scored(store)
    wait_for(lambda: set(product.client.prediction_counts(store.id, store.current).values()) == {1}, "no doubles")
    assert len(versions) == IMAGES + 24
    wait_for(
        lambda: Counter(map(tuple, product.versions(store).values())) == {(store.current,): IMAGES + 24},
        "one prediction of the deployed version for every task, the replaced version's being removed",
    )


def _kill_redis(product: Product) -> None:
    with Redis.from_url(server.ensure(product.settings)) as connection:
        pid = int(connection.info("server")["process_id"])
    os.kill(pid, signal.SIGKILL)
