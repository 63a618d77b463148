"""What tests see of jobs and processes, and how they wait for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from anomaly_workers.queues import Queues
from anomaly_workers.types import JobInfo

MARK = "LS_ANOMALY_TEST"
SAMPLE_WORKER = (sys.executable, str(Path(__file__).with_name("sample_worker.py")))


def until(done: Callable[[], object], seconds: float = 60.0) -> float:
    """Wait until `done()` is true; return how long it took."""
    begin = time.monotonic()
    while not done():
        assert time.monotonic() - begin < seconds, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - begin


def marked(folder: Path) -> list[int]:
    """Return the processes that a test with this folder has started; a server's title covers its mark."""
    needle = f"{MARK}={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def gone(pid: int) -> Callable[[], bool]:
    def dead() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    return dead


def info(queues: Queues, job_id: str) -> JobInfo:
    return next(job for job in queues.jobs() if job.id == job_id)


def state(queues: Queues, job_id: str) -> str:
    return info(queues, job_id).state


def reaches(queues: Queues, job_id: str, wanted: str) -> Callable[[], bool]:
    return lambda: any(job.id == job_id and job.state == wanted for job in queues.jobs())


def ready(queues: Queues, workers: int = 1) -> Callable[[], bool]:
    return lambda: len([one for one in queues.workers() if one.state == "idle"]) == workers
