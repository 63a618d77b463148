"""/metrics: what Prometheus scrapes, read from Redis at each scrape so that every front-end process says the same."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from anomaly_workers.counters import COUNTERS, totals
from anomaly_workers.queues import Queues
from anomaly_workers.store import Store


def render(queues: Queues, store: Store) -> bytes:
    """Return all metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Live(queues, store))
    return generate_latest(registry)


class _Live(Collector):
    """Reads the state of the moment."""

    def __init__(self, queues: Queues, store: Store) -> None:
        self._queues = queues
        self._store = store

    def collect(self) -> Iterator[Metric]:
        for name, value in totals(self._queues.connection).items():
            yield CounterMetricFamily(f"anomaly_{name}", COUNTERS[name], value=value)
        depth = GaugeMetricFamily("anomaly_queue_jobs", "Jobs that wait, by queue.", labels=["queue"])
        for queue, jobs in self._queues.depth().items():
            depth.add_metric([queue], jobs)
        yield depth
        yield GaugeMetricFamily("anomaly_workers", "Workers alive.", value=len(self._queues.workers()))
        failed = GaugeMetricFamily("anomaly_failed_tasks", "Tasks that could not be scored.", labels=["project"])
        for project in self._store.projects():
            failed.add_metric([str(project.id)], len(project.failures()))
        yield failed
