"""Queues, as the processes without torch see them: add jobs, list them, cancel them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, cast

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.client import Pipeline
from redis.retry import Retry as RedisRetry
from rq.command import send_command
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job, JobStatus, Retry
from rq.serializers import JSONSerializer
from rq.utils import utcformat, utcparse

from anomaly_workers.jobkey import FeedbackKey, FitKey, JobKey, RankKey, ScoreKey, ThresholdKey, parse_key
from anomaly_workers.scripts import Scripts, text
from anomaly_workers.settings import Settings
from anomaly_workers.types import JobInfo, Task

QUEUES = ("interactive", "score", "learn")
"""Names of the queues; earlier ones go first, always."""

LEARN = "learn"
"""The queue whose jobs take long; a worker of its own runs them."""

JOBS = {kind: f"anomaly_workers.jobs.{kind}" for kind in ("score", "fit", "feedback", "threshold", "rank")}
"""The functions that jobs may call, by kind."""

RETRY_SECONDS = (1, 5, 20)
RESULT_SECONDS = 300
FAILURE_SECONDS = 7 * 24 * 3600

_STATES = {
    "queued": "queued",
    "started": "running",
    "scheduled": "retrying",
    "failed": "failed",
    "finished": "finished",
    "stopped": "cancelled",
    "canceled": "cancelled",
}
_EXPLAINED = ("retrying", "failed", "cancelled", "queued")


def connect(url: str, *, tries: int = 20) -> Redis:
    """Return a connection that outlives about a minute without its server; fewer `tries` for who cannot wait."""
    return Redis.from_url(url, retry=RedisRetry(ExponentialBackoff(cap=5), tries), health_check_interval=30)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that has not said goodbye.

    Attributes:
        name: its name, which begins with its host's.
        state: "starting", "idle" or "busy".
        age: seconds since its last heartbeat.
        device: where its models live, "" before they are loaded.
        job: id of the job it runs, "" if none.
    """

    name: str
    state: str
    age: float
    device: str
    job: str


class Queues:
    """The three queues of one Redis."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.connection = connection
        self._settings = settings
        self._scripts = Scripts(connection)

    def enqueue_score(self, project: int, version: str, tasks: Sequence[Task], *, urgent: bool = False) -> list[str]:
        """Have `tasks` scored, in batches; return the job ids.

        A batch that is queued or running already is not added again, but moved ahead if it is urgent now.
        """
        queue = "interactive" if urgent else "score"
        ids = []
        with self.connection.pipeline(transaction=False) as pipeline:
            for batch in _batches(tasks, self._settings.batch_size):
                key = ScoreKey.of(project, version, (task.id for task in batch))
                fields = self._fields(key, _score_payload(project, version, batch))
                fields["tasks"] = ",".join(str(task.id) for task in batch)
                fields["description"] = f"score {len(batch)} images of project {project} with {version}"
                self._scripts.add(args=[str(key), queue, "1" if urgent else "", *_flat(fields)], client=pipeline)
                ids.append(str(key))
            pipeline.execute()
        return ids

    def enqueue_fit(self, project: int, run: str) -> str:
        """Have the project's detector fitted; return the id of the job that will do it.

        At most one fit of a project waits, and it is returned when there is one: it will see everything that is
        there when it starts. While one runs another may wait, so that the last click is never lost.
        """
        key = FitKey(project, run)
        fields = self._fields(key, {"project": project, "run": run})
        fields["description"] = f"fit project {project}"
        return text(self._scripts.add_next(args=[str(key), LEARN, *_flat(fields)]))

    def enqueue_feedback(self, project: int) -> str:
        """Have the project's annotations looked at soon; return the id of the job that will do it.

        At most one look waits while one runs, so that whatever comes during a look is seen by the next.
        """
        key = FeedbackKey(project)
        fields = self._fields(key, {"project": project})
        fields["description"] = f"read the annotations of project {project}"
        return text(self._scripts.add_next(args=[str(key), "interactive", *_flat(fields)]))

    def enqueue_threshold(self, project: int) -> str:
        """Have the project's threshold moved to where its policy wants it; return the id of the job that will do it.

        At most one move waits while one runs, so that whatever is decided during a move is seen by the next.
        """
        key = ThresholdKey(project)
        fields = self._fields(key, {"project": project})
        fields["description"] = f"move the threshold of project {project}"
        return text(self._scripts.add_next(args=[str(key), "interactive", *_flat(fields)]))

    def enqueue_rank(self, project: int) -> str:
        """Have the project's review queue ordered again; return the id of the job that will do it."""
        key = RankKey(project)
        fields = self._fields(key, {"project": project})
        fields["description"] = f"order the review queue of project {project}"
        return text(self._scripts.add_next(args=[str(key), LEARN, *_flat(fields)]))

    def busy(self, project: int, version: str) -> frozenset[int]:
        """Return the ids of the tasks that are queued, running or waiting for another try with `version`."""
        return self._tasks(self._under_way(("interactive", "score")), project, version)

    def failed(self, project: int, version: str) -> frozenset[int]:
        """Return the ids of the tasks in failed and cancelled jobs of `version`, for as long as those are kept."""
        return self._tasks(self._ended("failed", ("interactive", "score")), project, version)

    def given_up(self, project: int, version: str) -> frozenset[int]:
        """Return the ids of the tasks whose job somebody cancelled, or which cost too many workers.

        Nobody should queue them again by themselves; other failed jobs may be repeated.
        """
        ended = self._ended("failed", ("interactive", "score"))
        stored = zip(ended, self._read(ended, ("status", "reason")), strict=True)
        final = [
            job_id
            for job_id, values in stored
            if _STATES.get(values["status"]) == "cancelled" or " worker " in f"{values['reason']} "
        ]
        return self._tasks(final, project, version)

    def fitting(self, project: int) -> bool:
        """Tell whether a fit of the project is queued, running or waiting for another try."""
        return self.under_way(project, "fit")

    def under_way(self, project: int, kind: str) -> bool:
        """Tell whether a job of a kind is queued, running or waiting for another try."""
        keys = (parse_key(job_id) for job_id in self._under_way(QUEUES))
        return any(key is not None and (key.kind, key.project) == (kind, project) for key in keys)

    def gave_up_fitting(self, project: int, *, within: float) -> bool:
        """Tell whether a fit of the project failed for good, or was cancelled, in the last `within` seconds."""
        return self._gave_up(FitKey, LEARN, project, within=within)

    def gave_up_moving(self, project: int, *, within: float) -> bool:
        """Tell whether a move of the project's threshold failed for good, or was cancelled, in the last seconds."""
        return self._gave_up(ThresholdKey, "interactive", project, within=within)

    def gave_up_ranking(self, project: int, *, within: float) -> bool:
        """Tell whether an ordering of the project's queue failed for good, or was cancelled, in the last seconds."""
        return self._gave_up(RankKey, LEARN, project, within=within)

    def jobs(self, project: int | None = None) -> list[JobInfo]:
        """Return all jobs that are kept, of one project or of all: what runs first, what has ended last."""
        ids = [*self._under_way(QUEUES), *self._ended("failed", QUEUES), *self._ended("finished", QUEUES)]
        wanted = [job_id for job_id in dict.fromkeys(ids) if project in (None, _project(job_id))]
        fields = ("status", "origin", "worker_name", "meta", "reason")
        stored = self._read(wanted, fields)
        found = (_info(job_id, values) for job_id, values in zip(wanted, stored, strict=True) if values["status"])
        return sorted(found, key=lambda job: _ORDER[job.state])

    def cancel(self, job_id: str) -> bool:
        """Take a waiting job out, or ask the running one to stop; False if it is neither."""
        answer = self._scripts.cancel(args=[job_id, time.time()])
        if answer is None:
            return False
        if (worker := text(answer)) not in ("removed", ""):
            # Should this not arrive, the job meets its flag at its next progress.
            send_command(self.connection, worker, "stop-job", job_id=job_id)
        return True

    def depth(self) -> dict[str, int]:
        """Return how many jobs wait in each queue."""
        with self.connection.pipeline(transaction=False) as pipeline:
            for queue in QUEUES:
                pipeline.llen(_queue_key(queue))
            return dict(zip(QUEUES, pipeline.execute(), strict=True))

    def workers(self) -> list[WorkerInfo]:
        """Return the workers of all hosts, by name."""
        keys = sorted(text(key) for key in self.connection.smembers(f"{RQ_KEY_PREFIX}:workers"))
        with self.connection.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hgetall(key)
                pipeline.srandmember(f"{key}:executions")
            answers = pipeline.execute()
        rows = zip(keys, answers[::2], answers[1::2], strict=True)
        return [_worker(key, stored, job) for key, stored, job in rows if _alive(stored)]

    def _fields(self, key: JobKey, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Return what RQ stores of a job."""
        job = Job.create(
            JOBS[key.kind],
            kwargs=dict(payload),
            connection=self.connection,
            id=str(key),
            serializer=JSONSerializer,
            description=str(key),
            timeout=self._settings.job_timeout,
            result_ttl=RESULT_SECONDS,
            failure_ttl=FAILURE_SECONDS,
            retry=Retry(max=len(RETRY_SECONDS), interval=list(RETRY_SECONDS)),
            status=JobStatus.QUEUED,
        )
        return job.to_dict() | {"enqueued_at": utcformat(datetime.now(UTC))}

    def _gave_up(self, kind: type[JobKey], queue: str, project: int, *, within: float) -> bool:
        since = time.time() + FAILURE_SECONDS - within  # the registry holds when a job is forgotten
        recent = self.connection.zrangebyscore(f"{RQ_KEY_PREFIX}:failed:{queue}", f"({since}", "+inf")
        keys = (parse_key(text(job_id)) for job_id in cast("list[bytes]", recent))
        return any(isinstance(key, kind) and key.project == project for key in keys)

    def _under_way(self, queues: Iterable[str]) -> list[str]:
        with self.connection.pipeline() as pipeline:
            for queue in queues:
                _read_under_way(pipeline, queue)
            answers = pipeline.execute()
        ids = (text(entry).partition(":")[0] for answer in answers for entry in answer)
        return list(dict.fromkeys(ids))

    def _ended(self, registry: str, queues: Iterable[str]) -> list[str]:
        with self.connection.pipeline(transaction=False) as pipeline:
            for queue in queues:
                pipeline.zrange(f"{RQ_KEY_PREFIX}:{registry}:{queue}", 0, -1, desc=True)
            return [text(job_id) for answer in pipeline.execute() for job_id in answer]

    def _tasks(self, ids: Iterable[str], project: int, version: str) -> frozenset[int]:
        keys = ((job_id, parse_key(job_id)) for job_id in ids)
        ours = [
            job_id
            for job_id, key in keys
            if isinstance(key, ScoreKey) and (key.project, key.version) == (project, version)
        ]
        listed = (values["tasks"] for values in self._read(ours, ("tasks",)))
        return frozenset(int(number) for numbers in listed for number in numbers.split(",") if number.isdigit())

    def _read(self, ids: Sequence[str], fields: Sequence[str]) -> list[dict[str, str]]:
        with self.connection.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hmget(Job.key_for(job_id), list(fields))
            answers = pipeline.execute()
        return [dict(zip(fields, map(text, answer), strict=True)) for answer in answers]


_ORDER = {
    state: order for order, state in enumerate(("running", "retrying", "queued", "failed", "cancelled", "finished"))
}


def _batches(tasks: Sequence[Task], size: int) -> Iterable[list[Task]]:
    distinct = iter({task.id: task for task in tasks}.values())
    while batch := list(islice(distinct, size)):
        yield batch


def _score_payload(project: int, version: str, tasks: Iterable[Task]) -> dict[str, Any]:
    listed = [{"id": task.id, "data": dict(task.data)} for task in tasks]
    return {"project": project, "version": version, "tasks": listed}


def _flat(fields: Mapping[str, Any]) -> list[Any]:
    return [item for pair in fields.items() for item in pair]


def _read_under_way(pipeline: Pipeline, queue: str) -> None:
    pipeline.zrange(f"{RQ_KEY_PREFIX}:wip:{queue}", 0, -1)
    pipeline.lrange(f"{_queue_key(queue)}:intermediate", 0, -1)
    pipeline.zrange(f"{RQ_KEY_PREFIX}:scheduled:{queue}", 0, -1)
    pipeline.lrange(_queue_key(queue), 0, -1)


def _queue_key(queue: str) -> str:
    return f"{RQ_KEY_PREFIX}:queue:{queue}"


def _project(job_id: str) -> int | None:
    key = parse_key(job_id)
    return key.project if key else None


def _info(job_id: str, stored: Mapping[str, str]) -> JobInfo:
    key = parse_key(job_id)
    state = _STATES.get(stored["status"], "queued")
    percent, stage = _progress(stored["meta"])
    return JobInfo(
        id=job_id,
        kind=key.kind if key else "unknown",
        state=state,
        project=key.project if key else 0,
        percent=100 if state == "finished" else percent if state == "running" else 0,
        message=stage if state == "running" else stored["reason"] if state in _EXPLAINED else "",
        queue=stored["origin"],
        worker=stored["worker_name"] if state == "running" else "",
    )


def _progress(meta: str) -> tuple[int, str]:
    try:
        stored = json.loads(meta or "{}")
        return int(stored.get("percent", 0)), str(stored.get("stage", ""))
    except (ValueError, TypeError, AttributeError):
        return 0, ""  # not written by a worker of ours


def _alive(stored: Mapping[bytes, bytes]) -> bool:
    return b"last_heartbeat" in stored and b"death" not in stored


def _worker(key: str, stored: Mapping[bytes, bytes], execution: bytes | None) -> WorkerInfo:
    beat = utcparse(text(stored[b"last_heartbeat"]))
    return WorkerInfo(
        name=key.removeprefix(f"{RQ_KEY_PREFIX}:worker:"),
        state=text(stored.get(b"state", b"starting")).replace("started", "starting"),
        age=max(0.0, (datetime.now(UTC) - beat).total_seconds()),
        device=text(stored.get(b"device", b"")),
        job=text(execution or b"").partition(":")[0],
    )
