"""A worker stays warm, takes urgent work first, stops when told, and runs nothing that is not listed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from observe import info, reaches, state, until
from redis import Redis
from sample_jobs import Events, task

from anomaly_workers import server
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings
from anomaly_workers.supervisor import Supervisor

pytestmark = pytest.mark.integration

Supervise = Callable[..., Supervisor]


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


def test_progress_is_shown(queues: Queues, supervise: Supervise) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1, "work 1.5")])
    supervise()
    until(lambda: info(queues, job_id).percent >= 20)
    now = info(queues, job_id)
    assert (now.state, now.message) == ("running", "working")
    assert [now.worker] == [worker.name for worker in queues.workers()]
    assert queues.workers()[0].job == job_id
    until(reaches(queues, job_id, "finished"))


@pytest.mark.parametrize("do", ["work 30", "silent 30", "swallow 30"])
def test_a_running_job_is_cancelled_and_the_worker_stays_warm(
    queues: Queues, events: Events, supervise: Supervise, do: str
) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1, do)])
    supervise()
    until(lambda: events.tasks("begin") == [1])
    assert queues.cancel(job_id)
    took = until(reaches(queues, job_id, "cancelled"))
    assert took < 2
    assert info(queues, job_id).message == "Cancelled."
    [after] = queues.enqueue_score(1, "v1", [task(2)])
    until(reaches(queues, after, "finished"))
    assert len({words[2] for words in events.of("begin")}) == 1
    assert events.tasks("end") == [2]


def test_a_failure_is_tried_again_with_a_growing_delay(queues: Queues, events: Events, supervise: Supervise) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1, "fail 1")])
    supervise()
    until(reaches(queues, job_id, "retrying"))
    assert info(queues, job_id).message == "ValueError: not yet"
    assert queues.busy(1, "v1") == {1}
    assert until(reaches(queues, job_id, "finished")) < 4
    assert events.tasks("begin") == [1, 1]


def test_a_waiting_retry_can_be_cancelled(queues: Queues, events: Events, supervise: Supervise) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1, "fail 9")])
    supervise()
    until(lambda: len(events.tasks("begin")) == 2 and state(queues, job_id) == "retrying")
    assert queues.cancel(job_id)
    assert state(queues, job_id) == "cancelled"


def test_what_another_try_does_not_cure_fails_at_once_in_one_line(
    queues: Queues, events: Events, supervise: Supervise
) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1, "misconfigured")])
    supervise()
    until(reaches(queues, job_id, "failed"))
    assert info(queues, job_id).message == "Set the thing."
    assert events.tasks("begin") == [1]
    assert queues.failed(1, "v1") == {1}


def test_a_job_out_of_time_fails_even_if_it_swallows_exceptions(
    queues: Queues, supervise: Supervise, settings: Settings
) -> None:
    queues._settings = settings.model_copy(update={"job_timeout": 1})
    [job_id] = queues.enqueue_score(1, "v1", [task(1, "swallow 30")])
    supervise()
    until(reaches(queues, job_id, "failed"))
    assert "1 s" in info(queues, job_id).message


def test_a_foreign_function_is_refused_and_not_run(
    queues: Queues, connection: Redis, supervise: Supervise, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    job_id = forge(connection, json.dumps(["os.system", None, [f"touch {trace}"], {}]).encode())
    supervise()
    until(reaches(queues, job_id, "failed"))
    assert info(queues, job_id).message == "Refused: 'os.system' is not a job of this worker."
    assert not trace.exists()


def test_a_pickled_payload_is_refused_and_not_run(
    queues: Queues, connection: Redis, supervise: Supervise, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {trace}",)

    job_id = forge(connection, pickle.dumps(Trap()), meta=pickle.dumps(Trap()))
    supervise()
    until(reaches(queues, job_id, "failed"))
    assert not trace.exists()
    queues.jobs()
    assert not trace.exists()


def test_callbacks_webhooks_and_instances_are_refused(
    queues: Queues, connection: Redis, supervise: Supervise, tmp_path: Path
) -> None:
    good = json.dumps(["anomaly_workers.jobs.fit", None, [], {"project": 1, "run": "x"}]).encode()
    supervise()
    hook = json.dumps([{"url": "http://127.0.0.1:1/", "job_status": "failed", "method": "GET", "headers": None}])
    for fields in (
        {"success_callback_name": "os.abort"},
        {"failure_callback_name": "os.abort"},
        {"stopped_callback_name": "os.abort"},
        {"webhooks": hook},
    ):
        until(reaches(queues, forge(connection, good, **fields), "failed"))
        assert info(queues, "forged").message.startswith("Refused: a job with "), fields
        connection.delete("rq:job:forged", "rq:failed:score")
    instance = json.dumps(["anomaly_workers.jobs.fit", {"a": 1}, [], {"project": 1, "run": "x"}]).encode()
    until(reaches(queues, forge(connection, instance), "failed"))
    assert info(queues, "forged").message.startswith("Refused")


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
    until(lambda: len(events.tasks("end")) == 8, 30)
    until(reaches(queues, running, "finished"))
    assert sorted(events.tasks("begin")) == list(range(8)), "each task once"
    assert len({words[2] for words in events.of("begin")}) == 1, "the worker stayed"
