"""The simulated inspector of `inspector.py` in a real Label Studio, with the whole product behind it.

    .venv/bin/python tests/bench/live_inspector.py ../shared/data --seeds 1 --json live_inspector.json

Each run is a project of its own: its images are uploaded, scored and put in order by the workers. With "mix" the
inspector takes what the label stream of "Review next" serves; the other orders are fixed. Every verdict, with the mask
where there is one, is an annotation of Label Studio; after `STEPS` labels the inspector waits until everything is
learnt, rolled out and in order again. Images that are never uploaded tell the image AUROC of the deployed version.

A run takes minutes and is written to the file of `--json` as soon as it ends; started again with the same file, the
bench makes only the runs that are missing, so that a file is for one state of the code. `--at-once` runs share the
workers, as projects do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import cast

import numpy as np
from inspector import ORDERS, SHARES, STEPS, fresh, line, scene, summary
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from anomaly_workers import detectors, evaluate, instance, metrics, queues, server, sweep, tabs
from anomaly_workers.client import Client
from anomaly_workers.enrol import enrol
from anomaly_workers.evaluate import ClassFolder
from anomaly_workers.feedback import FeedbackLog
from anomaly_workers.labelstudio import config, masks
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.stack import Stack
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import JSON, Connection, Controls

PATIENCE = 900.0
LABEL_STUDIO = Path(__file__).resolve().parents[2] / ".venv-label-studio/bin/label-studio"


@dataclass(frozen=True)
class Site:
    """A running Label Studio and the product."""

    label_studio: instance.Instance
    settings: Settings
    client: Client
    stopped: Event

    def queues(self) -> Queues:
        return Queues(queues.connect(server.ensure(self.settings)), self.settings)


def review(site: Site, one: ClassFolder, order: str, *, seed: int, advance: Callable[..., None]) -> JSON:
    """Make a project, review 40 % of it in one order; return what was found when, and the AUROC on the way."""
    files, aside = scene(one, fresh(), seed=seed)
    shown = [path for path, apart in zip(files, aside, strict=True) if not apart]
    apart = [path for path, apart in zip(files, aside, strict=True) if apart]
    report = enrol(site.settings, site.label_studio.url, site.label_studio.token, create=f"{one.name} {order} {seed}")
    store = Store(site.settings.data_dir).project(report.project)
    controls = config.parse(store.label_config)
    named = [(f"{index:04d}{path.suffix}", path.read_bytes()) for index, path in enumerate(shown)]
    addresses = site.client.upload(store.id, named)
    tasks = site.client.import_tasks(store.id, [{"data": {controls.value: address}} for address in addresses])
    path_of = dict(zip(tasks, shown, strict=True))
    settle(site, store, 0)
    auroc = {0: auroc_of(store, apart)}
    fixed = fixed_order(store, tasks, order, seed=seed)
    found: list[int] = []
    while len(found) < round(max(SHARES) * len(tasks)):
        task = fixed[len(found)] if fixed else next_of_stream(site, store)
        anomalous = path_of[task].parent.name != "good"
        site.client.annotate(task, verdict(controls, path_of[task], anomalous=anomalous))
        found.append(anomalous + (found[-1] if found else 0))
        advance(description=f"{one.name}, {order}: {len(found)} reviewed")
        if len(found) in STEPS:
            settle(site, store, len(found))
            auroc[len(found)] = auroc_of(store, apart)
    defects = sum(path.parent.name != "good" for path in shown)
    return {"seed": seed, "found": found, "auroc": auroc, "tasks": len(tasks), "defects": defects}


def settle(site: Site, store: ProjectStore, labels: int) -> None:
    """Wait until every label is learnt from, every open task has the deployed version's prediction, and a place."""
    deadline = time.monotonic() + PATIENCE
    while not is_settled(site, store, labels):
        if site.stopped.is_set():
            raise InterruptedError(f"project {store.id} was left after {labels} labels")
        if time.monotonic() > deadline:
            raise TimeoutError(f"project {store.id} did not settle after {labels} labels; see `ls-anomaly jobs`")
        time.sleep(0.5)


def is_settled(site: Site, store: ProjectStore, labels: int) -> bool:
    log = FeedbackLog(store)
    if not store.current or store.rollout or len(log.current()) < labels or site.queues().fitting(store.id):
        return False
    if sweep.may_learn(store, log, site.settings.model_copy(update={"learn_quiet_seconds": 0.0})):
        return False
    if sweep.is_out_of_order(store, now=time.time()):
        return False
    return next(site.client.open_tasks(store.id, without_version=store.current), None) is None


def fixed_order(store: ProjectStore, tasks: Sequence[int], order: str, *, seed: int) -> list[int]:
    """Return all tasks in an order that no verdict changes; nothing for the product's own."""
    if order == "random":
        return [tasks[index] for index in np.random.default_rng(1000 + seed).permutation(len(tasks))]
    if order == "highest unsupervised":
        records = {task: store.record(store.current, task) for task in tasks}
        score = {task: one["anomaly"]["anomaly_score"] for task, one in records.items() if one}
        return sorted(tasks, key=lambda task: -score[task])
    return []


def next_of_stream(site: Site, store: ProjectStore) -> int:
    """Return the task that the label stream of "Review next" serves."""
    [link] = [link for title, link in tabs.links(store, "").items() if title.startswith("Review next")]
    tab = link.split("tab=")[1].split("&")[0]
    path = f"/api/dm/actions?id=next_task&project={store.id}&tabID={tab}"
    return int(site.client._send("POST", path, body={})["id"])


def verdict(controls: Controls, path: Path, *, anomalous: bool) -> list[JSON]:
    """Return what an inspector who knows the truth submits."""
    assert controls.choices is not None
    word = controls.anomaly if anomalous else controls.normal
    where = {"from_name": controls.choices.name, "to_name": controls.image, "type": "choices"}
    result: list[JSON] = [where | {"value": {"choices": [word]}}]
    file = evaluate.mask_file(path.parents[2], path) if anomalous else None
    if file is None or controls.mask is None:
        return result
    drawn = np.asarray(Image.open(file).convert("L")) > 127
    height, width = drawn.shape
    size = {"original_width": width, "original_height": height, "image_rotation": 0}
    code = {"format": "rle", "rle": masks.to_rle(drawn, (height, width)), "brushlabels": [controls.mask_label]}
    mask = {"from_name": controls.mask.name, "to_name": controls.image, "type": "brushlabels", "value": code}
    return [*result, mask | size] if drawn.any() else result


def auroc_of(store: ProjectStore, files: Sequence[Path]) -> float:
    """Return the image AUROC of the deployed version on files that Label Studio has never seen."""
    detector = detectors.load(store.version_folder(store.current))
    pictures = [picture for batch in evaluate.decoded(files, detector.side) for picture in batch]
    labels: NDArray[np.bool_] = np.array([path.parent.name != "good" for path in files])
    return cast("float", metrics.auroc(labels, np.array([one.score for one in detector.predict(pictures)])))


def timed(site: Site, one: ClassFolder, order: str, seed: int, advance: Callable[..., None]) -> tuple[str, JSON, float]:
    began = time.monotonic()
    return order, review(site, one, order, seed=seed, advance=advance), time.monotonic() - began


def known_runs(file: Path | None) -> dict[str, dict[str, dict[int, JSON]]]:
    """Return the runs that a file of figures holds, by class, order and seed."""
    figures = json.loads(file.read_text()) if file and file.exists() else {}
    if any("runs" not in row for orders in figures.values() for row in orders.values()):
        raise SystemExit(f"{file} has no single runs to go on from; give --json another file")
    return {
        name: {
            order: {run["seed"]: run | {"auroc": {int(k): v for k, v in run["auroc"].items()}} for run in row["runs"]}
            for order, row in orders.items()
        }
        for name, orders in figures.items()
    }


def write(file: Path | None, runs: dict[str, dict[str, dict[int, JSON]]]) -> None:
    if file:
        figures = {
            name: {order: summary([*rows.values()]) | {"runs": [*rows.values()]} for order, rows in orders.items()}
            for name, orders in runs.items()
        }
        scratch = file.with_name(f".{file.name}")  # a stop while it is written loses no run
        scratch.write_text(json.dumps(figures, indent=1) + "\n")
        scratch.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="classes in MVTec layout, or a folder of them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--at-once", type=int, default=1, help="how many runs share the workers")
    parser.add_argument("--port", type=int, default=8097, help="of Label Studio; the front end takes the next one")
    parser.add_argument("--label-studio", type=Path, default=LABEL_STUDIO)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    classes = [evaluate.read_class(folder) for folder in evaluate.class_folders(given.folders)]
    orders = given.orders.split(",")
    if unknown := set(orders) - set(ORDERS):
        parser.error(f"no such order: {', '.join(sorted(unknown))}; there are {', '.join(ORDERS)}")
    runs = known_runs(given.json)
    with ThreadPoolExecutor(given.at_once) as pool, ExitStack() as stack:
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        where, login = folder / "label-studio", ("inspector@example.com", "correct-horse-9")
        running = instance.start(given.label_studio, folder=where, port=given.port, email=login[0], password=login[1])
        stack.enter_context(running)
        client = stack.enter_context(Client(Connection(running.url, 0, running.token)))
        settings = load_settings(
            {},
            data_dir=folder / "anomaly",
            port=given.port + 1,
            sweep_seconds=1.0,
            settle_seconds=1.0,
            learn_quiet_seconds=3.0,
            log_level="WARNING",
        )
        product = Stack(settings)
        stack.callback(product.stop)
        product.start()
        bars = stack.enter_context(Progress(transient=True))
        site = Site(running, settings, client, Event())
        stack.callback(site.stopped.set)
        cases = [(one, seed, order) for one in classes for seed in range(given.seeds) for order in orders]
        cases = [case for case in cases if case[1] not in runs.get(case[0].name, {}).get(case[2], {})]
        bar = bars.add_task("reviewing", total=len(cases))
        advance = partial(bars.update, bar)
        waiting = {pool.submit(timed, site, one, order, seed, advance): one for one, seed, order in cases}
        failed = 0
        for ended in as_completed(waiting):
            if problem := ended.exception():  # of one project: the others go on
                print(f"{waiting[ended].name}: {type(problem).__name__}: {problem}", flush=True)
                failed += 1
                continue
            one, (order, run, seconds) = waiting[ended], ended.result()
            runs.setdefault(one.name, {}).setdefault(order, {})[run["seed"]] = run
            write(given.json, runs)
            bars.advance(bar)
            print(f"{one.name} {order} seed {run['seed']}: {seconds:.0f} s", flush=True)
    for name, found in runs.items():
        for order, rows in found.items():
            print(f"{name:14s} {order:22s} {line(summary([*rows.values()]))}", flush=True)
    if failed:
        raise SystemExit(f"{failed} runs failed; the same command makes them again")


if __name__ == "__main__":
    main()
