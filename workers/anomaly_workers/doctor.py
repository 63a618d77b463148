"""What stands between a user and a working set-up, each with the setting to change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from anomaly_workers.client import Client, Project
from anomaly_workers.connect import ACTIONS, OPEN_UP, TITLE, basic
from anomaly_workers.errors import AnomalyError
from anomaly_workers.labelstudio import config
from anomaly_workers.settings import Settings, backend_url
from anomaly_workers.tokens import kind_of

HEALTH_SECONDS = 3.0

Probe = Callable[[], str]
"""Looks at one thing and returns what it found; raises `AnomalyError` with the fix when it is wrong."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        ok: True, False, or None when it could not be looked at.
        detail: what was found.
        fix: the exact thing to change, "" when nothing.
    """

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def examine(
    settings: Settings,
    *,
    client: Client | None,
    project: int | None,
    password: str,
    probes: Sequence[tuple[str, Probe]] = (),
) -> list[Check]:
    """Run every check.

    Args:
        settings: the settings in force.
        client: the Label Studio, None if none is known.
        project: the project to look at, None for none.
        password: the front end's password.
        probes: further checks by name, e.g. Redis, device and weights.
    """
    checks = [_front_end(settings)]
    checks += _label_studio(client) if client else [_unknown()]
    if client and checks[-1].ok:
        checks += _of_project(client, settings, project, password)
    return checks + [_probed(name, probe) for name, probe in probes]


def _front_end(settings: Settings) -> Check:
    url = backend_url(settings)
    name = "front end"
    try:
        answer = httpx.get(f"{url}/health", timeout=HEALTH_SECONDS)
    except httpx.TransportError as error:
        return Check(
            name, False, f"{url}/health: {error}", "Start it with `ls-anomaly up`, or set ANOMALY_BACKEND_URL."
        )
    if not answer.is_success:
        return Check(
            name, False, f"{url}/health answers {answer.status_code}", "Set ANOMALY_BACKEND_URL or ANOMALY_PORT."
        )
    return Check(name, True, f"{url} answers")


def _unknown() -> Check:
    fix = "Run `ls-anomaly connect`, or set ANOMALY_LABEL_STUDIO_URL and ANOMALY_LABEL_STUDIO_TOKEN."
    return Check("Label Studio", None, "no address is known", fix)


def _label_studio(client: Client) -> list[Check]:
    url = client.connection.url
    kind = kind_of(client.connection.token)
    try:
        release = client.version()
    except AnomalyError as error:
        return [Check("Label Studio", False, str(error), "Start it, or correct ANOMALY_LABEL_STUDIO_URL.")]
    reached = Check("Label Studio", True, f"{release} at {url}")
    try:
        user = client.whoami()
    except AnomalyError as error:
        fix = "Make a personal access token under Account & Settings and set ANOMALY_LABEL_STUDIO_TOKEN to it."
        return [reached, Check("token", False, f"{kind} token: {error}", fix)]
    return [reached, Check("token", True, f"{kind} token of {user}")]


def _of_project(client: Client, settings: Settings, number: int | None, password: str) -> list[Check]:
    if number is None:
        return [Check("project", None, "none given", "Give --project ID.")]
    try:
        project = client.project(number)
        return [
            Check("project", True, f"{project.id} {project.title!r}, {project.tasks} tasks"),
            _label_config(project),
            *_backend(client, settings, number),
            _webhook(client, settings, number, password),
            _mode(client, project),
            _sampling(project),
        ]
    except AnomalyError as error:
        return [Check("project", False, str(error), "Give the id of a project that the token's user may change.")]


def _label_config(project: Project) -> Check:
    try:
        controls = config.parse(project.label_config)
    except AnomalyError as error:
        return Check("label config", False, str(error), "Change it under Settings, Labeling Interface.")
    found = [control for control in (controls.choices, controls.mask, controls.number) if control]
    parts = ", ".join(f"{control.tag} {control.name}" for control in found)
    return Check("label config", True, f"image {controls.image}; predictions fill {parts}")


def _backend(client: Client, settings: Settings, project: int) -> list[Check]:
    url = backend_url(settings)
    again = f"Run `ls-anomaly connect --project {project}`."
    ours = [one for one in client.backends(project) if one.url.rstrip("/") == url or one.title == TITLE]
    if not ours:
        return [
            Check("ML backend", False, f"{url} is not registered", again),
            Check("SSRF protection", None, "shows at registration", OPEN_UP),
        ]
    one = ours[0]
    reachable = Check("SSRF protection", True, "Label Studio took the backend's address")
    if len(ours) > 1 or one.url.rstrip("/") != url:
        return [Check("ML backend", False, ", ".join(f"{each.title} at {each.url}" for each in ours), again), reachable]
    if one.state != "CO":
        detail = f"state {one.state}: {one.error[:200] or 'no reason given'}"
        fix = f"Start the front end with the ANOMALY_PASSWORD that was connected. {again}"
        return [Check("ML backend", False, detail, fix), reachable]
    if one.auth_method != "BASIC_AUTH" or one.user != settings.user:
        return [Check("ML backend", False, "registered without the basic authentication", again), reachable]
    return [Check("ML backend", True, f"connected at {url}, version {one.model_version or 'none yet'}"), reachable]


def _webhook(client: Client, settings: Settings, project: int, password: str) -> Check:
    address = f"{backend_url(settings)}/webhook"
    again = f"Run `ls-anomaly connect --project {project}`."
    ours = [one for one in client.webhooks(project) if one.url.rstrip("/") == address]
    if not ours:
        return Check("webhook", False, f"no webhook to {address}", f"{again} If it is refused: {OPEN_UP}")
    one = ours[0]
    if one.headers.get("Authorization") != basic(settings.user, password):
        return Check("webhook", False, "its Authorization header is not ours, so events get lost", again)
    missing = [] if one.send_for_all_actions else sorted(set(ACTIONS) - set(one.actions))
    if missing or not one.is_active or not one.send_payload:
        return Check("webhook", False, f"it does not send {', '.join(missing) or 'payloads'}", again)
    if len(ours) > 1:
        return Check("webhook", False, f"there are {len(ours)}: every event comes more than once", again)
    return Check("webhook", True, f"{len(one.actions)} actions to {address}")


def _mode(client: Client, project: Project) -> Check:
    titles = {backend.title for backend in client.backends(project.id)}
    if project.model_version in titles:
        detail = f"live ({project.model_version}): annotators see nothing when the backend is down"
        return Check("model version", False, detail, f"Run `ls-anomaly connect --project {project.id}`.")
    if not project.model_version:
        return Check("model version", None, "none shown yet", f"Run `ls-anomaly score --project {project.id}`.")
    return Check("model version", True, f"static, {project.model_version}")


def _sampling(project: Project) -> Check:
    if project.sampling == "Uncertainty sampling" and project.show_collab_predictions:
        return Check("review order", True, project.sampling)
    return Check(
        "review order",
        False,
        f"{project.sampling}, predictions {'shown' if project.show_collab_predictions else 'hidden'}",
        f"Run `ls-anomaly connect --project {project.id}`.",
    )


def _probed(name: str, probe: Probe) -> Check:
    try:
        return Check(name, True, probe())
    except AnomalyError as error:
        return Check(name, False, str(error), str(error))
