"""A worker stays warm, takes urgent work first, stops when told, and runs nothing that is not listed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from observe import SAMPLE_WORKER, info, reaches, state, until
from redis import Redis
from sample_jobs import Events, task

from anomaly_workers import server
from anomaly_workers.queues import Queues, connect
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.supervisor import Supervisor

pytestmark = pytest.mark.integration

Supervise = Callable[..., Supervisor]


@dataclass
class Bench:
    """One worker that many tests use in turn; each takes task numbers of its own."""

    settings: Settings
    connection: Redis
    queues: Queues
    events: Events
    numbers: Iterator[int]

    def score(self, do: str) -> tuple[int, str]:
        """Queue one task; return its number and its job's id."""
        number = next(self.numbers)
        [job_id] = self.queues.enqueue_score(1, "v1", [task(number, do)])
        return number, job_id

    def count(self, what: str, number: int) -> int:
        return self.events.tasks(what).count(number)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    home = load_settings({}, data_dir=tmp_path_factory.mktemp("bench"), job_timeout=60, log_level="WARNING")
    url = server.ensure(home)
    settings = home.model_copy(update={"redis_url": url})
    supervisor = Supervisor(settings, url, 1, worker_command=SAMPLE_WORKER, learner_command=None, sweep_command=None)
    supervisor.start()
    with connect(url) as connection:
        yield Bench(settings, connection, Queues(connection, settings), Events(home.data_dir), count())
    supervisor.stop()
    server.stop(home)


def forge(connection: Redis, data: bytes, **fields: str | bytes) -> str:
    """Put a job into Redis as somebody could who can write to it."""
    plain = {"status": "queued", "origin": "score", "timeout": "5"}
    for name, value in {"data": data, **plain, **fields}.items():
        connection.hset("rq:job:forged", name, value)
    connection.rpush("rq:queue:score", "forged")
    return "forged"


def test_one_process_runs_all_jobs_and_stays_warm(queues: Queues, events: Events, supervise: Supervise) -> None:
    ids = queues.enqueue_score(1, "v1", [task(number) for number in range(12)])
    supervise()
    for job_id in ids:
        until(reaches(queues, job_id, "finished"))
    assert events.tasks("end") == list(range(12)), "in the order they came"
    assert len({words[2] for words in events.of("end")}) == 1
    assert [int(words[3]) for words in events.of("end")] == list(range(1, 13))
    assert sum(queues.depth().values()) == 0
    [worker] = queues.workers()
    assert (worker.state, worker.device, worker.job) == ("idle", "sample", "")
    assert worker.age < 15


def test_urgent_then_scoring_then_learning(queues: Queues, events: Events, supervise: Supervise) -> None:
    fit = queues.enqueue_fit(1, "a")
    queues.enqueue_score(1, "v1", [task(number) for number in range(8)])
    queues.enqueue_score(1, "v1", [task(100)], urgent=True)
    supervise()
    until(reaches(queues, fit, "finished"))
    assert events.tasks("begin") == [100, *range(8)]


def test_progress_is_shown(bench: Bench) -> None:
    _number, job_id = bench.score("work 1.5")
    until(lambda: info(bench.queues, job_id).percent >= 20)
    now = info(bench.queues, job_id)
    [worker] = bench.queues.workers()
    assert (now.state, now.message, now.worker) == ("running", "working", worker.name)
    assert worker.job == job_id
    until(reaches(bench.queues, job_id, "finished"))


@pytest.mark.parametrize("do", ["work 30", "silent 30", "swallow 30"])
def test_a_running_job_is_cancelled_and_the_worker_stays_warm(bench: Bench, do: str) -> None:
    number, job_id = bench.score(do)
    until(lambda: bench.count("begin", number))
    assert bench.queues.cancel(job_id)
    assert until(reaches(bench.queues, job_id, "cancelled")) < 2
    assert info(bench.queues, job_id).message == "Cancelled."
    after, job_id = bench.score("nothing")
    until(reaches(bench.queues, job_id, "finished"))
    assert bench.count("end", number) == 0
    pids = {words[2] for words in bench.events.of("begin") if int(words[0]) in (number, after)}
    assert len(pids) == 1


def test_a_failure_is_tried_again_with_a_growing_delay(bench: Bench) -> None:
    number, job_id = bench.score("fail 1")
    until(reaches(bench.queues, job_id, "retrying"))
    assert info(bench.queues, job_id).message == "ValueError: not yet"
    assert number in bench.queues.busy(1, "v1")
    assert until(reaches(bench.queues, job_id, "finished")) < 4
    assert bench.count("begin", number) == 2


def test_a_waiting_retry_can_be_cancelled(bench: Bench) -> None:
    number, job_id = bench.score("fail 9")
    until(lambda: bench.count("begin", number) == 2 and state(bench.queues, job_id) == "retrying")
    assert bench.queues.cancel(job_id)
    until(reaches(bench.queues, job_id, "cancelled"))
    assert bench.count("begin", number) == 2


def test_what_another_try_does_not_cure_fails_at_once_in_one_line(bench: Bench) -> None:
    number, job_id = bench.score("misconfigured")
    until(reaches(bench.queues, job_id, "failed"))
    assert info(bench.queues, job_id).message == "Set the thing."
    assert bench.count("begin", number) == 1
    assert number in bench.queues.failed(1, "v1")


def test_a_job_out_of_time_fails_even_if_it_swallows_exceptions(bench: Bench) -> None:
    impatient = Queues(bench.connection, bench.settings.model_copy(update={"job_timeout": 1}))
    [job_id] = impatient.enqueue_score(1, "v1", [task(next(bench.numbers), "swallow 30")])
    until(reaches(bench.queues, job_id, "failed"))
    assert "1 s" in info(bench.queues, job_id).message


def refusal(bench: Bench, data: bytes, **fields: str | bytes) -> str:
    """Return what becomes of a forged job."""
    until(reaches(bench.queues, forge(bench.connection, data, **fields), "failed"))
    message = info(bench.queues, "forged").message
    bench.connection.delete("rq:job:forged")
    bench.connection.zrem("rq:failed:score", "forged")
    return message


def test_a_foreign_function_is_refused_and_not_run(bench: Bench, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    said = refusal(bench, json.dumps(["os.system", None, [f"touch {trace}"], {}]).encode())
    assert said == "Refused: 'os.system' is not a job of this worker."
    assert not trace.exists()


def test_a_pickled_payload_is_refused_and_not_run(bench: Bench, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {trace}",)

    said = refusal(bench, pickle.dumps(Trap()), meta=pickle.dumps(Trap()))
    assert said == "Refused: the job's payload is not JSON."
    assert not trace.exists()


def test_callbacks_webhooks_and_instances_are_refused(bench: Bench) -> None:
    good = json.dumps(["anomaly_workers.jobs.fit", None, [], {"project": 1, "run": "x"}]).encode()
    for name in ("success_callback_name", "failure_callback_name", "stopped_callback_name"):
        assert refusal(bench, good, **{name: "os.abort"}) == f"Refused: a job with {name}."
    hook = {"url": "http://127.0.0.1:1/", "job_status": "failed", "method": "GET", "headers": None}
    assert refusal(bench, good, webhooks=json.dumps([hook])) == "Refused: a job with webhooks."
    instance = json.dumps(["anomaly_workers.jobs.fit", {"a": 1}, [], {"project": 1, "run": "x"}]).encode()
    assert "keyword arguments only" in refusal(bench, instance)


def test_a_job_that_cannot_be_read_is_dropped(queues: Queues, connection: Redis, supervise: Supervise) -> None:
    forge(connection, b"[]", created_at="long ago")
    connection.rpush("rq:queue:score", "no-such-job")
    [job_id] = queues.enqueue_score(1, "v1", [task(1)])
    supervise()
    until(reaches(queues, job_id, "finished"))
    assert connection.llen("rq:queue:score:intermediate") == 0
    assert connection.hlen("rq:anomaly:claims") == 0


def test_a_job_survives_a_restart_of_redis(
    queues: Queues, events: Events, supervise: Supervise, home: Settings
) -> None:
    [running, *_] = queues.enqueue_score(1, "v1", [task(number, "work 0.5") for number in range(8)])
    supervise(redis_url=queues._settings.redis_url)  # a configured server: nobody starts it but us
    until(lambda: events.tasks("begin"))
    os.kill(int(queues.connection.info("server")["process_id"]), signal.SIGKILL)
    time.sleep(2)
    server.ensure(home)
    until(lambda: len(events.tasks("end")) == 8)
    until(reaches(queues, running, "finished"))
    assert sorted(events.tasks("begin")) == list(range(8)), "each task once"
    assert len({words[2] for words in events.of("begin")}) == 1, "the worker stayed"
