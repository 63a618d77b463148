"""Jobs of dead workers: found, and given back to their queue.

Several hosts may look after one Redis, so a job is only touched when its worker is known to be dead: because its
supervisor saw it die, because its process id is gone from this machine, or because it was silent for too long.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from redis import Redis
from rq.defaults import RQ_KEY_PREFIX
from rq.utils import utcparse

from anomaly_workers import machine
from anomaly_workers.queues import QUEUES
from anomaly_workers.scripts import CLAIMS, Scripts, text

logger = logging.getLogger(__name__)

MOST_KILLS = 3
SILENT_SECONDS = 30  # as long as a worker's heartbeat is valid
_WORKERS = f"{RQ_KEY_PREFIX}:workers"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the job of a dead worker.

    Attributes:
        reason: why the job ends, if it does.
        most_kills: how many workers it may have cost, this one included, before it ends; 0 does not count this one.
    """

    reason: str
    most_kills: int = MOST_KILLS


SHUTDOWN = Verdict("", most_kills=0)
VANISHED = Verdict(f"Lost its worker {MOST_KILLS} times: killed, out of memory, or its machine went away.")


@dataclass(frozen=True, slots=True)
class Running:
    """A job that some worker runs, or ran when it died.

    Attributes:
        queue: the queue it came from.
        job: its id.
        execution: id of this attempt.
        worker: the worker's name, "" if that is forgotten.
        deadline: when the worker counts as dead unless it gives a sign of life, in seconds since the epoch.
    """

    queue: str
    job: str
    execution: str
    worker: str
    deadline: float


class Salvage:
    """Gives jobs of dead workers back, on one Redis."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._scripts = Scripts(connection)

    def running(self) -> list[Running]:
        """Return what is running according to Redis, on all hosts."""
        found = list(self._entries())
        with self._connection.pipeline(transaction=False) as pipeline:
            for _queue, entry, _deadline in found:
                pipeline.hget(f"{RQ_KEY_PREFIX}:execution:{entry}", "worker_name")
            names = pipeline.execute()
        return [
            Running(queue, *_split(entry), text(name), deadline)
            for (queue, entry, deadline), name in zip(found, names, strict=True)
        ]

    def limits(self, running: Running) -> tuple[float, float | None]:
        """Return when the job must be over, and when somebody asked it to stop, in seconds since the epoch."""
        started, timeout, cancel = self._connection.hmget(
            f"{RQ_KEY_PREFIX}:job:{running.job}", ["started_at", "timeout", "cancel"]
        )
        if not started or not timeout:
            return float("inf"), None
        over = utcparse(text(started)).timestamp() + float(timeout)
        return over, float(cancel) if cancel else None

    def bury(self, worker: str, verdict: Verdict) -> None:
        """Give back what a dead worker had taken or was running, and strike it off."""
        if became := text(self._scripts.unclaim(args=[worker, verdict.most_kills, verdict.reason])):
            logger.log(_level(verdict), "A job that worker %s had taken and not begun is now %s", worker, became)
        for running in self.running():
            if running.worker == worker:
                self._give_back(running, verdict)
        key = f"{RQ_KEY_PREFIX}:worker:{worker}"
        with self._connection.pipeline() as pipeline:
            pipeline.srem(_WORKERS, key)
            for queue in QUEUES:
                pipeline.srem(f"{_WORKERS}:{queue}", key)
            pipeline.delete(key, f"{key}:executions")
            pipeline.execute()

    def bury_the_dead(self, known: Collection[str]) -> None:
        """Bury every worker that is dead beyond doubt, of whatever host; `known` ones are seen to live."""
        living, gone = self._of_this_machine()
        for worker in gone - set(known):
            self.bury(worker, VANISHED)
        if self._just_restarted():
            return  # nobody could give a sign of life
        trusted = living | set(known)  # whoever slept with this machine is late, not dead
        for running in self.running():
            if running.deadline < time.time() and running.worker not in trusted:
                self._give_back(running, VANISHED)
        for worker in self._silent_claimants() - trusted:
            self.bury(worker, VANISHED)

    def tidy(self) -> None:
        """Drop the registers' entries of jobs and workers that have expired."""
        with self._connection.pipeline(transaction=False) as pipeline:
            for queue in QUEUES:
                for registry in ("finished", "failed"):
                    pipeline.zremrangebyscore(f"{RQ_KEY_PREFIX}:{registry}:{queue}", "-inf", time.time())
            pipeline.execute()
        for key in self._connection.smembers(_WORKERS):
            if not self._connection.exists(key):
                self._connection.srem(_WORKERS, key)

    def _give_back(self, running: Running, verdict: Verdict) -> None:
        arguments = [running.queue, running.job, running.execution, verdict.most_kills, verdict.reason]
        became = text(self._scripts.give_back(args=arguments))
        if became:
            logger.log(_level(verdict), "Job %s lost its worker %s and is now %s", running.job, running.worker, became)

    def _entries(self) -> Iterator[tuple[str, str, float]]:
        with self._connection.pipeline(transaction=False) as pipeline:
            for queue in QUEUES:
                pipeline.zrange(f"{RQ_KEY_PREFIX}:wip:{queue}", 0, -1, withscores=True)
            answers = pipeline.execute()
        for queue, answer in zip(QUEUES, answers, strict=True):
            for entry, deadline in answer:
                yield queue, text(entry), float(deadline)

    def _of_this_machine(self) -> tuple[set[str], set[str]]:
        """Return the workers that are processes of this machine, and those that were and are no more."""
        here = machine.identity()
        living: set[str] = set()
        gone: set[str] = set()
        for key in self._connection.smembers(_WORKERS):
            where, pid = self._connection.hmget(text(key), ["machine", "pid"])
            if where and pid and text(where) == here:
                (living if machine.lives(int(pid)) else gone).add(_name(key))
        return living, gone

    def _silent_claimants(self) -> set[str]:
        names = {text(name) for name in self._connection.hkeys(CLAIMS)}
        return {name for name in names if not self._connection.exists(f"{RQ_KEY_PREFIX}:worker:{name}")}

    def _just_restarted(self) -> bool:
        return int(self._connection.info("server")["uptime_in_seconds"]) < SILENT_SECONDS


def _level(verdict: Verdict) -> int:
    """Return how loudly to log it: a job that waits for the next start is no news to whoever asked for the end."""
    return logging.INFO if verdict == SHUTDOWN else logging.WARNING


def _split(entry: str) -> tuple[str, str]:
    job, _, execution = entry.partition(":")
    return job, execution


def _name(key: bytes | str) -> str:
    return text(key).removeprefix(f"{RQ_KEY_PREFIX}:worker:")
