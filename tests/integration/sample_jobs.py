"""Jobs that misbehave on request: what a task does stands in its data."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anomaly_workers.errors import ConfigError
from anomaly_workers.types import Progress, Task


class Events:
    """A file of lines "task what pid uses" that survives every crash."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "events.txt"

    def add(self, *words: object) -> None:
        with self.file.open("a") as stream:
            stream.write(" ".join(map(str, words)) + "\n")

    def of(self, what: str) -> list[list[str]]:
        """Return the lines of one kind, as words."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [words for words in map(str.split, lines) if words[1] == what]

    def tasks(self, what: str) -> list[int]:
        return [int(words[0]) for words in self.of(what)]


class Context:
    """What a worker keeps warm."""

    device = "sample"

    def __init__(self, folder: Path) -> None:
        self.events = Events(folder)
        self.uses = 0


def score(context: Context, progress: Progress, *, project: int, version: str, tasks: list[dict[str, Any]]) -> int:
    """Do what the tasks' data says."""
    del project, version
    for number, task in enumerate(tasks):
        context.uses += 1
        context.events.add(task["id"], "begin", os.getpid(), context.uses)
        act, _, amount = str(task["data"].get("do", "nothing ")).partition(" ")
        ACTS[act](context, progress, float(amount or 0), task["id"])
        context.events.add(task["id"], "end", os.getpid(), context.uses)
        progress((number + 1) / len(tasks), "scoring")
    return len(tasks)


def fit(context: Context, progress: Progress, *, project: int, run: str) -> str:
    """Take a moment."""
    context.events.add(project, "begin-fit", run)
    progress(0.5, "fitting")
    time.sleep(0.5)
    context.events.add(project, "end-fit", run)
    return run


def _nothing(context: Context, progress: Progress, amount: float, task: int) -> None:
    del context, progress, amount, task


def _work(context: Context, progress: Progress, amount: float, task: int) -> None:
    for step in range(int(amount * 20)):
        progress(step / (amount * 20), "working")
        time.sleep(0.05)


def _silent(context: Context, progress: Progress, amount: float, task: int) -> None:
    time.sleep(amount)


def _swallow(context: Context, progress: Progress, amount: float, task: int) -> None:
    end = time.monotonic() + amount
    while time.monotonic() < end:
        try:
            progress(0.1, "stubborn")
            time.sleep(0.05)
        except Exception:
            pass


def _native(context: Context, progress: Progress, amount: float, task: int) -> None:
    """Stay in one C call, which no signal interrupts."""
    begin = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(200_000 * amount / (time.perf_counter() - begin)))


def _die(context: Context, progress: Progress, amount: float, task: int) -> None:
    if not amount or len([one for one in context.events.tasks("begin") if one == task]) <= amount:
        os.kill(os.getpid(), signal.SIGKILL)


def _fail(context: Context, progress: Progress, amount: float, task: int) -> None:
    if len([one for one in context.events.tasks("begin") if one == task]) <= amount:
        raise ValueError("not\nyet")


def _misconfigured(context: Context, progress: Progress, amount: float, task: int) -> None:
    raise ConfigError("Set the thing.")


ACTS: Mapping[str, Callable[[Context, Progress, float, int], None]] = {
    "nothing": _nothing,
    "work": _work,
    "silent": _silent,
    "swallow": _swallow,
    "native": _native,
    "die": _die,
    "fail": _fail,
    "misconfigured": _misconfigured,
}

ALLOWED: Mapping[str, Callable[..., Any]] = {"anomaly_workers.jobs.score": score, "anomaly_workers.jobs.fit": fit}


def task(number: int, do: str = "nothing") -> Task:
    return Task(number, {"do": do})
