"""Cold start: how well defects are told from normal images when nobody labelled anything.

    .venv/bin/python tests/bench/cold_start.py ../shared/data --share 0.167

Each class's train/good with defects of pool/ among them becomes one unlabelled set; what was learnt from it scores it,
no image by its own patches. test/ is not looked at. The defects that were not mixed in are scored too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from sklearn.metrics import roc_auc_score

from anomaly_workers import detectors, evaluate
from anomaly_workers.evaluate import ClassFolder, EvalOptions
from anomaly_workers.types import Picture


def mixed(one: ClassFolder, share: float, *, seed: int) -> tuple[list[Path], NDArray[np.bool_], int]:
    """Return files with their labels, and how many of the first ones are learnt from."""
    random = np.random.default_rng(seed)
    defects = [one.pool[i] for i in random.permutation(len(one.pool))]
    inside = min(round(share / (1 - share) * len(one.train)), len(defects))
    files = [*one.train, *defects[:inside]]
    files = [files[i] for i in random.permutation(len(files))]
    everything = [*files, *defects[inside:]]
    return everything, np.asarray([path.parent.name != "good" for path in everything]), len(files)


def pictures_of(files: Sequence[Path], side: int) -> list[Picture]:
    return [picture for batch in evaluate.decoded(files, side) for picture in batch]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="classes in MVTec layout, or a folder of them")
    parser.add_argument("--share", type=float, default=1 / 6, help="share of defects in the unlabelled set")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    classes = [evaluate.read_class(folder) for folder in evaluate.class_folders(given.folders)]
    for one in track(classes, description="learning", transient=True):
        files, anomalous, learnt = mixed(one, given.share, seed=given.seed)
        detector = detectors.create(evaluate.detector_options(EvalOptions()))
        pictures = pictures_of(files, detector.side)
        detector.fit(pictures[:learnt])
        found = detector.predict(pictures)
        scores, alarms = np.asarray([it.score for it in found]), np.asarray([it.is_anomaly for it in found])
        print(
            f"{one.name:14s} {int(anomalous[:learnt].sum())} defects in {learnt}: AUROC "
            f"{roc_auc_score(anomalous, scores):.3f}, recall {alarms[anomalous].mean():.3f}, "
            f"FPR {alarms[~anomalous].mean():.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
