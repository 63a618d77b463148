"""Everything of one machine, started and stopped together: Redis, the front end, the workers."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from urllib.error import URLError
from urllib.request import urlopen

from anomaly_workers import server
from anomaly_workers.errors import ConfigError
from anomaly_workers.settings import Settings, to_environ
from anomaly_workers.supervisor import Supervisor

logger = logging.getLogger(__name__)

FRONT_PROCESSES = 2
FRONT_THREADS = 8
START_SECONDS = 60.0
STOP_SECONDS = 15.0
COMPANION = ("--config", "python:anomaly_backend.companion")
"""Of a front end that ends with this process, even when it is killed: otherwise it would keep the port."""


def front_command(settings: Settings) -> list[str]:
    """Return the command line of the front end.

    Raises:
        ConfigError: its packages are not installed.
    """
    require("gunicorn", extra="backend")
    return [
        *(sys.executable, "-m", "gunicorn", "--bind", f"{settings.host}:{settings.port}"),
        *("--workers", str(FRONT_PROCESSES), "--threads", str(FRONT_THREADS), "--timeout", "120"),
        *("--log-level", "warning", "anomaly_backend.app:from_environment()"),
    ]


def require(module: str, *, extra: str) -> None:
    """Check that an extra is installed.

    Raises:
        ConfigError: it is not; the message says what to install.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"This command needs {module}. Install the extra: pip install 'label-studio-anomaly[{extra}]'"
        )


class Stack:
    """Redis unless ANOMALY_REDIS_URL names one, a front end, N workers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._front: subprocess.Popen[bytes] | None = None
        self._supervisor: Supervisor | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start all parts; return once the front end answers.

        Raises:
            ConfigError: an extra is not installed, or the port is taken.
        """
        require("torch", extra="workers")
        command = front_command(self.settings)
        redis_url = server.ensure(self.settings)
        environ = os.environ | to_environ(self.settings)
        # A session of its own: Ctrl-C reaches us alone, and we stop the parts in order.
        self._front = subprocess.Popen([*command, *COMPANION], env=environ, start_new_session=True)
        self._supervisor = Supervisor(self.settings, redis_url, workers=self.settings.workers)
        self._supervisor.start()
        self._wait_for_front()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the living workers, without the sweep's."""
        return self._supervisor.pids[:-1] if self._supervisor is not None else []

    def wait(self, stop: threading.Event) -> None:
        """Block until `stop` is set or the front end dies.

        Raises:
            ConfigError: the front end died.
        """
        while not stop.wait(0.5):
            if self._front is not None and self._front.poll() is not None:
                raise ConfigError("The front end stopped; its last lines above say why.")

    def stop(self) -> None:
        """Stop all parts, workers first; the embedded Redis keeps what is queued on disk."""
        if self._supervisor is not None:
            self._supervisor.stop()
        if self._front is not None and self._front.poll() is None:
            self._front.send_signal(signal.SIGTERM)
            try:
                self._front.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                logger.warning("the front end did not stop within %.0f s and is killed", STOP_SECONDS)
                os.killpg(self._front.pid, signal.SIGKILL)
                self._front.wait()
        if not self.settings.redis_url:
            server.stop(self.settings)

    def _wait_for_front(self) -> None:
        address = f"http://127.0.0.1:{self.settings.port}/health"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._front is None or self._front.poll() is not None:
                raise ConfigError(f"The front end did not start. Is port {self.settings.port} taken? Set ANOMALY_PORT.")
            if answers(address):
                return
            time.sleep(0.1)
        raise ConfigError(f"The front end did not answer at {address} within {START_SECONDS:.0f} s.")


def answers(address: str) -> bool:
    """Whether a GET to `address` is answered with 200 within a second."""
    try:
        with urlopen(address, timeout=1) as response:  # a fixed http address of our own
            return bool(response.status == 200)
    except (URLError, OSError):
        return False
