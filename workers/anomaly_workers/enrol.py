"""Connecting a project for good: set it up in Label Studio, remember how to reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from anomaly_workers import policy, tabs
from anomaly_workers.client import Client
from anomaly_workers.connect import ConnectReport, Plan, Request, connect, foresee
from anomaly_workers.settings import Settings, public_url
from anomaly_workers.store import Store
from anomaly_workers.types import Connection


def enrol(
    settings: Settings,
    url: str,
    token: str,
    *,
    project: int | None = None,
    create: str = "",
    heatmap: bool = True,
    annotators: int | None = None,
    add: Sequence[str] = (),
) -> ConnectReport:
    """Connect a project, existing or new, and keep its address and token in the store.

    Args:
        settings: say where the front end is.
        url: Label Studio's address.
        token: its personal access token.
        project: an existing project, or
        create: the title of a new one.
        heatmap: show the heatmap beside the image.
        annotators: how many people review at once, each with a tab of their own; None leaves it as it is.
        add: controls to add to an existing label config that has none of the kind: "verdict", "mask", "score".

    Raises:
        ConfigError: the label config cannot carry predictions, or Label Studio cannot reach the front end.
        LabelStudioError: Label Studio refused something else, or does not answer.
    """
    store = Store(settings.data_dir)
    kept_configs: list[str] = []

    def keep_config(number: int, xml: str) -> None:
        path = store.project(number).keep_replaced_config(xml)
        kept_configs.append(f"the label config before is kept in {path}")

    with Client(Connection(url=url, token=token, project=project or 0)) as client:
        request = _request(settings, project=project, create=create, heatmap=heatmap, add=add)
        report = connect(client, settings, request, keep_config=keep_config)
        kept = store.project(report.project)
        kept.connect(Connection(url=url, token=token, project=report.project))
        kept.keep_title(report.title)
        kept.keep_label_config(client.project(report.project).label_config)
        if annotators is not None:
            policy.change(kept, {"annotators": annotators})
        tabs_changed = tabs.ensure(client, kept, report.controls, annotators=policy.read(kept).annotators)
    return replace(report, changes=(*report.changes, *kept_configs, *tabs_changed))


def plan(
    settings: Settings,
    url: str,
    token: str,
    *,
    project: int | None = None,
    create: str = "",
    heatmap: bool = True,
    add: Sequence[str] = (),
) -> Plan:
    """Say what `enrol` would do with the same arguments; changes nothing.

    Raises:
        ConfigError: the label config cannot carry predictions.
        LabelStudioError: Label Studio does not answer.
    """
    with Client(Connection(url=url, token=token, project=project or 0)) as client:
        request = _request(settings, project=project, create=create, heatmap=heatmap, add=add)
        found = foresee(client, settings, request)
    return replace(found, changes=(*found.changes, "create the Data Manager tabs for review that are missing"))


def front_password(settings: Settings) -> str:
    """Return the password of the front end: the configured one, or the one kept in the data directory."""
    return settings.password.get_secret_value() or Store(settings.data_dir).secret("password")


def page_address(settings: Settings, project: int) -> str:
    """Return where a browser finds what is known of a project."""
    return f"{public_url(settings)}/projects/{project}"


def page_hint(settings: Settings, project: int) -> str:
    """Return a line that says where a project's page is and what opens it, without telling the password."""
    kept = settings.data_dir / "secrets" / "password"
    password = "the one in ANOMALY_PASSWORD" if settings.password.get_secret_value() else f"see {kept}"
    return f"page: {page_address(settings, project)}   user {settings.user}, password {password}"


def heatmap_address(settings: Settings, project: int) -> str:
    """Return where a browser finds a project's heatmaps."""
    return f"{public_url(settings)}/heatmap/{project}/{Store(settings.data_dir).heatmap_token(project)}"


def _request(settings: Settings, *, project: int | None, create: str, heatmap: bool, add: Sequence[str]) -> Request:
    return Request(
        password=front_password(settings),
        heatmap_url=lambda number: heatmap_address(settings, number),
        project=project,
        create=create,
        add_heatmap=heatmap,
        add=add,
    )
