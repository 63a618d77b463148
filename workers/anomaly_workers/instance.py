"""A Label Studio of our own, for the demo and the tests: one folder, one port, nothing left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx

from anomaly_workers.errors import LabelStudioError, Unauthorized

logger = logging.getLogger(__name__)

START_SECONDS = 300.0  # migrations of a new database take about a minute of one core
STOP_SECONDS = 5.0
DATABASE = "label_studio.sqlite3"
TEMPLATE = "label-studio-empty.sqlite3"  # a migrated database without users, kept in the virtual environment
LOG = "label-studio.log"
UPLOADS = "media/upload"  # inside its folder
TAIL_LINES = 15

# Label Studio may reach this machine and nothing else of the private networks.
OPEN_TO_THIS_MACHINE = {
    "USE_DEFAULT_BANNED_SUBNETS": "false",
    "USER_ADDITIONAL_BANNED_SUBNETS": "0.0.0.0/8,10.0.0.0/8,100.64.0.0/10,169.254.0.0/16,172.16.0.0/12,"
    "192.168.0.0/16,fc00::/7,fe80::/10",
}
_QUIET = {
    "LATEST_VERSION_CHECK": "false",
    "COLLECT_ANALYTICS": "false",
    "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "",
    "LOG_LEVEL": "WARNING",
}
# Label Studio reads these without its prefix; a desktop or a CI sets some of them for other reasons.
_NOT_INHERITED = frozenset({"HOST", "PORT", "USERNAME", "PASSWORD", "DEBUG", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"})
_NOT_INHERITED_PREFIXES = ("LABEL_STUDIO_", "HEARTEX_", "ANOMALY_", "DJANGO_")


@dataclass(frozen=True, slots=True)
class Instance:
    """A running Label Studio; leaving the context stops it.

    Attributes:
        url: its address, no trailing slash.
        email: the user's login.
        password: the user's password.
        token: the user's personal access token.
        folder: where its database, uploads and log are.
        seconds: how long the start took.
    """

    url: str
    email: str
    password: str = field(repr=False)
    token: str = field(repr=False)
    folder: Path
    seconds: float
    process: subprocess.Popen[bytes] = field(repr=False)

    def __enter__(self) -> Instance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop Label Studio and everything it started; a second call does nothing."""
        _stop(self.process)


def start(
    executable: Path,
    *,
    folder: Path,
    port: int,
    email: str,
    password: str,
    environ: Mapping[str, str] | None = None,
    seconds: float = START_SECONDS,
) -> Instance:
    """Start Label Studio on this machine's loopback address and wait until it answers.

    Args:
        executable: its `label-studio` command.
        folder: keeps its data; used again when it has some.
        port: must be free.
        email: the login; the user is created on the first start.
        password: at least eight characters.
        environ: more variables for it.
        seconds: how long to wait.

    Raises:
        LabelStudioError: the port is taken, or it did not start; the message ends with the log's last lines.
        Unauthorized: the folder's user has another password.
    """
    if not executable.is_file():
        raise LabelStudioError(
            f"{executable} is not there. Install label-studio into a virtual environment of its own."
        )
    if _is_taken(port):
        raise LabelStudioError(f"Port {port} is in use. Stop what uses it, or choose another port.")
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not (folder / DATABASE).exists()
    template = executable.parent.parent / TEMPLATE
    if is_new and template.is_file():
        shutil.copyfile(template, folder / DATABASE)
    url = f"http://localhost:{port}"
    began = time.monotonic()
    process = _launch(executable, folder, port, _environment(os.environ, url, folder) | dict(environ or {}))
    try:
        _wait(process, port, folder, began + seconds)
        if is_new and not template.exists():
            _keep_template(folder / DATABASE, template)
        token = personal_token(url, email, password, sign_up=is_new)
    except BaseException:
        _stop(process)
        raise
    return Instance(url, email, password, token, folder, time.monotonic() - began, process)


def personal_token(url: str, email: str, password: str, *, sign_up: bool = False) -> str:
    """Log in like a browser and return a new personal access token; an older one of the user ends.

    Raises:
        Unauthorized: the login is wrong.
        LabelStudioError: there is no Label Studio, or it makes no token.
    """
    try:
        with httpx.Client(base_url=url, timeout=60.0) as http:
            headers = _log_in(http, email, password, "/user/signup/" if sign_up else "/user/login/")
            answer = http.post("/api/token/", headers=headers)
            if answer.status_code == 409:  # a token is shown once: end it, make another
                for old in http.get("/api/token/").json():
                    http.post("/api/token/blacklist/", json={"refresh": old["token"]}, headers=headers)
                answer = http.post("/api/token/", headers=headers)
    except httpx.TransportError as error:
        raise LabelStudioError(f"Label Studio at {url} does not answer ({error}). Start it.") from error
    if not answer.is_success:
        raise LabelStudioError(
            f"Label Studio makes no personal access token (HTTP {answer.status_code}). "
            "Allow them under Organization, API Tokens Settings.",
            status=answer.status_code,
        )
    return str(answer.json()["token"])


def _log_in(http: httpx.Client, email: str, password: str, page: str) -> dict[str, str]:
    """Fill in the log-in or sign-up form; return the headers that later requests of the session need."""
    origin = {"Referer": str(http.base_url)}
    http.get(page)
    form = {"csrfmiddlewaretoken": http.cookies.get("csrftoken") or "", "email": email, "password": password}
    answer = http.post(page, data=form, headers=origin)
    if answer.status_code != 302:
        raise Unauthorized(f"Label Studio refused the login of {email}. Correct its password.", status=401)
    return origin | {"X-CSRFToken": http.cookies.get("csrftoken") or ""}


def _environment(inherited: Mapping[str, str], url: str, folder: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in inherited.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_INHERITED_PREFIXES)
    }
    return kept | OPEN_TO_THIS_MACHINE | _QUIET | {"LABEL_STUDIO_HOST": url, "LABEL_STUDIO_BASE_DATA_DIR": str(folder)}


def _launch(executable: Path, folder: Path, port: int, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [str(executable), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[bytes], port: int, folder: Path, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LabelStudioError(f"Label Studio ended with code {process.returncode}. {_tail(folder)}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5.0).is_success:
                return
        time.sleep(0.2)
    raise LabelStudioError(f"Label Studio did not start in time. {_tail(folder)}")


def _keep_template(database: Path, template: Path) -> None:
    """Keep a copy of the migrated, still empty database: the next new folder starts a minute faster."""
    part = template.with_suffix(f".{os.getpid()}")
    try:
        with contextlib.closing(sqlite3.connect(database)) as source, contextlib.closing(sqlite3.connect(part)) as copy:
            source.backup(copy)
        part.replace(template)
    except (OSError, sqlite3.Error) as error:
        logger.debug("No database template kept: %s", error)
        part.unlink(missing_ok=True)


def _tail(folder: Path) -> str:
    text = (folder / LOG).read_text(errors="replace") if (folder / LOG).exists() else ""
    return f"See {folder / LOG}, which ends:\n" + "\n".join(text.splitlines()[-TAIL_LINES:])


def _is_taken(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
            break
    with contextlib.suppress(ProcessLookupError):  # children that outlived it
        os.killpg(process.pid, signal.SIGKILL)
