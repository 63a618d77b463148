"""A process that ends with its parent, even when the parent is killed."""

from __future__ import annotations

import os
import signal
import threading
import time

POLL_SECONDS = 0.5


def follow(parent: int) -> None:
    """Send this process SIGTERM once `parent` is no longer its parent.

    A thread looks at the parent's id: the kernel's own parent-death signal follows the thread that
    spawned the child, not the process, and exists on Linux only.
    """
    threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
