"""Health check of the worker image: exit 0 when a worker of this container gave a sign of life lately."""

from __future__ import annotations

import socket
import sys

from anomaly_workers.queues import Queues, connect
from anomaly_workers.settings import load_settings

settings = load_settings()
host = socket.gethostname()
workers = Queues(connect(settings.redis_url), settings).workers()
sys.exit(0 if any(worker.name.startswith(f"{host}-") for worker in workers) else f"no worker of {host} is registered")
