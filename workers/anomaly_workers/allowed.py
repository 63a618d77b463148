"""Jobs that run listed functions and nothing else, whatever stands in Redis.

JSON keeps code out of the payload; this keeps names out of it: RQ would import any function a payload mentions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from rq.exceptions import DeserializationError
from rq.job import Job

from anomaly_workers.errors import JobError

_HOOKS = ("success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks")


class AllowedJob(Job):
    """An RQ job that imports nothing: a worker lends it a `runner`, callbacks and webhooks do not exist."""

    runner: Callable[[AllowedJob], Any] | None = None
    hooks: tuple[str, ...] = ()

    def restore(self, raw_data: Any) -> Any:
        """Read the stored job; hooks are noted and dropped."""
        names = {name.decode() if isinstance(name, bytes) else name: name for name in raw_data}
        self.hooks = tuple(name for name in _HOOKS if name in names and raw_data[names[name]])
        dropped = {names[name] for name in self.hooks}
        super().restore({name: value for name, value in raw_data.items() if name not in dropped})

    @property
    def func(self) -> Callable[..., Any] | None:
        """Refuse to resolve the function by name."""
        raise JobError("Refused: a job is not run by the name of its function.")

    def _execute(self) -> Any:
        if self.runner is None:
            raise JobError("Refused: only a worker of this project runs jobs.")
        return self.runner(self)


def check(job: AllowedJob, allowed: Collection[str]) -> None:
    """Raise JobError unless `job` is a plain call of an allowed function with keyword arguments."""
    if job.hooks:
        raise JobError(f"Refused: a job with {', '.join(job.hooks)}.")
    try:
        name, instance, args, kwargs = job.func_name, job.instance, job.args, job.kwargs
    except DeserializationError as error:
        raise JobError("Refused: the job's payload is not JSON.") from error
    if not isinstance(name, str) or name not in allowed:
        raise JobError(f"Refused: {name!r} is not a job of this worker.")
    if instance is not None or args or not _keywords(kwargs):
        raise JobError(f"Refused: {name} takes keyword arguments only.")


def _keywords(kwargs: object) -> bool:
    return isinstance(kwargs, dict) and all(isinstance(name, str) for name in kwargs)
