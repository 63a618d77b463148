"""The frozen values that cross layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

JSON = dict[str, Any]

Progress = Callable[[float, str], None]
"""Called with the done fraction in [0, 1] and the stage's name; raising `Cancelled` from it stops the work."""


def no_progress(_fraction: float, _stage: str) -> None:
    """Ignore progress."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image, shrunk to what a detector needs.

    Attributes:
        pixels: (h, w, 3) uint8 RGB; the original's aspect ratio up to rounding.
        size: (height, width) of the original in pixels, after EXIF orientation.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Detection:
    """What a detector says of one image. Higher is more abnormal, always.

    Attributes:
        score: calibrated anomaly score in [0, 1]; `score >= threshold` is the verdict "anomaly".
        threshold: operating point in [0, 1] on the calibrated scale, valid for score and map alike.
        anomaly_map: (h, w) float32 in [0, 1] on the same scale, with the image's aspect ratio; not at full resolution.
        size: (height, width) of the original image in pixels.
        hottest: (k, d) features of the patches that look least normal, by which look-alikes are found; k may be 0.
        parts: raw scores of memory bank and head apart, any scales, by which they disagree; empty without a head.
    """

    score: float
    threshold: float
    anomaly_map: NDArray[np.float32]
    size: tuple[int, int]
    hottest: NDArray[np.float16] = field(default_factory=lambda: np.zeros((0, 0), np.float16), repr=False)
    parts: tuple[float, ...] = ()

    @property
    def is_anomaly(self) -> bool:
        """The verdict at the operating point."""
        return self.score >= self.threshold


@dataclass(frozen=True, slots=True)
class Region:
    """One connected component of an anomaly map at the threshold.

    Attributes:
        mask: (h, w) bool at the map's resolution, True inside.
        score: the component's own anomaly score in [0, 1], its highest map value.
    """

    mask: NDArray[np.bool_]
    score: float


@dataclass(frozen=True, slots=True)
class Task:
    """A Label Studio task: its id and the raw, unresolved data dictionary."""

    id: int
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Control:
    """A control tag of a label config that predictions can fill.

    Attributes:
        tag: "Choices", "BrushLabels", "BitmaskLabels", "PolygonLabels", "RectangleLabels" or "Number".
        name: the tag's name (`from_name`).
        to_name: the Image tag it belongs to.
        labels: its choice or label values, in document order; empty for Number.
        step: of a Number: its values are multiples of it, counted from `least`; 0 when any value will do.
        least: of a Number: its smallest value.
    """

    tag: str
    name: str
    to_name: str
    labels: tuple[str, ...] = ()
    step: float = 0.0
    least: float = 0.0


@dataclass(frozen=True, slots=True)
class Controls:
    """What a label config offers to anomaly predictions.

    Attributes:
        image: name of the Image tag that predictions refer to.
        value: the task data key of that image (`image` for `value="$image"`).
        choices: Choices control for the verdict, with the words for normal and anomaly.
        normal: choice value that means normal, None without choices.
        anomaly: choice value that means anomaly, None without choices.
        mask: the control that carries regions, None if there is none.
        mask_label: the label value of `mask` used for anomalies.
        number: the Number control that takes the anomaly score.
    """

    image: str
    value: str
    choices: Control | None = None
    normal: str | None = None
    anomaly: str | None = None
    mask: Control | None = None
    mask_label: str | None = None
    number: Control | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach one Label Studio project.

    Attributes:
        url: base address of Label Studio, no trailing slash.
        token: personal access token, or legacy token.
        project: project id.
    """

    url: str
    project: int
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class JobInfo:
    """The state of a job, for people.

    Attributes:
        id: job id.
        kind: "score", "fit", ...
        state: "queued", "running", "retrying", "failed", "finished" or "cancelled".
        project: project id.
        percent: 0 to 100.
        message: the stage, or the one-line reason of a failure.
        queue: name of its queue.
        worker: name of the worker that runs it, "" if none.
    """

    id: str
    kind: str
    state: str
    project: int
    percent: int
    message: str
    queue: str
    worker: str = ""
