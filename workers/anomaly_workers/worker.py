"""The warm worker: one process that keeps its models loaded and runs one job after the other.

RQ's SimpleWorker with what it lacks (see the notes in each method): a heartbeat while a job runs, a stop that
stops, timeouts that `except Exception` cannot swallow, three queues without a moment in which a job is nowhere,
and a list of the functions that may be called.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ConnectionError, TimeoutError
from rq import worker_registration
from rq.exceptions import DeserializationError, NoSuchJobError, TimeoutFormatError
from rq.executions import Execution
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.timeouts import UnixSignalDeathPenalty
from rq.worker import SimpleWorker
from rq.worker.base import WorkerStatus

from anomaly_workers import heap, lifeline, machine, server
from anomaly_workers.allowed import AllowedJob, check
from anomaly_workers.errors import AnomalyError, Cancelled, ConfigError, JobError, Unauthorized, WeightsError
from anomaly_workers.queues import LEARN, QUEUES, connect
from anomaly_workers.scripts import CLAIMS, Scripts, text
from anomaly_workers.settings import Settings, load_settings

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
DEADLINE_SECONDS = 30  # a worker that is silent this long is dead
POLL_SECONDS = 0.05
PROGRESS_SECONDS = 0.25

Allowed = Mapping[str, Callable[..., Any]]


class Interrupted(BaseException):
    """The running job is cancelled; not an Exception, so that no job can swallow it by accident."""


class OutOfTime(BaseException):
    """The running job has used up its time; not an Exception, for the same reason."""


PERMANENT = (Interrupted, OutOfTime, ConfigError, WeightsError, Unauthorized, JobError, DeserializationError)
"""What another try does not cure."""


class Deadline(UnixSignalDeathPenalty):
    """RQ's alarm with an exception that passes through `except Exception`."""

    def handle_death_penalty(self, signum: int, frame: FrameType | None) -> None:
        """Stop the job."""
        raise OutOfTime(f"Stopped after {self._timeout} s, the most a job may take (ANOMALY_JOB_TIMEOUT).")


class WarmWorker(SimpleWorker):
    """Runs the jobs of all queues in this process; `context` outlives them."""

    death_penalty_class = Deadline
    job_class = AllowedJob

    def __init__(
        self, connection: Redis, *, allow: Allowed, context: Any, name: str, queues: Sequence[str] = QUEUES
    ) -> None:
        super().__init__(
            list(queues), name=name, connection=connection, serializer=JSONSerializer, worker_ttl=DEADLINE_SECONDS
        )
        self._names = tuple(queues)
        self._allow = allow
        self._context = context
        self._scripts = Scripts(connection)
        self._interruptible: str | None = None
        self._finished = threading.Event()

    # Taking jobs

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """Wait for the next job, urgent ones first.

        RQ pops from several queues without a trace, so that a worker that dies at that moment takes the job along.
        Here the job goes to the queue's list of jobs taken, under this worker's name, in one step.
        """
        self.set_state(WorkerStatus.IDLE)
        while not self._stop_requested:
            if found := self._scripts.claim(args=[self.name, *self._names]):
                queue, job_id = map(text, found)
                if job := self._fetch(queue, job_id):
                    return job, self._queue(queue)
                self._drop(queue, job_id)
            elif timeout is None:
                return None
            else:
                time.sleep(POLL_SECONDS)
        return None

    def _queue(self, name: str) -> Queue:
        return next(queue for queue in self.queues if queue.name == name)

    def _fetch(self, queue: str, job_id: str) -> Job | None:
        try:
            job = AllowedJob.fetch(job_id, connection=self.connection, serializer=self.serializer)
        except NoSuchJobError:
            return None  # deleted since it was queued
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, TimeoutFormatError) as error:
            logger.warning("Job %s is dropped, it cannot be read: %s", job_id, error)
            return None
        return job if job.origin == queue else None

    def _drop(self, queue: str, job_id: str) -> None:
        """Take the job off the list of jobs taken."""
        with self.connection.pipeline() as pipeline:
            pipeline.lrem(f"{self._queue(queue).key}:intermediate", 0, job_id)
            pipeline.hdel(CLAIMS, self.name)
            pipeline.execute()

    # Running one

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run the job here."""
        assert isinstance(job, AllowedJob)
        self._stopped_job_id = None
        job.runner = self._call
        super().execute_job(job, queue)

    def prepare_execution(self, job: Job) -> Execution:
        """Enter the job among the running ones; only then is it no longer a job taken."""
        execution = super().prepare_execution(job)
        self._drop(job.origin, job.id)
        return execution

    def _call(self, job: AllowedJob) -> Any:
        check(job, self._allow)
        progress = _JobProgress(self._scripts, job)
        function = self._allow[str(job.func_name)]
        try:
            self._interruptible = job.id
            progress(0.0, "starting")
            self._interrupt_if_asked()
            return function(self._context, progress, **job.kwargs)
        finally:
            self._interruptible = None

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """Log a failure in one line when it is one of ours, and decide whether another try makes sense."""
        error = exc_info[1]
        if isinstance(error, (Cancelled, Interrupted)) or self.connection.hexists(job.key, "cancel"):
            self._stopped_job_id = job.id
        if isinstance(error, PERMANENT):
            job.retries_left = 0
        expected = isinstance(error, (AnomalyError, Interrupted, OutOfTime, DeserializationError))
        logger.error("Job %s: %s", job.id, one_line(error), exc_info=None if expected else exc_info)

    def _finalize_failure(self, job: Job, queue: Queue, execution: Execution, exc_info: Any) -> None:
        """Keep the reason with the job, in one line, and end it or have it tried again."""
        reason = one_line(exc_info[1])
        self.connection.hset(job.key, "reason", reason)
        super()._finalize_failure(job, queue, execution, exc_info)

    # Stopping one

    def kill_horse(self, sig: signal.Signals = signal.SIGUSR1) -> None:
        """Interrupt the running job; RQ calls this from its command thread, having noted the job's id."""
        ident = threading.main_thread().ident
        if ident is not None:
            signal.pthread_kill(ident, signal.SIGUSR1)

    def _on_interrupt(self, _signum: int, _frame: FrameType | None) -> None:
        self._interrupt_if_asked()

    def _interrupt_if_asked(self) -> None:
        """Raise in the job, never in RQ's bookkeeping around it."""
        if self._interruptible is not None and self._interruptible == self._stopped_job_id:
            raise Interrupted("Cancelled.")

    # Living

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Run jobs until told to stop."""
        beat = threading.Thread(target=self._beat_until_finished, name="heartbeat", daemon=True)
        beat.start()
        return super().work(*args, **kwargs)

    def teardown(self) -> None:
        """Say goodbye, with no heartbeat after it."""
        self._finished.set()
        super().teardown()  # type: ignore[no-untyped-call]

    def _install_signal_handlers(self) -> None:
        super()._install_signal_handlers()  # type: ignore[no-untyped-call]
        signal.signal(signal.SIGUSR1, self._on_interrupt)

    def _shutdown(self) -> None:
        """Stop at the next safe point; RQ raises from inside the signal when idle, wherever that is."""
        self._stop_requested = True

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """Ignore further signals: who is in a hurry kills this process, and its job is given back."""

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Return how long a job is believed to run without a sign of life, however long it may take."""
        return DEADLINE_SECONDS

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Give a sign of life."""
        super().heartbeat(timeout or DEADLINE_SECONDS, pipeline)

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """Leave cleaning to the supervisors, which know the living from the dead."""
        return False

    def _beat_until_finished(self) -> None:
        while not self._finished.wait(BEAT_SECONDS):
            try:
                self._beat()
            except (ConnectionError, TimeoutError) as error:
                logger.warning("Worker %s: no heartbeat: %s", self.name, error)

    def _beat(self) -> None:
        with self.connection.pipeline() as pipeline:
            worker_registration.register(self, pipeline)
            pipeline.hset(self.key, mapping=self.serialize() | {"state": self.get_state()})
            self.heartbeat(pipeline=pipeline)
            for execution in list(self.executions.values()):
                registry = self._queue(execution.job.origin).started_job_registry
                execution.heartbeat(registry, DEADLINE_SECONDS, pipeline=pipeline)
            pipeline.execute()

    def register_birth(self) -> None:
        """Enter the register of workers."""
        super().register_birth()  # type: ignore[no-untyped-call]
        self.connection.hset(self.key, mapping=self.serialize())

    def serialize(self) -> dict[Any, Any]:
        """Return what others may know of this worker."""
        device = str(getattr(self._context, "device", ""))
        return super().serialize() | {"device": device, "machine": machine.identity()}


class _JobProgress:
    """Writes percent and stage to the job, at most a few times a second."""

    def __init__(self, scripts: Scripts, job: AllowedJob) -> None:
        self._scripts = scripts
        self._job = job
        self._written = 0.0
        self._stage = ""

    def __call__(self, fraction: float, stage: str) -> None:
        moment = time.monotonic()
        if stage == self._stage and moment - self._written < PROGRESS_SECONDS and fraction < 1:
            return
        self._written, self._stage = moment, stage
        self._job.meta.update(percent=round(100 * min(max(fraction, 0.0), 1.0)), stage=stage)
        if self._scripts.progress(args=[self._job.id, json.dumps(self._job.meta)]):
            raise Cancelled("Cancelled.")


def one_line(error: BaseException | None) -> str:
    """Return what to tell a person: our own errors' message, other errors with their class."""
    if isinstance(error, DeserializationError):
        return "Refused: the job's payload is not JSON."
    said = " ".join(str(error).split())
    if not isinstance(error, (AnomalyError, Interrupted, OutOfTime)):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return said[:500]


def new_name() -> str:
    """Return a worker name that no worker on any host has or had."""
    host = "".join(character if character.isalnum() else "-" for character in socket.gethostname())
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"


def run(
    settings: Settings, *, allow: Allowed, context: Any, name: str | None = None, queues: Sequence[str] = QUEUES
) -> None:
    """Run jobs in this process until SIGTERM; a running job is finished first.

    Args:
        settings: where Redis is.
        allow: the functions that jobs may call, by dotted name; called as `function(context, progress, **kwargs)`.
        context: what outlives the jobs, such as warm models; its `device`, if any, is shown by `ls-anomaly jobs`.
        name: unique name of the worker.
        queues: what it takes jobs from, urgent ones first.
    """
    connection = _patient(settings)
    worker = WarmWorker(connection, allow=allow, context=context, name=name or new_name(), queues=queues)
    worker.work(logging_level=settings.log_level)


def _patient(settings: Settings) -> Redis:
    """Connect; a configured Redis may still be starting, as it does beside us in a compose file."""
    return connect(settings.redis_url or server.ensure(settings))


def main(arguments: list[str] | None = None) -> None:
    """Run as `python -m anomaly_workers.worker`, configured by the environment."""
    options = parse_options(arguments)
    if options.parent:
        lifeline.follow(options.parent)
    if options.queues == [LEARN]:
        os.nice(10)  # scoring goes first
    if LEARN in options.queues:
        heap.keep_freed()  # `learning.fit` gives it back
    settings = load_settings()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "timm"):  # a line a request with its whole query; a line a model
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from anomaly_workers import jobs  # here, so that a worker of other jobs can do without torch

    try:
        context = jobs.open_context(settings, _patient(settings))
        run(settings, allow=jobs.ALLOWED, context=context, name=options.name, queues=options.queues)
    except AnomalyError as error:
        logger.error("%s", error)
        raise SystemExit(1) from error


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read what a supervisor tells its workers."""
    parser = argparse.ArgumentParser(prog="python -m anomaly_workers.worker")
    parser.add_argument("--name", help="unique name of this worker")
    parser.add_argument("--parent", type=int, help="end when this process is no longer the parent")
    parser.add_argument("--queues", nargs="+", choices=QUEUES, default=list(QUEUES), help="what to take jobs from")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
