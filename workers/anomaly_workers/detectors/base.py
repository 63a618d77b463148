"""The contract every detector keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomaly_workers.types import Detection, Picture, Progress, no_progress


@dataclass(frozen=True, slots=True)
class Options:
    """How a detector is built.

    Attributes:
        detector: a name in `DETECTORS`.
        backbone: a timm or torchvision name, see `backbones.create`.
        weights: local weight file; empty means the embedded package's, "random" is for tests.
        weights_sha256: checksum the file must have; empty means unchecked.
        image_size: square root of the pixel count pictures are scaled to.
        device: "cpu", "cuda" or "cuda:N".
        target_fpr: share of normal images that may raise an alarm.
        seed: makes a fit repeatable.
    """

    detector: str = "patchcore-padim"
    backbone: str = "efficientnet_lite0"
    weights: str = ""
    weights_sha256: str = ""
    image_size: int = 256
    device: str = "cpu"
    target_fpr: float = 0.01
    seed: int = 0


class Detector(ABC):
    """Learns what normal looks like, then scores images. Higher is more abnormal, always.

    Attributes:
        side: the `side` that pictures given to this detector are loaded with (`images.load`).
        threshold: operating point on the calibrated scale, in [0, 1].
    """

    side: int
    threshold: float

    @abstractmethod
    def fit(
        self, pictures: Sequence[Picture], *, confirmed: Sequence[bool] = (), progress: Progress = no_progress
    ) -> None:
        """Learn from pictures taken as mostly normal.

        Args:
            pictures: training pictures, at least two.
            confirmed: one flag a picture, True where a person said "normal"; empty means nobody looked, so that some
                of them may be defects and the fit must be robust against that.
            progress: told the done fraction and stage; may raise `Cancelled`.

        Raises:
            ConfigError: fewer than two pictures.
        """

    @abstractmethod
    def predict(self, pictures: Sequence[Picture]) -> list[Detection]:
        """Score pictures of any mix of shapes, in their order.

        Raises:
            NotFitted: before `fit` or `load`.
        """

    @abstractmethod
    def quietening(self, picture: Picture, where: NDArray[np.bool_] | None = None) -> NDArray[np.float16]:
        """Return the patches (k, d) of a picture that must count as normal for it to raise no alarm.

        Args:
            picture: what was rejected.
            where: (h, w) bool of any resolution, the places that were; None for the whole picture.

        Returns:
            What `take_as_normal` needs; k is 0 where nothing is above normal, or the method cannot learn so.
        """

    @abstractmethod
    def take_as_normal(self, patches: NDArray[np.float16]) -> None:
        """Count patches (k, d) as normal besides what was fitted; replaces those given before, and is not saved."""

    @abstractmethod
    def is_quietened(self, hottest: NDArray[np.float16], patches: NDArray[np.float16]) -> bool:
        """Tell whether some of a detection's hottest patches look less abnormal once `patches` count as normal.

        Args:
            hottest: (n, d), see `Detection`.
            patches: (k, d), see `quietening`.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write `detector.safetensors` and `detector.json` into an existing folder."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> Detector:
        """Read what `save` wrote; predictions are equal up to float rounding.

        Raises:
            StoreError: a file is missing or damaged.
        """
