"""Counters that every process adds to and /metrics reads: one hash in Redis."""

from __future__ import annotations

from typing import Any, cast

from redis import Redis

KEY = "anomaly:counters"
COUNTERS = {
    "images_scored": "Images scored by a worker.",
    "images_failed": "Images that could not be fetched or decoded.",
    "predictions_pushed": "Predictions that Label Studio took.",
    "scoring_seconds": "Seconds workers spent on fetching, scoring and pushing.",
    "fits": "Detectors fitted.",
    "verdicts": "Annotations read into the feedback log.",
    "webhooks": "Webhooks received.",
    "predict_requests": "Requests to /predict.",
    "sweeps": "Rounds that looked for missed work.",
}


def count(connection: Redis, name: str, amount: float = 1) -> None:
    """Add to a counter.

    Raises:
        KeyError: the name is not one of COUNTERS.
    """
    COUNTERS[name]
    connection.hincrbyfloat(KEY, name, amount)


def totals(connection: Redis) -> dict[str, float]:
    """Return every counter, zero if nothing was counted yet."""
    stored = cast(dict[Any, Any], connection.hgetall(KEY))
    known = {key.decode() if isinstance(key, bytes) else key: float(value) for key, value in stored.items()}
    return {name: known.get(name, 0.0) for name in COUNTERS}
