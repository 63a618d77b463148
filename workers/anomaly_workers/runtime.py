"""What a worker process keeps warm between jobs: the device, fitted detectors, connections to Label Studio."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass

import torch
from redis import Redis

from anomaly_workers import detectors
from anomaly_workers.client import Client
from anomaly_workers.detectors.base import Detector
from anomaly_workers.errors import ConfigError
from anomaly_workers.fetch import Fetcher
from anomaly_workers.labelstudio import config
from anomaly_workers.pictures import PictureCache
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import Connection, Controls

logger = logging.getLogger(__name__)

WARM_DETECTORS = 4
"""Fitted detectors kept loaded; the one used longest ago goes first."""


@dataclass(frozen=True, slots=True)
class Session:
    """Everything a job needs of one project."""

    store: ProjectStore
    client: Client
    fetcher: Fetcher
    pictures: PictureCache
    controls: Controls


class Runtime:
    """Lives as long as its worker process.

    Attributes:
        settings: the process's settings.
        store: versions and predictions.
        redis: the queue's Redis, for locks and counters.
        queues: where follow-up work is left.
        device: "cpu", "cuda" or "cuda:N".
    """

    def __init__(self, settings: Settings, connection: Redis) -> None:
        self.settings = settings
        self.store = Store(settings.data_dir)
        self.redis = connection
        self.queues = Queues(connection, settings)
        self.device = choose_device(settings.device)
        self._detectors: OrderedDict[tuple[int, str], Detector] = OrderedDict()
        self._calmed: dict[tuple[int, str], tuple[int, ...]] = {}
        self._pictures: dict[int, PictureCache] = {}
        self._clients: dict[Connection, tuple[Client, Fetcher]] = {}

    def session(self, project: int) -> Session:
        """Return a project's session; the client keeps its access token between jobs.

        Raises:
            StoreError: the project is not connected.
            ConfigError: its label config offers nothing to fill.
        """
        store = self.store.project(project)
        connection = store.connection()
        if connection not in self._clients:
            self._clients[connection] = (Client(connection), Fetcher(connection, self.settings))
        client, fetcher = self._clients[connection]
        if not store.label_config:
            store.keep_label_config(client.project(project).label_config)
        return Session(store, client, fetcher, self._pictures_of(store), config.parse(store.label_config))

    def _pictures_of(self, store: ProjectStore) -> PictureCache:
        if store.id not in self._pictures:
            limit = self.settings.picture_cache_mb * 1_000_000
            self._pictures[store.id] = PictureCache(store.folder / "pictures", limit=limit)
        return self._pictures[store.id]

    def new_detector(self) -> Detector:
        """Build an unfitted detector as configured."""
        return detectors.create(detectors.options(self.settings, device=self.device))

    def detector(self, project: int, version: str) -> Detector:
        """Return a version's detector, loaded at most once while it stays warm."""
        key = (project, version)
        if key not in self._detectors:
            card = self.store.project(project).card(version)
            kind = detectors.DETECTORS[str(card["detector"])]
            self._detectors[key] = kind.load(self.store.project(project).version_folder(version), device=self.device)
            logger.info("project %d: %s loaded on %s", project, version, self.device)
        self._detectors.move_to_end(key)
        self._take_calmed(key)
        self._let_go()
        return self._detectors[key]

    def _let_go(self) -> None:
        while len(self._detectors) > WARM_DETECTORS:
            dropped, _ = self._detectors.popitem(last=False)
            self._calmed.pop(dropped, None)

    def published(self, project: int, version: str) -> Detector:
        """Load a version as it was published, without what annotators rejected since."""
        kind = detectors.DETECTORS[str(self.store.project(project).card(version)["detector"])]
        return kind.load(self.store.project(project).version_folder(version), device=self.device)

    def _take_calmed(self, key: tuple[int, str]) -> None:
        """Bring a detector up to date with what annotators rejected since."""
        project, version = key
        store = self.store.project(project)
        entries = store.calmed(version)
        if entries != self._calmed.get(key, ()):
            self._detectors[key].take_as_normal(store.calmed_patches(version, entries))
            self._calmed[key] = entries

    def keep_warm(self, project: int, version: str, detector: Detector) -> None:
        """Use a detector that was fitted in this process without loading it again."""
        self._detectors[(project, version)] = detector
        self._let_go()


def choose_device(wanted: str) -> str:
    """Return a device that exists: the GPU if there is one and `wanted` is "auto".

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"ANOMALY_DEVICE is {wanted!r}, but torch sees no GPU. Set it to auto or cpu.")
    return wanted
