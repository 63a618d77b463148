"""A simulated inspector: how many defects are found by how many reviews, and how good the model is by then.

    .venv/bin/python tests/bench/inspector.py ../shared/data --seeds 5 --json inspector.json

Each class becomes a project that nobody labelled: its defects and five times as many normal images. An inspector who
knows the truth reviews task after task in the order of a strategy; the product's own parts (cold start, study, gate,
query strategies) refit after `STEPS` labels. A quarter of test/ is never shown to anybody: the image AUROC is of that.
Label Studio itself is left out: `tests/e2e/test_queue.py` shows that it serves the order it is given.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from sklearn.metrics import roc_auc_score

from anomaly_workers import detectors, evaluate
from anomaly_workers.active import strategies
from anomaly_workers.active.strategies import Pool
from anomaly_workers.detectors.patchwise import PatchwiseDetector
from anomaly_workers.detectors.scales import Grids
from anomaly_workers.evaluate import ClassFolder, EvalOptions
from anomaly_workers.refine import gate
from anomaly_workers.refine.study import Lesson, inside_cells, invent, study
from anomaly_workers.sweep import ENOUGH_NORMALS, ENOUGH_OF_EACH
from anomaly_workers.types import Detection, Picture

ORDERS = ("random", "highest unsupervised", "mix")
STEPS = (10, 25, 50)
"""Labels after which the model learns."""

REORDER = 5
LENGTH = 60
NORMALS_A_DEFECT = 5
AUROC_AT = (0, 10, 25, 50)
SHARES = (0.1, 0.2, 0.4)
HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Scene:
    """The tasks of one class and the images that stay aside."""

    files: list[Path]
    anomalous: NDArray[np.bool_]
    pictures: list[Picture] = field(repr=False)
    grids: list[Grids] = field(repr=False)
    aside: NDArray[np.bool_]


@dataclass
class Model:
    """A deployed version."""

    detector: PatchwiseDetector
    fitted: int
    held_out: dict[int, float]


def scene(one: ClassFolder, detector: PatchwiseDetector, *, seed: int) -> tuple[list[Path], NDArray[np.bool_]]:
    """Draw the files of a class, and which of them stay aside."""
    random = np.random.default_rng(seed)
    held = [path for path in one.test if random.random() < HELD_OUT_SHARE]
    rest = [path for path in one.test if path not in set(held)]
    defects = [path for path in [*rest, *one.pool] if path.parent.name != "good"]
    normals = [path for path in [*rest, *one.train] if path.parent.name == "good"]
    defects = [defects[i] for i in random.permutation(len(defects))[: len(normals) // NORMALS_A_DEFECT]]
    normals = [normals[i] for i in random.permutation(len(normals))[: NORMALS_A_DEFECT * len(defects)]]
    tasks = sorted([*defects, *normals])
    tasks = [tasks[i] for i in random.permutation(len(tasks))]
    return [*tasks, *held], np.asarray([False] * len(tasks) + [True] * len(held))


class Features:
    """Each image of a class through the backbone once."""

    def __init__(self, detector: PatchwiseDetector) -> None:
        self._detector = detector
        self._known: dict[Path, tuple[Picture, Grids]] = {}

    def of(self, files: Sequence[Path]) -> tuple[list[Picture], list[Grids]]:
        missing = [path for path in files if path not in self._known]
        pictures = [picture for batch in evaluate.decoded(missing, self._detector.side) for picture in batch]
        for path, picture, grid in zip(missing, pictures, self._detector.grids(pictures), strict=True):
            self._known[path] = picture, grid
        found = [self._known[path] for path in files]
        return [picture for picture, _ in found], [grid for _, grid in found]


def fresh() -> PatchwiseDetector:
    return cast("PatchwiseDetector", detectors.create(evaluate.detector_options(EvalOptions())))


def learn(here: Scene, labels: dict[int, bool], champion: Model | None, *, seed: int) -> Model:
    """Fit a challenger as the product does; return it if the gate lets it pass, else the champion."""
    tasks = np.flatnonzero(~here.aside)
    normal = [i for i, bad in labels.items() if not bad]
    unlabelled = [int(i) for i in tasks if i not in labels]
    enough = len(normal) >= max(ENOUGH_NORMALS, (champion.fitted if champion else 0) // 2)
    chosen = sorted(normal) if enough else sorted([*normal, *unlabelled])
    detector = fresh()
    flags = [i in labels for i in chosen]
    bad = [i for i, anomalous in labels.items() if anomalous]
    grids, pictures = [here.grids[i] for i in chosen], [here.pictures[i] for i in chosen]
    kept = detector.fit_grids(grids, pictures, flags, defects=[here.grids[i] for i in bad])
    places = {chosen[at]: place for place, at in enumerate(kept)}
    candidates = []
    if champion is not None and min(len(bad), len(normal)) >= ENOUGH_OF_EACH:
        invented = invent(detector.grids, [pictures[at] for at in kept])
        taught = study(detector.memory, [grids[at] for at in kept], [lesson(here, i) for i in bad], invented=invented)
        joined = detector.joined(taught.head, taught.normals.tolist())
        scores = {i: joined.calibrated(float(raw)) for i, raw in zip(bad, taught.lessons, strict=True)}
        candidates.append((joined, scores | {i: joined.held_out[places[i]] for i in normal if i in places}))
    plain = {i: float(s) for i, s in zip(bad, scores_of(detector, here, bad), strict=True)}
    candidates.append((detector, plain | {i: detector.held_out[places[i]] for i in normal if i in places}))
    if champion is None or min(len(bad), len(normal)) < ENOUGH_OF_EACH:
        return champion or Model(detector, len(kept), {})
    confirmed = [*bad, *normal]
    unknown = [i for i in confirmed if i not in champion.held_out]
    before = champion.held_out | dict(zip(unknown, scores_of(champion.detector, here, unknown), strict=True))
    for one, scores in candidates:
        rest = [i for i in confirmed if i not in scores]
        after = scores | dict(zip(rest, scores_of(one, here, rest), strict=True))
        trials = [gate.Trial(i, labels[i], float(before[i]), float(after[i])) for i in confirmed]
        if gate.decide(trials, seed=seed).promote:
            return Model(one, len(kept), after)
    return champion


def lesson(here: Scene, index: int) -> Lesson:
    """A confirmed defect, with its mask where there is one."""
    path, grid = here.files[index], here.grids[index]
    file = evaluate.mask_file(path.parents[2], path)
    if file is None:
        return Lesson(grid, None)
    whole = evaluate.read_mask(file, here.pictures[index].pixels.shape[:2])
    inside = inside_cells(whole, grid.shape)
    return Lesson(grid, inside if bool(inside.any()) else None)


def scores_of(detector: PatchwiseDetector, here: Scene, wanted: Sequence[int]) -> list[float]:
    return [one.score for one in seen(detector, here, wanted)]


def seen(detector: PatchwiseDetector, here: Scene, wanted: Sequence[int]) -> list[Detection]:
    return [detector.predict_grids([here.pictures[i]], here.grids[i])[0] for i in wanted]


def pool_of(model: Model, here: Scene, labels: dict[int, bool]) -> Pool:
    """What the product knows of the open tasks."""
    tasks = np.flatnonzero(~here.aside)
    found = dict(zip(tasks.tolist(), seen(model.detector, here, tasks.tolist()), strict=True))
    rows = {i: one.hottest.astype(np.float32).mean(axis=0) for i, one in found.items()}
    still = [i for i in found if i not in labels]
    parts = [found[i].parts for i in still]
    return Pool(
        tasks=np.asarray(still),
        scores=np.asarray([found[i].score for i in still]),
        threshold=model.detector.threshold,
        embeddings=np.stack([rows[i] for i in still]),
        parts=np.asarray(parts) if parts and len(parts[0]) == 2 else None,
        reviewed=np.stack([rows[i] for i in labels]) if labels else np.zeros((0, len(rows[still[0]])), np.float32),
        defects=sum(labels.values()),
    )


def without(pool: Pool, labels: dict[int, bool]) -> Pool:
    """The pool less what was reviewed since."""
    open_ = np.asarray([int(task) not in labels for task in pool.tasks])
    gone = pool.embeddings[~open_]
    return Pool(
        pool.tasks[open_],
        pool.scores[open_],
        pool.threshold,
        pool.embeddings[open_],
        None if pool.parts is None else pool.parts[open_],
        np.concatenate([pool.reviewed.reshape(-1, gone.shape[1]), gone]),
        sum(labels.values()),
    )


def inspect(here: Scene, first: Model, order: str, *, seed: int) -> dict[str, object]:
    """Review 40 % of the tasks in one order; return what was found when, and the AUROC on the way."""
    total = int((~here.aside).sum())
    labels: dict[int, bool] = {}
    model, found, auroc = first, [], {0: auroc_of(first, here)}
    fixed = pool_of(first, here, {})
    shuffled = np.random.default_rng(1000 + seed).permutation(total)
    pool = fixed
    while len(labels) < round(max(SHARES) * total):
        if order == "random":
            nexts = [int(fixed.tasks[i]) for i in shuffled if int(fixed.tasks[i]) not in labels]
        elif order == "highest unsupervised":
            nexts = [int(fixed.tasks[i]) for i in strategies.highest(fixed, total)]
            nexts = [i for i in nexts if i not in labels]
        else:
            nexts = [int(pool.tasks[i]) for i in strategies.named(order)(pool, LENGTH)]
        for task in nexts[:REORDER]:
            labels[task] = bool(here.anomalous[task])
            found.append(sum(labels.values()))
        pool = without(pool, labels)
        if len(labels) in STEPS:
            before = model
            model = learn(here, labels, model, seed=seed)
            if model is not before:
                pool = pool_of(model, here, labels)
            auroc[len(labels)] = auroc_of(model, here)
    return {"found": found, "auroc": auroc, "tasks": total, "defects": int(here.anomalous[~here.aside].sum())}


def auroc_of(model: Model, here: Scene) -> float:
    aside = np.flatnonzero(here.aside)
    return float(roc_auc_score(here.anomalous[aside], scores_of(model.detector, here, aside.tolist())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="classes in MVTec layout, or a folder of them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    classes = [evaluate.read_class(folder) for folder in evaluate.class_folders(given.folders)]
    orders = given.orders.split(",")
    figures: dict[str, dict[str, object]] = {}
    print(
        f"torch on {torch.get_num_threads()} threads; found at 10 / 20 / 40 % of a perfect order's, AUROC at 0/10/25/50"
    )
    with Progress(transient=True) as bars:
        bar = bars.add_task("reviewing", total=len(classes) * given.seeds * len(orders))
        for one in classes:
            features = Features(fresh())
            rows: dict[str, list[dict[str, object]]] = {order: [] for order in orders}
            for seed in range(given.seeds):
                files, aside = scene(one, fresh(), seed=seed)
                pictures, grids = features.of(files)
                anomalous = np.asarray([path.parent.name != "good" for path in files])
                here = Scene(files, anomalous, pictures, grids, aside)
                began = time.monotonic()
                first = learn(here, {}, None, seed=seed)
                for order in orders:
                    rows[order].append(inspect(here, first, order, seed=seed))
                    bars.update(bar, advance=1, description=f"{one.name} seed {seed}")
                print(f"{one.name} seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
                figures[one.name] = {order: summary(runs) for order, runs in rows.items()}
                if given.json:
                    given.json.write_text(json.dumps(figures, indent=1) + "\n")
            for order in orders:
                print(f"{one.name:14s} {order:22s} {line(figures[one.name][order])}", flush=True)


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over runs of {"tasks", "defects", "found" after each review, "auroc" by labels}.

    "found" is the share of what a perfect order finds, by share of reviews; "curve" the share of the defects that is
    found after 0, 1, … % of the reviews. The number of tasks differs a little from seed to seed.
    """
    percents = range(round(100 * max(SHARES)) + 1)
    steps = [step for step in AUROC_AT if all(step in run["auroc"] for run in runs)]
    return {
        "tasks": round(float(np.mean([run["tasks"] for run in runs]))),
        "defects": round(float(np.mean([run["defects"] for run in runs]))),
        "seeds": len(runs),
        "found": {str(share): float(np.mean([_of_perfect(run, share) for run in runs])) for share in SHARES},
        "auroc": {str(step): float(np.mean([run["auroc"][step] for run in runs])) for step in steps},
        "curve": [
            float(np.mean([_found(run, percent / 100) / run["defects"] for run in runs])) for percent in percents
        ],
    }


def _found(run: Mapping[str, Any], share: float) -> int:
    reviews = round(share * run["tasks"])
    return int(run["found"][reviews - 1]) if reviews else 0


def _of_perfect(run: Mapping[str, Any], share: float) -> float:
    return float(_found(run, share) / min(run["defects"], round(share * run["tasks"])))


def line(row: object) -> str:
    one = cast("dict[str, dict[str, float]]", row)
    found = " / ".join(f"{value:.0%}" for value in one["found"].values())
    auroc = " / ".join(f"{value:.3f}" for value in one["auroc"].values())
    return f"{one['defects']} defects in {one['tasks']}: {found}   {auroc}"


if __name__ == "__main__":
    main()
