"""No job is lost with a process, and no process stays without its supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from observe import gone, info, marked, reaches, ready, until
from redis import Redis
from sample_jobs import Events, task

from anomaly_workers import machine, salvage, supervisor
from anomaly_workers.queues import QUEUES, Queues
from anomaly_workers.salvage import Salvage
from anomaly_workers.scripts import Scripts
from anomaly_workers.settings import Settings
from anomaly_workers.supervisor import Supervisor

pytestmark = pytest.mark.integration

Supervise = Callable[..., Supervisor]


def run_supervisor(settings: Settings, workers: int) -> subprocess.Popen[bytes]:
    environ = os.environ | {"ANOMALY_REDIS_URL": settings.redis_url, "ANOMALY_DATA_DIR": str(settings.data_dir)}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("sample_supervisor.py")), str(workers)], env=environ
    )


def test_the_job_of_a_killed_worker_runs_again_within_two_seconds(
    queues: Queues, events: Events, supervise: Supervise
) -> None:
    supervise(workers=2)
    until(ready(queues, 2))
    [job_id] = queues.enqueue_score(1, "v1", [task(1, "work 3")])
    until(lambda: events.tasks("begin") == [1])
    os.kill(int(events.of("begin")[0][2]), signal.SIGKILL)
    took = until(lambda: len(events.tasks("begin")) == 2)
    assert took < 2
    until(reaches(queues, job_id, "finished"))
    until(ready(queues, 2))
    assert sum(queues.depth().values()) == 0


def test_an_idle_worker_killed_takes_no_job_along(queues: Queues, events: Events, supervise: Supervise) -> None:
    watched = supervise()
    until(ready(queues))
    old = watched.pids
    os.kill(old[0], signal.SIGKILL)
    ids = queues.enqueue_score(1, "v1", [task(number) for number in range(8)])
    for job_id in ids:
        until(reaches(queues, job_id, "finished"))
    assert watched.pids != old
    assert sorted(events.tasks("end")) == list(range(8))


def test_a_job_that_kills_its_workers_ends(queues: Queues, events: Events, supervise: Supervise) -> None:
    supervise(workers=2)
    [poison] = queues.enqueue_score(1, "v1", [task(1, "die")])
    [good] = queues.enqueue_score(1, "v1", [task(2)])
    until(reaches(queues, poison, "failed"))
    assert info(queues, poison).message == "Killed its worker 3 times; the last one ended with signal 9."
    assert events.tasks("begin").count(1) == 3
    until(reaches(queues, good, "finished"))


def test_one_long_call_out_of_time_costs_the_worker_and_fails_the_job(
    queues: Queues, events: Events, supervise: Supervise, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "HARD_GRACE", 1.0)
    queues._settings = settings.model_copy(update={"job_timeout": 1})
    supervise()
    until(ready(queues))
    [job_id] = queues.enqueue_score(1, "v1", [task(1, "native 30")])
    took = until(reaches(queues, job_id, "failed"))
    assert took < 6
    assert "native code" in info(queues, job_id).message
    [after] = queues.enqueue_score(1, "v1", [task(2)])
    until(reaches(queues, after, "finished"))


def test_a_long_call_is_cancelled_at_the_cost_of_its_worker(
    queues: Queues, events: Events, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "CANCEL_GRACE", 0.5)
    supervise()
    [job_id] = queues.enqueue_score(1, "v1", [task(1, "native 30")])
    until(lambda: events.tasks("begin") == [1])
    assert queues.cancel(job_id)
    assert until(reaches(queues, job_id, "cancelled")) < 20, "the call itself takes 30 s"


def test_stop_lets_short_jobs_finish_and_queues_long_ones_again(
    queues: Queues, events: Events, supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STOP_GRACE", 2.0)
    watched = supervise(workers=2)
    until(ready(queues, 2))
    [short] = queues.enqueue_score(1, "v1", [task(1, "silent 1")])
    [long] = queues.enqueue_score(1, "v1", [task(2, "silent 30")])
    until(lambda: len(events.tasks("begin")) == 2)
    begin = time.monotonic()
    watched.stop()
    assert time.monotonic() - begin < 4
    assert info(queues, short).state == "finished"
    assert info(queues, long).state == "queued"
    assert queues.depth()["score"] == 1
    assert marked(tmp_path) == []
    assert queues.workers() == []


def test_a_killed_supervisor_leaves_no_worker_and_its_successor_goes_on(
    queues: Queues, events: Events, supervise: Supervise, settings: Settings
) -> None:
    first = run_supervisor(settings, workers=1)
    ids = queues.enqueue_score(1, "v1", [task(number, "silent 0.3") for number in range(8)])
    until(lambda: events.tasks("begin"))
    worker = int(events.of("begin")[0][2])
    first.kill()
    first.wait()
    until(gone(worker))
    supervise()
    for job_id in ids:
        until(reaches(queues, job_id, "finished"))
    assert sorted(events.tasks("end")) == list(range(8))


def test_everything_killed_at_once_loses_nothing(queues: Queues, events: Events, supervise: Supervise) -> None:
    watched = supervise(workers=2)
    ids = queues.enqueue_score(1, "v1", [task(number, "silent 0.1") for number in range(40)])
    for ended in (8, 20):
        until(lambda ended=ended: len(events.tasks("end")) >= ended)  # type: ignore[misc]
        for pid in [*watched.pids, int(queues.connection.info("server")["process_id"])]:
            os.kill(pid, signal.SIGKILL)
    for job_id in ids:
        until(reaches(queues, job_id, "finished"))
    assert set(events.tasks("end")) == set(range(40))


def test_terminating_the_process_stops_everything(queues: Queues, settings: Settings, tmp_path: Path) -> None:
    process = run_supervisor(settings, workers=2)
    until(ready(queues, 2))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert marked(tmp_path) == []


def test_a_living_worker_of_another_host_is_left_alone(queues: Queues, connection: Redis) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1)])
    connection.hset("rq:worker:far", mapping={"machine": "elsewhere", "pid": 1})
    connection.sadd("rq:workers", "rq:worker:far")
    assert Scripts(connection).claim(args=["far", *QUEUES])
    rescue = Salvage(connection)
    rescue._just_restarted = lambda: False  # type: ignore[method-assign]
    rescue.bury_the_dead(known=())
    assert queues.depth()["score"] == 0

    connection.delete("rq:worker:far")  # expired: it was silent
    rescue.bury_the_dead(known=())
    assert queues.depth()["score"] == 1
    assert info(queues, job_id).state == "queued"


def test_a_worker_that_slept_with_its_machine_keeps_its_job(queues: Queues, connection: Redis) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1)])
    connection.lrem("rq:queue:score", 1, job_id)
    connection.hset(f"rq:job:{job_id}", mapping={"status": "started", "worker_name": "near"})
    connection.hset("rq:worker:near", mapping={"machine": machine.identity(), "pid": os.getpid()})
    connection.sadd("rq:workers", "rq:worker:near")
    connection.hset(f"rq:execution:{job_id}:execution", "worker_name", "near")
    connection.zadd("rq:wip:score", {f"{job_id}:execution": time.time() - 100})
    rescue = Salvage(connection)
    rescue._just_restarted = lambda: False  # type: ignore[method-assign]
    rescue.bury_the_dead(known=())
    assert queues.depth()["score"] == 0

    connection.hset("rq:worker:near", "pid", 2**22 + 1)  # no process has this id
    rescue.bury_the_dead(known=())
    assert queues.depth()["score"] == 1


def test_the_silent_worker_of_another_host_gives_its_job_back(queues: Queues, connection: Redis) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1)])
    connection.lrem("rq:queue:score", 1, job_id)
    connection.hset(f"rq:job:{job_id}", mapping={"status": "started", "worker_name": "far"})
    rescue = Salvage(connection)
    for deaths in range(1, salvage.MOST_KILLS + 1):
        connection.lrem("rq:queue:score", 1, job_id)
        connection.zadd("rq:wip:score", {f"{job_id}:execution": time.time() - 1})
        rescue.bury_the_dead(known=())
        assert connection.zcard("rq:wip:score") == 1, "no judgement while Redis has just restarted"
        rescue._just_restarted = lambda: False  # type: ignore[method-assign]
        rescue.bury_the_dead(known=())
        assert connection.zcard("rq:wip:score") == 0
        del rescue._just_restarted
        assert info(queues, job_id).state == ("failed" if deaths == salvage.MOST_KILLS else "queued")
    assert "3 times" in info(queues, job_id).message


def test_two_supervisors_share_one_redis(queues: Queues, events: Events, supervise: Supervise) -> None:
    supervise()
    supervise()
    until(ready(queues, 2))
    ids = queues.enqueue_score(1, "v1", [task(number, "silent 0.2") for number in range(24)])
    for job_id in ids:
        until(reaches(queues, job_id, "finished"))
    assert sorted(events.tasks("begin")) == list(range(24)), "each task once"
    assert len({words[2] for words in events.of("begin")}) == 2


def test_each_worker_gets_a_gpu_of_its_own_without_loading_cuda(settings: Settings) -> None:
    two = {"CUDA_VISIBLE_DEVICES": "3,GPU-5f"}
    seen = [place["CUDA_VISIBLE_DEVICES"] for place in supervisor._places(settings, 0, two)]
    assert seen == ["3", "GPU-5f"]
    shared = [place["CUDA_VISIBLE_DEVICES"] for place in supervisor._places(settings, 3, two)]
    assert shared == ["3", "GPU-5f", "3"]
    one = list(supervisor._places(settings, 0, {"CUDA_VISIBLE_DEVICES": "0"}))
    assert one == [{"CUDA_VISIBLE_DEVICES": "0"}]


def test_workers_without_a_gpu_share_the_processor(settings: Settings) -> None:
    none = {"CUDA_VISIBLE_DEVICES": "-1"}
    assert list(supervisor._places(settings, 0, none)) == [none]
    share = [int(place["OMP_NUM_THREADS"]) for place in supervisor._places(settings, 2, none)]
    assert share == [max(1, (os.cpu_count() or 1) // 2)] * 2
