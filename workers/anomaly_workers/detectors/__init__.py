"""Detection methods by name."""

from __future__ import annotations

from pathlib import Path

from anomaly_workers.detectors.base import Detector, Options
from anomaly_workers.detectors.joint import PatchCorePadim
from anomaly_workers.detectors.padim import Padim
from anomaly_workers.detectors.patchcore import PatchCore
from anomaly_workers.detectors.patchwise import PatchwiseDetector, saved_name
from anomaly_workers.errors import ConfigError, StoreError
from anomaly_workers.settings import Settings

__all__ = ["DETECTORS", "Detector", "Options", "create", "load", "options"]

DETECTORS: dict[str, type[PatchwiseDetector]] = {
    "patchcore-padim": PatchCorePadim,
    "patchcore": PatchCore,
    "padim": Padim,
}


def create(options: Options) -> Detector:
    """Build an unfitted detector.

    Raises:
        ConfigError: no detector or backbone of that name.
        WeightsError: the backbone's weights are absent or wrong.
    """
    if options.detector not in DETECTORS:
        raise ConfigError(f"There is no detector {options.detector!r}. Use one of: {', '.join(DETECTORS)}.")
    return DETECTORS[options.detector](options)


def load(folder: Path, *, device: str = "cpu") -> Detector:
    """Load a saved detector of whichever method.

    Raises:
        StoreError: a file is missing or damaged, or the method is unknown.
    """
    name = saved_name(folder)
    if name not in DETECTORS:
        raise StoreError(f"The model in {folder} is of the unknown kind {name!r}. Update this program or fit it again.")
    return DETECTORS[name].load(folder, device=device)


def options(settings: Settings, *, device: str, seed: int = 0) -> Options:
    """Return what the settings say about detection, for a device that exists."""
    return Options(
        detector=settings.detector,
        backbone=settings.backbone,
        weights=settings.weights,
        weights_sha256=settings.weights_sha256,
        image_size=settings.image_size,
        device=device,
        target_fpr=settings.target_fpr,
        seed=seed,
    )
