"""A Redis of its own for each test, worker processes, and a check that none of them stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from observe import MARK, SAMPLE_WORKER, marked
from redis import Redis
from sample_jobs import Events

from anomaly_workers import server
from anomaly_workers.queues import Queues, connect
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.supervisor import Supervisor


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that leaves a worker running; the server is checked where it is stopped."""
    monkeypatch.setenv(MARK, str(tmp_path))
    yield
    left = marked(tmp_path)
    for pid in left:
        os.kill(pid, 9)
    assert not left, f"processes left running: {left}"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Settings]:
    """Settings of a data directory whose embedded server is stopped in the end."""
    settings = load_settings({}, data_dir=tmp_path / "data", job_timeout=60, batch_size=4)
    yield settings
    server.stop(settings)


@pytest.fixture
def redis_url(home: Settings) -> str:
    return server.ensure(home)


@pytest.fixture
def settings(home: Settings, redis_url: str) -> Settings:
    """Settings that name the running server, as a worker gets them."""
    return home.model_copy(update={"redis_url": redis_url})


@pytest.fixture
def connection(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as client:
        yield client


@pytest.fixture
def queues(connection: Redis, settings: Settings) -> Queues:
    return Queues(connection, settings)


@pytest.fixture
def events(home: Settings) -> Events:
    """What the sample jobs have done."""
    return Events(home.data_dir)


@pytest.fixture
def supervise(redis_url: str, home: Settings) -> Iterator[Callable[..., Supervisor]]:
    """Start supervisors of sample workers."""
    started: list[Supervisor] = []

    def start(workers: int = 1, **changes: object) -> Supervisor:
        settings = home.model_copy(update=changes)
        supervisor = Supervisor(
            settings, redis_url, workers, worker_command=SAMPLE_WORKER, learner_command=None, sweep_command=None
        )
        supervisor.start()
        started.append(supervisor)
        return supervisor

    yield start
    for supervisor in started:
        supervisor.stop()
