"""The demo: a real Label Studio, a project, images, a detector, predictions, all on this machine."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from anomaly_workers import instance, metrics, queues, sample, server, tabs
from anomaly_workers.client import Client
from anomaly_workers.enrol import enrol, front_password, page_address
from anomaly_workers.errors import ConfigError, JobError
from anomaly_workers.labelstudio import config
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.stack import Stack
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import Controls

EMAIL = "inspector@example.com"
PASSWORD = "inspect-me-2026"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
PATIENCE_SECONDS = 900.0
"""Without any progress for this long, the demo gives up."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One file of the demo's folder.

    Attributes:
        path: the file.
        confirmed: imported with a "normal" annotation (train/good), not an open task.
        defect: True or False as its folder says, None in a folder without labels. Never sent to Label Studio.
    """

    path: Path
    confirmed: bool = False
    defect: bool | None = None


@dataclass(slots=True)
class Watch:
    """Seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def run(
    label_studio: Path, images: Path | None, *, folder: Path, check: bool, stop: threading.Event, console: Console
) -> list[str]:
    """Run the demo; return what is wrong, nothing if all is well.

    Raises:
        ConfigError: a folder without images, or a part that does not start.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pictures = find_pictures(images if images is not None else sample.write(folder / "washers"))
    settings = load_settings(
        {},
        data_dir=folder.resolve() / "anomaly",
        port=free_port(9090),
        uploads_root=str(folder.resolve() / "label-studio" / instance.UPLOADS),
        sweep_seconds=5.0,
        settle_seconds=1.0,
        log_level="WARNING",
    )
    watch, port = Watch(), free_port(8080)
    console.print(
        f"{len(pictures)} images, {sum(picture.confirmed for picture in pictures)} of them known to be normal"
    )
    running = Stack(settings)
    try:
        starting = console.status("starting Label Studio, Redis, front end and workers")
        with watch.stage("start everything"), starting, ThreadPoolExecutor(1) as pool:
            started = pool.submit(running.start)
            place = instance.start(
                label_studio.absolute(),
                folder=folder.resolve() / "label-studio",
                port=port,
                email=EMAIL,
                password=PASSWORD,
            )
        with place:
            started.result()
            try:
                return _show(place, settings, pictures, watch, check=check, stop=stop, console=console)
            finally:
                running.stop()  # before Label Studio, which they would miss
    finally:
        with console.status("stopping everything"):
            running.stop()


def find_pictures(folder: Path) -> list[Picture]:
    """List a folder's images: a class in MVTec layout, or a plain folder (all open tasks, nothing known).

    Raises:
        ConfigError: there is no image in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. Give a folder of images: make demo IMAGES=DIR")
    if (folder / "train" / "good").is_dir():
        found = [Picture(path, confirmed=True, defect=False) for path in _files(folder / "train" / "good")]
        for kind in sorted(path for path in (folder / "test").iterdir() if path.is_dir()):
            found += [Picture(path, defect=kind.name != "good") for path in _files(kind)]
    else:
        found = [Picture(path) for path in _files(folder)]
    if not found:
        raise ConfigError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}).")
    return found


def check_predictions(client: Client, store: ProjectStore) -> list[str]:
    """Ask Label Studio whether every open task has exactly one prediction, of the deployed version.

    Returns:
        One line for each thing that is wrong; empty when all is well.
    """
    if not store.current:
        return ["no version was deployed"]
    wrong = []
    shown = client.project(store.id).model_version
    if shown != store.current:
        wrong.append(f"Label Studio shows version {shown!r}, deployed is {store.current!r}")
    predicted = client.predictions(store.id)
    for task in client.open_tasks(store.id):
        versions = [str(prediction["model_version"]) for prediction in predicted.get(task.id, [])]
        if versions != [store.current]:
            failure = store.failure(task.id)
            reason = failure.reason if failure else f"its predictions are {versions}, expected one"
            wrong.append(f"task {task.id}: {reason}")
    return wrong


def free_port(wanted: int) -> int:
    """Return `wanted` if nobody listens there, otherwise a free port."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError("No port is free on this machine.")


def _show(
    place: instance.Instance,
    settings: Settings,
    pictures: Sequence[Picture],
    watch: Watch,
    *,
    check: bool,
    stop: threading.Event,
    console: Console,
) -> list[str]:
    with watch.stage("connect"), console.status("creating and connecting a project"):
        report = enrol(settings, place.url, place.token, create="Demo")
    store = Store(settings.data_dir).project(report.project)
    client = Client(store.connection())
    with watch.stage("import images"), console.status(f"importing {len(pictures)} images"):
        tasks = import_pictures(client, config.parse(store.label_config), report.project, pictures)
    queue = Queues(queues.connect(server.ensure(settings)), settings)
    wait_until_scored(client, store, queue, watch, stop, console)
    summarise(store, tasks, watch, console)
    wrong = check_predictions(client, store)
    for line in wrong:
        console.print(f"[red]✗[/] {line}", highlight=False)
    if not wrong:
        console.print("[green]✓[/] every open task carries exactly one prediction of the deployed version")
    if not check and not stop.is_set():
        _invite(place, settings, store, console)
        stop.wait()
    return wrong


def import_pictures(
    client: Client, controls: Controls, project: int, pictures: Sequence[Picture]
) -> dict[int, Picture]:
    """Upload the files and make tasks of them; return which task shows which picture."""
    addresses = client.upload(project, [(picture.path.name, picture.path.read_bytes()) for picture in pictures])
    normal = (
        {
            "from_name": controls.choices.name,
            "to_name": controls.choices.to_name,
            "type": "choices",
            "value": {"choices": [controls.normal]},
        }
        if controls.choices
        else None
    )
    tasks = [
        {"data": {controls.value: address}}
        | ({"annotations": [{"result": [normal]}]} if picture.confirmed and normal else {})
        for address, picture in zip(addresses, pictures, strict=True)
    ]
    ids = client.import_tasks(project, tasks)
    return dict(zip(ids, pictures, strict=True))


def wait_until_scored(
    client: Client, store: ProjectStore, queue: Queues, watch: Watch, stop: threading.Event, console: Console
) -> None:
    """Show progress until every open task has a prediction, or a reason why not.

    Raises:
        JobError: a job failed for good, nothing moved for PATIENCE_SECONDS, or `stop` was set.
    """
    total = sum(1 for _ in client.open_tasks(store.id))
    bars = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started = moved = time.monotonic()
    fitted, before = 0.0, -1
    with Progress(*bars, console=console) as bar:
        shown = bar.add_task("learning what normal looks like", total=total)
        while not stop.wait(0.5):
            fitted = fitted or (time.monotonic() if store.current else 0.0)
            missing = _missing(client, store, total)
            bar.update(shown, completed=total - missing, description="scoring" if fitted else _running(queue, store.id))
            if fitted and not missing and not store.rollout:
                watch.seconds["fit"] = fitted - started
                watch.seconds["score and push"] = time.monotonic() - fitted
                return
            if missing != before:
                moved, before = time.monotonic(), missing
            if time.monotonic() - moved > PATIENCE_SECONDS:
                raise JobError("Nothing moved for 15 minutes. Look at: ls-anomaly jobs")
    raise JobError("Stopped before every image was scored.")


def _missing(client: Client, store: ProjectStore, total: int) -> int:
    """How many open tasks wait; Label Studio is asked at the end alone: its answers take a core of the machine."""
    if not store.target:
        return total
    failing = store.failing()
    waiting = total - len(failing) - store.pushed(store.target)
    if waiting > 0:
        return waiting
    return sum(task.id not in failing for task in client.open_tasks(store.id, without_version=store.target))


def _running(queue: Queues, project: int) -> str:
    """Say what the fit is doing.

    Raises:
        JobError: it failed for good.
    """
    jobs = {job.state: job for job in queue.jobs(project)}
    if "failed" in jobs and not {"running", "retrying", "queued"} & set(jobs):
        raise JobError(f"{jobs['failed'].id} failed: {jobs['failed'].message}")
    running = jobs.get("running")
    return f"{running.message} {running.percent} %" if running else "learning what normal looks like"


def summarise(store: ProjectStore, tasks: dict[int, Picture], watch: Watch, console: Console) -> None:
    """Print images, seconds per stage, images per second and, for a labelled folder, the image AUROC."""
    scores = {
        task: record["anomaly"]["anomaly_score"]
        for task in tasks
        if (record := store.record(store.current, task)) is not None
    }
    table = Table(title=f"version {store.current}", box=None, show_header=False, padding=(0, 2))
    for name, seconds in watch.seconds.items():
        table.add_row(name, f"{seconds:.1f} s")
    scoring = watch.seconds["score and push"]
    table.add_row("open images scored", f"{len(scores)}  ({len(scores) / max(scoring, 1e-9):.1f} a second, pushed)")
    labelled = [task for task in scores if tasks[task].defect is not None]
    defects = [bool(tasks[task].defect) for task in labelled]
    if any(defects) and not all(defects):
        auroc = metrics.auroc(np.array(defects), np.array([scores[task] for task in labelled]))
        table.add_row("image AUROC", f"{auroc:.3f}  ({sum(defects)} defects among {len(defects)})")
    for failure in store.failures():
        table.add_row("not scored", f"task {failure.task}: {failure.reason}")
    console.print(table)


def _invite(place: instance.Instance, settings: Settings, store: ProjectStore, console: Console) -> None:
    streams = "".join(f"{title:<16}{address}\n" for title, address in tabs.links(store, place.url).items())
    console.print(
        Panel(
            f"[bold]{place.url}/projects/{store.id}/data[/]\n"
            f"e-mail    {EMAIL}\npassword  {PASSWORD}\n\n"
            f"{streams}\n"
            f"The project's page: {page_address(settings, store.id)}\n"
            f"user      {settings.user}\npassword  {front_password(settings)}\n\n"
            "Open a task: verdict, mask and heatmap are there, correct them and submit.\nCtrl-C stops everything.",
            title="Label Studio is ready",
            expand=False,
        )
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)
