"""The GPU says what the CPU says."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from anomaly_workers import detectors, images, sample
from anomaly_workers.settings import load_settings
from anomaly_workers.types import Picture


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")
def test_scores_on_the_gpu_equal_those_on_the_cpu() -> None:
    scores = {}
    for device in ("cpu", "cuda"):
        detector = detectors.create(detectors.options(load_settings({}), device=device))
        pictures = [picture(number, "good", detector.side) for number in range(12)]
        detector.fit(pictures, confirmed=[True] * 12)
        wanted = [*pictures[:2], *(picture(number, "stain", detector.side) for number in range(4))]
        scores[device] = [detection.score for detection in detector.predict(wanted)]
    np.testing.assert_allclose(scores["cuda"], scores["cpu"], atol=0.02)


def picture(seed: int, defect: str, side: int) -> Picture:
    buffer = io.BytesIO()
    sample.washer(np.random.default_rng(seed), defect=defect).save(buffer, "JPEG")
    return images.load(buffer.getvalue(), side=side)
