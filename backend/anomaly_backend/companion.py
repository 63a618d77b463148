"""gunicorn's settings for a front end that is part of `ls-anomaly up`: it ends with it, even when that is killed."""

from __future__ import annotations

import os

from anomaly_workers import lifeline

graceful_timeout = 10  # seconds; less than what `Stack.stop` waits


def on_starting(_server: object) -> None:
    """Follow the process that started gunicorn; called in the main process, before it listens or forks."""
    lifeline.follow(os.getppid())
