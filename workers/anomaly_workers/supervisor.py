"""Worker processes: started, watched, replaced when they die, and stopped together."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

from anomaly_workers import machine, server
from anomaly_workers.errors import AnomalyError
from anomaly_workers.queues import LEARN, QUEUES
from anomaly_workers.salvage import SHUTDOWN, Running, Salvage, Verdict
from anomaly_workers.settings import PREFIX, Settings, to_environ

logger = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "anomaly_workers.worker", "--queues", *(name for name in QUEUES if name != LEARN))
LEARNER = (sys.executable, "-m", "anomaly_workers.worker", "--queues", LEARN)
SWEEP = (sys.executable, "-m", "anomaly_workers.sweep")

TICK_SECONDS = 0.1
CHECK_SECONDS = 1.0
TIDY_SECONDS = 60.0
REVIVE_SECONDS = 5.0
STOP_GRACE = 5.0
CANCEL_GRACE = 15.0
HARD_GRACE = 30.0
HEALTHY_SECONDS = 10.0
LONGEST_DELAY = 30.0


@dataclass
class _Child:
    """A place for one process, filled again whenever the process dies.

    Attributes:
        command: what to run.
        environ: its environment.
        is_worker: a worker has a name of its own in each life, and jobs to give back.
        process: the living process.
        name: the worker's name in this life.
        born: when this life began, on the monotonic clock.
        due: when the next life begins.
        delay: seconds to wait before it, growing with each early death.
        verdict: what becomes of its job if we had to kill it.
    """

    command: Sequence[str]
    environ: Mapping[str, str]
    is_worker: bool
    process: subprocess.Popen[bytes] | None = None
    name: str = ""
    born: float = 0.0
    due: float = 0.0
    delay: float = 0.0
    verdict: Verdict | None = None

    def spawn(self) -> None:
        self.name = _new_name() if self.is_worker else ""
        named = ["--name", self.name] if self.is_worker else []
        self.verdict = None
        self.born = time.monotonic()
        # A session of its own: Ctrl-C reaches the supervisor alone, which stops things in order.
        self.process = subprocess.Popen(
            [*self.command, *named, "--parent", str(os.getpid())],
            env=dict(self.environ),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def bury(self) -> None:
        """Note the death and when the next life begins."""
        self.process = None
        early = time.monotonic() - self.born < HEALTHY_SECONDS
        self.delay = min(LONGEST_DELAY, self.delay * 2 or 0.25) if early else 0.0
        self.due = time.monotonic() + self.delay


@dataclass
class _Clock:
    """Tells when something is due that happens every `seconds`."""

    seconds: float
    last: float = field(default=float("-inf"))

    def due(self) -> bool:
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


class Supervisor:
    """Keeps worker processes, one that learns and one sweep running on this host.

    Others may do the same on other hosts with the same Redis.
    """

    def __init__(
        self,
        settings: Settings,
        redis_url: str,
        workers: int,
        *,
        worker_command: Sequence[str] = WORKER,
        learner_command: Sequence[str] | None = LEARNER,
        sweep_command: Sequence[str] | None = SWEEP,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            settings: the workers' settings; they reach them through the environment.
            redis_url: the Redis that `server.ensure` returned.
            workers: how many worker processes; 0 for one per GPU, or one without.
            worker_command: what a worker is; gets `--name NAME --parent PID`.
            learner_command: what runs the long jobs beside them; called like a worker. None for no such process.
            sweep_command: what the sweep is; gets `--parent PID`. None for no sweep.
            environ: the environment to pass on, by default this process's.
        """
        inherited = dict(os.environ if environ is None else environ)
        base = inherited | to_environ(settings) | {f"{PREFIX}REDIS_URL": redis_url}
        self._settings = settings
        self._connection = _connect(redis_url)
        self._salvage = Salvage(self._connection)
        self._children = [_Child(worker_command, extra, True) for extra in _places(settings, workers, base)]
        if learner_command is not None:
            self._children.append(_Child(learner_command, base, True))
        if sweep_command is not None:
            self._children.append(_Child(sweep_command, base, False))
        self._dead: dict[str, Verdict] = {}
        self._check, self._tidy, self._revive = _Clock(CHECK_SECONDS), _Clock(TIDY_SECONDS), _Clock(REVIVE_SECONDS)
        self._asked = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the processes and watch them from a thread."""
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop all processes and wait for it; what they could not finish in time is queued again."""
        self._asked.set()
        if self._thread is not None:
            self._thread.join()

    def run_forever(self) -> None:
        """Run until SIGTERM or SIGINT; call it from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._asked.set())
        self.start()
        assert self._thread is not None
        while self._thread.is_alive():
            self._thread.join(timeout=1)

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers, the learning one last among them, then the sweep's."""
        return [child.process.pid for child in self._children if child.process is not None]

    def _watch(self) -> None:
        try:
            while not self._asked.wait(TICK_SECONDS):
                self._tick()
        finally:
            self._shut_down()

    def _tick(self) -> None:
        for child in self._children:
            if child.process is not None and child.process.poll() is not None:
                self._note_death(child)
        self._with_redis(self._bury)
        for child in self._children:
            if child.process is None and time.monotonic() >= child.due:
                self._spawn(child)
        if self._check.due():
            self._with_redis(self._look_around)
        if self._tidy.due():
            self._with_redis(self._salvage.tidy)

    def _spawn(self, child: _Child) -> None:
        try:
            child.spawn()
        except OSError as error:  # out of memory or processes
            logger.error("%s cannot be started: %s", _title(child), error)
            child.bury()

    def _note_death(self, child: _Child) -> None:
        assert child.process is not None
        status = child.process.returncode
        if child.is_worker:
            self._dead[child.name] = child.verdict or _verdict_of(status)
        logger.log(logging.WARNING if status else logging.INFO, "%s ended: %s", _title(child), _cause(status))
        child.bury()

    def _bury(self) -> None:
        for name, verdict in list(self._dead.items()):
            self._salvage.bury(name, verdict)
            del self._dead[name]

    def _look_around(self) -> None:
        ours = {child.name: child for child in self._children if child.is_worker and child.process is not None}
        for running in self._salvage.running():
            if child := ours.get(running.worker):
                self._judge(child, running)
        self._salvage.bury_the_dead(known={*ours, *self._dead})

    def _judge(self, child: _Child, running: Running) -> None:
        """Kill a worker whose job neither its alarm nor a cancellation could stop: it hangs in native code."""
        over, cancelled = self._salvage.limits(running)
        now = time.time()
        if now > over + HARD_GRACE:
            child.verdict = Verdict("Ran past its time in native code; its worker was killed.", most_kills=1)
        elif cancelled is not None and now > cancelled + CANCEL_GRACE:
            child.verdict = Verdict("Cancelled.", most_kills=1)
        else:
            return
        logger.warning("%s does not stop job %s: killing it", _title(child), running.job)
        child.signal(signal.SIGKILL)

    def _shut_down(self) -> None:
        for child in self._children:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE
        for child in self._children:
            _end(child, deadline)
            if child.is_worker:
                self._dead[child.name] = child.verdict or SHUTDOWN
        self._with_redis(self._bury)
        self._connection.close()

    def _with_redis(self, action: Callable[[], None]) -> None:
        """Do what needs Redis; without it the processes are watched all the same."""
        try:
            action()
        except (ConnectionError, TimeoutError) as error:
            logger.warning("Redis does not answer: %s", error)
            if not self._asked.is_set() and self._revive.due():
                self._revive_redis()
        except RedisError as error:
            logger.error("Redis refused: %s", error)

    def _revive_redis(self) -> None:
        """Start the embedded server again if it died; a configured one is somebody else's."""
        if self._settings.redis_url:
            return
        try:
            server.ensure(self._settings)
        except (AnomalyError, RedisError, OSError) as error:
            logger.error("The embedded Redis cannot be started: %s", error)


def _end(child: _Child, deadline: float) -> None:
    if child.process is None:
        return
    try:
        child.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.wait()
    child.process = None


def _connect(url: str) -> Redis:
    """Return a connection that gives up soon: watching processes goes on without Redis."""
    return Redis.from_url(url, socket_timeout=5, retry=Retry(ExponentialBackoff(cap=0.5), 3))


def _places(settings: Settings, workers: int, base: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield each worker's environment: its GPU when there are several, its share of the CPU otherwise."""
    devices = machine.gpus(base) if settings.device in ("auto", "cuda") else []
    count = workers or max(1, len(devices))
    for number in range(count):
        place = dict(base)
        if len(devices) > 1:
            place["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        if not devices and count > 1:
            place.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        yield place


def _new_name() -> str:
    host = "".join(character if character.isalnum() else "-" for character in socket.gethostname())
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def _title(child: _Child) -> str:
    return f"Worker {child.name}" if child.is_worker else "The sweep"


def _cause(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def _verdict_of(status: int) -> Verdict:
    return Verdict(f"Killed its worker {Verdict('').most_kills} times; the last one ended with {_cause(status)}.")
