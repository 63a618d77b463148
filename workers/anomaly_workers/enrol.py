"""Connecting a project for good: set it up in Label Studio, remember how to reach it."""

from __future__ import annotations

from anomaly_workers.client import Client
from anomaly_workers.connect import ConnectReport, connect
from anomaly_workers.settings import Settings, public_url
from anomaly_workers.store import Store
from anomaly_workers.types import Connection


def enrol(
    settings: Settings, url: str, token: str, *, project: int | None = None, create: str = "", heatmap: bool = True
) -> ConnectReport:
    """Connect a project, existing or new, and keep its address and token in the store.

    Raises:
        ConfigError: the label config cannot carry predictions, or Label Studio cannot reach the front end.
        LabelStudioError: Label Studio refused something else, or does not answer.
    """
    store = Store(settings.data_dir)
    with Client(Connection(url=url, token=token, project=project or 0)) as client:
        report = connect(
            client,
            settings,
            project=project,
            create=create or None,
            password=front_password(settings),
            heatmap_url=lambda number: heatmap_address(settings, number),
            add_heatmap=heatmap,
        )
        kept = store.project(report.project)
        kept.connect(Connection(url=url, token=token, project=report.project))
        kept.keep_label_config(client.project(report.project).label_config)
    return report


def front_password(settings: Settings) -> str:
    """Return the password of the front end: the configured one, or the one kept in the data directory."""
    return settings.password.get_secret_value() or Store(settings.data_dir).secret("password")


def heatmap_address(settings: Settings, project: int) -> str:
    """Return where a browser finds a project's heatmaps."""
    return f"{public_url(settings)}/heatmap/{project}/{Store(settings.data_dir).heatmap_token(project)}"
