"""Jobs are values: asked twice they run once, and nothing that crashed blocks them."""

from __future__ import annotations

import time

import pytest
from redis import Redis
from rq.serializers import JSONSerializer
from sample_jobs import task

from anomaly_workers.allowed import AllowedJob
from anomaly_workers.jobkey import FitKey, ScoreKey, ThresholdKey, parse_key
from anomaly_workers.queues import JOBS, QUEUES, Queues
from anomaly_workers.scripts import Scripts
from anomaly_workers.types import Task

pytestmark = pytest.mark.integration


def take(connection: Redis, worker: str = "w") -> str:
    """Do what a worker does to get a job."""
    found = Scripts(connection).claim(args=[worker, *QUEUES])
    return found[1].decode() if found else ""


@pytest.mark.parametrize(
    "key", [ScoreKey.of(3, "v1.2_ä-x/y", [5, 4]), FitKey(12, "2026-11-22T10:00"), FitKey(1, "-"), ThresholdKey(4)]
)
def test_a_key_renders_to_an_id_and_parses_back(key: ScoreKey | FitKey | ThresholdKey) -> None:
    assert parse_key(str(key)) == key
    assert str(key).replace("-", "").replace("_", "").isalnum()


def test_the_order_of_tasks_does_not_matter() -> None:
    assert ScoreKey.of(1, "v", [1, 2]) == ScoreKey.of(1, "v", [2, 1]) != ScoreKey.of(1, "v", [1, 3])


def test_a_foreign_id_is_no_key() -> None:
    assert parse_key("score-1") is None
    assert parse_key("1f0e-uuid") is None


def test_the_same_tasks_are_queued_once(queues: Queues) -> None:
    tasks = [task(number) for number in range(10)]
    first = queues.enqueue_score(1, "v1", tasks)
    assert queues.enqueue_score(1, "v1", tasks) == first
    assert queues.depth() == {"interactive": 0, "score": 3, "learn": 0}
    assert queues.enqueue_score(1, "v2", tasks) != first


def test_the_payload_is_json_of_ids_and_data(queues: Queues, connection: Redis) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [Task(7, {"image": "/data/ä.png"})])
    job = AllowedJob.fetch(job_id, connection=connection, serializer=JSONSerializer)
    assert job.func_name == JOBS["score"]
    assert job.kwargs == {"project": 1, "version": "v1", "tasks": [{"id": 7, "data": {"image": "/data/ä.png"}}]}


def test_urgent_work_goes_first_even_if_it_was_queued_before(queues: Queues, connection: Redis) -> None:
    queues.enqueue_score(1, "v1", [task(1)])
    [second] = queues.enqueue_score(1, "v1", [task(2)])
    queues.enqueue_fit(1, "a")
    assert queues.enqueue_score(1, "v1", [task(2)], urgent=True) == [second]
    assert queues.depth() == {"interactive": 1, "score": 1, "learn": 1}
    assert take(connection) == second


def test_a_running_job_is_not_queued_again(queues: Queues, connection: Redis) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1)])
    assert take(connection) == job_id
    queues.enqueue_score(1, "v1", [task(1)])
    queues.enqueue_score(1, "v1", [task(1)], urgent=True)
    assert sum(queues.depth().values()) == 0


def test_a_job_that_no_list_holds_does_not_block_its_tasks(queues: Queues, connection: Redis) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1)])
    connection.delete("rq:queue:score")
    for status in ("queued", "started", "scheduled", "failed", "finished", "stopped"):
        connection.hset(f"rq:job:{job_id}", "status", status)
        assert queues.enqueue_score(1, "v1", [task(1)]) == [job_id]
        assert queues.depth()["score"] == 1, status
        connection.delete("rq:queue:score")


def test_at_most_one_fit_of_a_project_waits_and_the_last_click_is_not_lost(queues: Queues, connection: Redis) -> None:
    first = queues.enqueue_fit(1, "training")
    assert queues.enqueue_fit(1, "other") == first
    assert take(connection) == first

    second = queues.enqueue_fit(1, "training")
    assert second != first
    assert queues.enqueue_fit(1, "training") == second
    other = queues.enqueue_fit(2, "training")
    assert queues.depth()["learn"] == 2
    assert take(connection, "another worker") == other, "fits of one project run one after the other"
    assert queues.fitting(1)
    assert not queues.fitting(3)


def test_moves_of_a_threshold_and_looks_at_its_annotations_run_one_after_the_other(
    queues: Queues, connection: Redis
) -> None:
    first = queues.enqueue_threshold(1)
    assert queues.enqueue_threshold(1) == first
    assert queues.depth()["interactive"] == 1
    assert take(connection) == first

    second = queues.enqueue_threshold(1)
    assert second != first
    assert queues.enqueue_threshold(1) == second, "what is decided during a move is seen by the next"
    queues.enqueue_feedback(1)
    other = queues.enqueue_feedback(2)
    assert take(connection, "another worker") == other
    assert take(connection, "a third worker") == "", "both write what a version says"
    assert {(info.kind, info.project) for info in queues.jobs()} == {("threshold", 1), ("feedback", 1), ("feedback", 2)}


def test_a_cancelled_move_is_remembered_until_somebody_asks_again(queues: Queues) -> None:
    assert not queues.gave_up_moving(1, within=60)
    assert queues.cancel(queues.enqueue_threshold(1))
    assert queues.gave_up_moving(1, within=60)
    assert not queues.gave_up_moving(2, within=60)
    assert not queues.gave_up_fitting(1, within=60)
    queues.enqueue_threshold(1)
    assert not queues.gave_up_moving(1, within=60)


def test_busy_names_the_tasks_under_way(queues: Queues, connection: Redis) -> None:
    queues.enqueue_score(1, "v1", [task(number) for number in range(8)])
    take(connection)
    assert queues.busy(1, "v1") == frozenset(range(8))
    assert queues.busy(1, "v2") == queues.busy(2, "v1") == queues.failed(1, "v1") == frozenset()


def test_a_waiting_job_is_cancelled_at_once(queues: Queues) -> None:
    [job_id] = queues.enqueue_score(1, "v1", [task(1)])
    assert queues.cancel(job_id)
    assert not queues.cancel(job_id)
    assert not queues.cancel("nonsense")
    [info] = queues.jobs(1)
    assert (info.state, info.message) == ("cancelled", "Cancelled before it ran.")
    assert queues.busy(1, "v1") == frozenset()
    assert queues.failed(1, "v1") == {1}
    queues.enqueue_score(1, "v1", [task(1)])
    assert [info.state for info in queues.jobs()] == ["queued"]


def test_jobs_of_one_project_are_listed(queues: Queues) -> None:
    queues.enqueue_score(1, "v1", [task(1)])
    queues.enqueue_fit(2, "a")
    assert [(info.kind, info.project, info.state) for info in queues.jobs(2)] == [("fit", 2, "queued")]
    assert len(queues.jobs()) == 2


def test_a_forged_job_is_listed_without_being_believed(queues: Queues, connection: Redis) -> None:
    connection.hset("rq:job:forged", mapping={"status": "odd", "meta": "[1]", "data": b"\x80\x04."})
    connection.rpush("rq:queue:score", "forged")
    [info] = queues.jobs()
    assert (info.kind, info.state, info.percent) == ("unknown", "queued", 0)


def test_five_thousand_tasks_are_queued_quickly(queues: Queues, capsys: pytest.CaptureFixture[str]) -> None:
    queues._settings = queues._settings.model_copy(update={"batch_size": 16})
    tasks = [Task(number, {"image": f"/data/upload/1/0a1b2c3d-image-{number}.png"}) for number in range(5000)]
    begin = time.perf_counter()
    queues.enqueue_score(1, "v1", tasks)
    added = time.perf_counter() - begin
    begin = time.perf_counter()
    assert len(queues.busy(1, "v1")) == 5000
    listed = time.perf_counter() - begin
    with capsys.disabled():
        print(f"\n5,000 tasks queued in {added:.3f} s, found again in {listed:.3f} s")
    assert added < 1.0  # 0.1 s on an idle machine


def test_what_somebody_cancelled_is_not_queued_again_by_itself(queues: Queues) -> None:
    first, second = (
        queues.enqueue_score(1, "v1", [Task(1, {}), Task(2, {})]),
        queues.enqueue_score(1, "v1", [Task(3, {})]),
    )
    assert queues.given_up(1, "v1") == frozenset()
    queues.cancel(first[0])
    assert queues.given_up(1, "v1") == {1, 2}
    assert queues.busy(1, "v1") == {3}
    assert second


def test_a_fit_that_failed_is_remembered_for_a_while(queues: Queues) -> None:
    fit = queues.enqueue_fit(1, "first")
    assert not queues.gave_up_fitting(1, within=600)
    queues.cancel(fit)
    assert queues.gave_up_fitting(1, within=600)
    assert not queues.gave_up_fitting(2, within=600)
    assert not queues.gave_up_fitting(1, within=0)
    queues.enqueue_fit(1, "first")
    assert not queues.gave_up_fitting(1, within=600), "somebody asked for it again"
