"""How fast the product answers, measured on real parts: Label Studio 1.23.2, Redis, gunicorn, a worker.

    .venv/bin/python tests/bench/latency.py [--json OUT]

Prints: p50 and p99 of /health and /setup while a worker fits and scores; the answer to a webhook with 5,000 tasks; the
seconds from an image's upload to its prediction in Label Studio with a warm worker (median of 20).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console

from anomaly_workers import demo, instance, queues, sample, server
from anomaly_workers.client import Client
from anomaly_workers.enrol import enrol
from anomaly_workers.labelstudio import config
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings, load_settings, public_url
from anomaly_workers.stack import Stack
from anomaly_workers.store import ProjectStore, Store

ROOT = Path(__file__).resolve().parents[2]
LABEL_STUDIO = ROOT / ".venv-label-studio" / "bin" / "label-studio"
REQUESTS = 400
PAUSE = 0.02
UPLOADS = 20


def main() -> None:
    """Run all measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    out = parser.parse_args().json
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), console)
    console.print_json(data=figures)
    if out:
        out.write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, console: Console) -> dict[str, float]:
    """Start everything in `folder` and return the figures, in seconds."""
    settings = load_settings(
        {}, data_dir=folder / "anomaly", port=demo.free_port(9090), settle_seconds=1.0, log_level="WARNING"
    )
    running = Stack(settings)
    place = instance.start(
        LABEL_STUDIO, folder=folder / "ls", port=demo.free_port(8080), email=demo.EMAIL, password=demo.PASSWORD
    )
    with place as label_studio:
        running.start()
        try:
            report = enrol(settings, label_studio.url, label_studio.token, create="Latency")
            store = Store(settings.data_dir).project(report.project)
            return _figures(settings, store, folder, console)
        finally:
            running.stop()


def _figures(settings: Settings, store: ProjectStore, folder: Path, console: Console) -> dict[str, float]:
    client = Client(store.connection())
    pictures = demo.find_pictures(sample.write(folder / "washers"))
    demo.import_pictures(client, config.parse(store.label_config), store.id, pictures)
    queue = Queues(queues.connect(server.ensure(settings)), settings)
    demo.wait_until_scored(client, store, queue, demo.Watch(), threading.Event(), console)
    auth = (settings.user, settings.password.get_secret_value() or Store(settings.data_dir).secret("password"))
    with httpx.Client(base_url=public_url(settings).replace("localhost", "127.0.0.1"), auth=auth, timeout=60) as front:
        uploads = [
            _upload_to_prediction(client, store, sample.washer(np.random.default_rng(seed)))
            for seed in range(100, 100 + UPLOADS)
        ]
        figures = {
            "upload_to_prediction_median_s": statistics.median(uploads),
            "upload_to_prediction_max_s": max(uploads),
        }
        figures |= _under_load(front, client, store, queue, pictures)
        figures["webhook_5000_tasks_s"] = _webhook(front, store)
    client.close()
    return {name: round(value, 4) for name, value in figures.items()}


def _upload_to_prediction(client: Client, store: ProjectStore, picture: object) -> float:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)  # type: ignore[attr-defined]
    controls = config.parse(store.label_config)
    started = time.monotonic()
    (address,) = client.upload(store.id, [("new.jpg", buffer.getvalue())])
    (task,) = client.import_tasks(store.id, [{"data": {controls.value: address}}])
    while not client.prediction_counts(store.id, store.current, tasks=[task]):
        time.sleep(0.05)
    return time.monotonic() - started


def _under_load(
    front: httpx.Client, client: Client, store: ProjectStore, queue: Queues, pictures: list[demo.Picture]
) -> dict[str, float]:
    """Ask /health and /setup while the worker fits a new version and scores everything with it."""
    demo.import_pictures(client, config.parse(store.label_config), store.id, pictures)
    queue.enqueue_fit(store.id, "training")
    setup = {"project": f"{store.id}.1", "schema": store.label_config, "hostname": "", "access_token": ""}
    asks: dict[str, Callable[[], httpx.Response]] = {
        "health": lambda: front.get("/health"),
        "setup": lambda: front.post("/setup", json=setup),
    }
    times: dict[str, list[float]] = {name: [] for name in asks}
    busy = 0
    for _ in range(REQUESTS):
        busy += any(worker.job for worker in queue.workers())
        for name, ask in asks.items():
            started = time.monotonic()
            assert ask().status_code == 200
            times[name].append(time.monotonic() - started)
        time.sleep(PAUSE)
    figures = {"share_of_requests_while_a_job_ran": busy / REQUESTS}
    for name, seconds in times.items():
        figures[f"{name}_p50_s"] = float(np.quantile(seconds, 0.5))
        figures[f"{name}_p99_s"] = float(np.quantile(seconds, 0.99))
    return figures


def _webhook(front: httpx.Client, store: ProjectStore) -> float:
    tasks = [
        {
            "id": 10_000_000 + number,
            "project": store.id,
            "data": {"image": f"/data/upload/1/{number}.jpg"},
            "meta": {},
            "is_labeled": False,
            "overlap": 1,
            "inner_id": number,
            "total_annotations": 0,
        }
        for number in range(5000)
    ]
    body = json.dumps({"action": "TASKS_CREATED", "tasks": tasks, "project": {"id": store.id}}).encode()
    started = time.monotonic()
    answer = front.post("/webhook", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 201
    return time.monotonic() - started


if __name__ == "__main__":
    main()
