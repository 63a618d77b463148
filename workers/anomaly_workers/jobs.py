"""The jobs a worker runs, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from redis import Redis

from anomaly_workers.calm import feedback
from anomaly_workers.judging import threshold
from anomaly_workers.learning import fit
from anomaly_workers.review import rank
from anomaly_workers.runtime import Runtime
from anomaly_workers.scoring import score
from anomaly_workers.settings import Settings


def open_context(settings: Settings, connection: Redis) -> Runtime:
    """Build what the jobs share, once in a worker process."""
    return Runtime(settings, connection)


ALLOWED: Mapping[str, Callable[..., Any]] = {
    "anomaly_workers.jobs.score": score,
    "anomaly_workers.jobs.fit": fit,
    "anomaly_workers.jobs.feedback": feedback,
    "anomaly_workers.jobs.threshold": threshold,
    "anomaly_workers.jobs.rank": rank,
}
"""The only functions a worker calls, whatever Redis says."""
