"""What the queue names is what the workers run."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

from anomaly_workers import jobs, sweep
from anomaly_workers.queues import JOBS
from anomaly_workers.settings import load_settings

ENQUEUED = {
    "score": {"project", "version", "tasks"},
    "fit": {"project", "run"},
    "feedback": {"project"},
    "threshold": {"project"},
    "rank": {"project"},
}


def test_every_queued_name_is_an_allowed_function_and_nothing_else_is() -> None:
    assert set(JOBS.values()) == set(jobs.ALLOWED)


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_takes_what_its_enqueue_function_sends(kind: str) -> None:
    parameters = inspect.signature(jobs.ALLOWED[JOBS[kind]]).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == ENQUEUED[kind]


class Clock:
    """The one key of Redis that `may_fit` uses."""

    def __init__(self) -> None:
        self.kept: bytes | None = None

    def get(self, _key: str) -> bytes | None:
        return self.kept

    def set(self, _key: str, value: str, *, ex: int) -> None:
        assert ex > 0
        self.kept = value.encode()


def test_a_small_project_is_fitted_once_no_more_images_come(tmp_path: Path) -> None:
    settings = load_settings({}, data_dir=tmp_path, settle_seconds=0.0)
    patient = load_settings({}, data_dir=tmp_path, settle_seconds=60.0)
    clock = Clock()
    assert sweep.may_fit(10, 1, clock, patient)  # type: ignore[arg-type]
    assert not sweep.may_fit(4, 1, clock, patient)  # type: ignore[arg-type]
    assert not sweep.may_fit(1, 1, clock, settings)  # type: ignore[arg-type]
    assert sweep.may_fit(4, 1, clock, settings)  # type: ignore[arg-type]


def test_training_images_are_sampled_evenly() -> None:
    chosen = sweep._evenly(list(range(1000)), 10)  # type: ignore[arg-type]
    assert list(chosen) == list(range(0, 1000, 100))
    assert np.array_equal(sweep._evenly([1, 2], 10), [1, 2])  # type: ignore[arg-type]
