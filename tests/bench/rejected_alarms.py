"""What a rejected alarm costs: recall on the class's test defects before and after each of twenty rejections.

    python tests/bench/rejected_alarms.py DIR…

Each class is fitted on train/good. A false alarm is a picture of test/good at or above the threshold; where a class has
fewer than its share of the twenty, its highest scoring normal pictures are rejected too. Each is rejected alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import numpy as np

from anomaly_workers import detectors, evaluate
from anomaly_workers.detectors.patchwise import PatchwiseDetector

TOTAL = 20


def main(folders: list[Path]) -> None:
    """Print a line for each rejection and the means."""
    classes = [evaluate.read_class(folder) for folder in evaluate.class_folders(folders)]
    rows = []
    for one in classes:
        detector = cast("PatchwiseDetector", detectors.create(detectors.Options()))
        train = [picture for batch in evaluate.decoded(one.train, detector.side) for picture in batch]
        detector.fit(train, confirmed=[True] * len(train))
        test = [picture for batch in evaluate.decoded(one.test, detector.side) for picture in batch]
        defects = [picture for picture, label in zip(test, one.labels, strict=True) if label]
        normals = [picture for picture, label in zip(test, one.labels, strict=True) if not label]
        before = detector.predict(defects)
        scores = np.array([found.score for found in detector.predict(normals)])
        for index in np.argsort(-scores)[: TOTAL // len(classes)]:
            detector.take_as_normal(detector.quietening(normals[index]))
            [after] = detector.predict([normals[index]])
            recall = np.mean([found.is_anomaly for found in detector.predict(defects)])
            was = np.mean([found.is_anomaly for found in before])
            rows.append((scores[index], after.score, was - recall))
            print(f"{one.name}: {scores[index]:.3f} -> {after.score:.3f}, recall {was:.4f} -> {recall:.4f}", flush=True)
            detector.take_as_normal(np.zeros((0, 0), np.float16))
    table = np.array(rows)
    print(
        f"{len(rows)} rejections, {np.mean(table[:, 0] >= 0.5):.0%} of them alarms: "
        f"{np.mean(table[:, 1] < 0.5):.0%} below the threshold afterwards, "
        f"recall falls by {100 * table[:, 2].mean():.2f} points in the mean, {100 * table[:, 2].max():.2f} at most"
    )


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
