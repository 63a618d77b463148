"""Joining a Label Studio project to this backend, so that running it again changes nothing."""

from __future__ import annotations

import base64
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from anomaly_workers.client import Backend, Client, Project, Webhook
from anomaly_workers.errors import ConfigError, LabelStudioError
from anomaly_workers.labelstudio import config, template
from anomaly_workers.settings import Settings, backend_url
from anomaly_workers.types import Controls

TITLE = "label-studio-anomaly"
ACTIONS = (
    "TASKS_CREATED",
    "TASKS_DELETED",
    "ANNOTATION_CREATED",
    "ANNOTATIONS_CREATED",
    "ANNOTATION_UPDATED",
    "ANNOTATIONS_DELETED",
    "PROJECT_UPDATED",
)
FIELDS: Mapping[str, str | int | bool] = {
    "sampling": "Uncertainty sampling",
    "show_collab_predictions": True,
    "evaluate_predictions_automatically": False,
    "min_annotations_to_start_training": 0,
}
OPEN_UP = (
    "Start Label Studio with USE_DEFAULT_BANNED_SUBNETS=false and USER_ADDITIONAL_BANNED_SUBNETS=169.254.0.0/16 "
    "(list every network it must not reach), or on a closed network with ML_BLOCK_LOCAL_IP=false and "
    "SSRF_PROTECTION_ENABLED=false."
)


@dataclass(frozen=True, slots=True)
class Request:
    """Which project to connect, and how.

    Attributes:
        password: the front end's basic-authentication password.
        heatmap_url: project id to the address of its heatmap pictures, as a browser sees it.
        project: an existing project, or
        create: the title of a new one; one that has the title already is used.
        add_heatmap: add the heatmap panel to the label config of an existing project.
        add: controls to add to it where it has none of the kind: "verdict", "mask", "score".
    """

    password: str = field(repr=False)
    heatmap_url: Callable[[int], str]
    project: int | None = None
    create: str = ""
    add_heatmap: bool = False
    add: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ConnectReport:
    """What `connect` found and did.

    Attributes:
        project: project id.
        title: project title.
        address: the project's page in Label Studio.
        controls: what predictions will fill.
        backend: id of the registered ML backend.
        webhook: id of the webhook.
        changes: what was changed, one line each; empty when everything was right already.
    """

    project: int
    title: str
    address: str
    controls: Controls
    backend: int
    webhook: int
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What `connect` would do; nothing was changed to find out.

    Attributes:
        project: project id, None if it would be created.
        before: its label config now, empty if it would be created.
        after: the label config it would have.
        changes: what would change, one line each.
    """

    project: int | None
    before: str
    after: str
    changes: tuple[str, ...]

    @property
    def diff(self) -> list[str]:
        """The label config's unified diff, line by line; empty where nothing changes."""
        lines = (self.before.splitlines(), self.after.splitlines())
        return list(difflib.unified_diff(*lines, "label config now", "label config after", lineterm=""))

    @property
    def replaces_config(self) -> bool:
        """Whether somebody's label config would be changed."""
        return bool(self.before) and self.before != self.after


def foresee(client: Client, settings: Settings, request: Request) -> Plan:
    """Say what `connect` would do with the same request.

    Raises:
        ConfigError: the label config cannot carry predictions.
        LabelStudioError: Label Studio does not answer.
    """
    found = _existing(client, request)
    url = backend_url(settings)
    if found is None:
        made = ("create the project", f"register the ML backend at {url}", "create the webhook")
        return Plan(None, "", template.default_config(request.heatmap_url(0)), made)
    wanted = _wanted_config(found, request)
    changes = ["change the label config"] if wanted != found.label_config else []
    changes += [f"set {name} to {value}" for name, value in _different(found).items()]
    backends, webhooks = _own_backends(client, found.id, url), _own_webhooks(client, found.id, url)
    headers = {"Authorization": basic(settings.user, request.password)}
    if not backends:
        changes.append(f"register the ML backend at {url}")
    elif len(backends) > 1 or not _is_right(backends[0], url, settings.user):
        changes.append(f"update ML backend {backends[0].id}")
    if not webhooks:
        changes.append("create the webhook")
    elif len(webhooks) > 1 or not _is_subscribed(webhooks[0], headers):
        changes.append(f"set the headers and actions of webhook {webhooks[0].id}")
    if found.model_version == TITLE:
        changes.append("leave live mode")
    return Plan(found.id, found.label_config, wanted, tuple(changes))


def connect(
    client: Client,
    settings: Settings,
    request: Request,
    *,
    keep_config: Callable[[int, str], object] = lambda _project, _xml: None,
) -> ConnectReport:
    """Set a project up: label config, project settings, ML backend, webhook.

    Args:
        client: the Label Studio.
        settings: says where the front end is, as Label Studio sees it, and its user name.
        request: which project, and how.
        keep_config: called with a project and its label config before that is replaced.

    Raises:
        ConfigError: the label config cannot carry predictions, or Label Studio cannot use the backend; the message
            names the setting to change.
        LabelStudioError: Label Studio refused something else, or does not answer.
    """
    changes: list[str] = []
    found = _project(client, request, changes)
    wanted = _wanted_config(found, request)
    if wanted != found.label_config:
        keep_config(found.id, found.label_config)
        changes.append("changed the label config: " + ", ".join(_added(found.label_config, wanted)))
        found = client.update_project(found.id, label_config=wanted)
    controls = config.parse(found.label_config)
    _set_fields(client, found, changes)
    url = backend_url(settings)
    backend = _register(client, found, url, settings.user, request.password, changes)
    webhook = _subscribe(client, found.id, url, {"Authorization": basic(settings.user, request.password)}, changes)
    _leave_live_mode(client, found, changes)
    address = f"{client.connection.url}/projects/{found.id}/data"
    return ConnectReport(found.id, found.title, address, controls, backend.id, webhook.id, tuple(changes))


def disconnect(client: Client, settings: Settings, *, project: int) -> None:
    """Take the ML backend and its webhook out of a project; predictions and annotations stay."""
    url = backend_url(settings)
    _leave_live_mode(client, client.project(project), [])
    for backend in client.backends(project):
        if _same(backend.url, url) or backend.title == TITLE:
            client.delete_backend(backend.id)
    for webhook in client.webhooks(project):
        if _same(webhook.url, f"{url}/webhook"):
            client.delete_webhook(webhook.id)


def basic(user: str, password: str) -> str:
    """Return the value of a basic-authentication header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")


def _project(client: Client, request: Request, changes: list[str]) -> Project:
    same = _existing(client, request)
    if same is not None:
        return same
    new = client.create_project(request.create, template.default_config(""))
    changes.append(f"created project {new.id}")
    return client.update_project(new.id, label_config=template.default_config(request.heatmap_url(new.id)))


def _existing(client: Client, request: Request) -> Project | None:
    if (request.project is None) == (not request.create):
        raise ConfigError("Give either --project ID or --create TITLE.")
    if request.project is not None:
        return client.project(request.project)
    same = next((one for one in client.projects() if one.title == request.create), None)
    return None if same is None else client.project(same.id)


def _wanted_config(project: Project, request: Request) -> str:
    wanted = template.with_controls(project.label_config, request.add) if request.add else project.label_config
    config.parse(wanted)
    return template.with_heatmap(wanted, request.heatmap_url(project.id)) if request.add_heatmap else wanted


def _added(before: str, after: str) -> list[str]:
    """Names of the tags that a label config has gained; none if an address in it changed."""
    names = sorted(config.names_of(after) - config.names_of(before))
    return [f"added {name}" for name in names] or ["set the heatmap's address"]


def _different(project: Project) -> dict[str, str | int | bool]:
    return {name: value for name, value in FIELDS.items() if getattr(project, name) != value}


def _set_fields(client: Client, project: Project, changes: list[str]) -> None:
    different = _different(project)
    if different:
        client.update_project(project.id, **different)
        changes += [f"set {name} to {value}" for name, value in different.items()]


def _register(client: Client, project: Project, url: str, user: str, password: str, changes: list[str]) -> Backend:
    ours = _own_backends(client, project.id, url)
    for extra in ours[1:]:
        client.delete_backend(extra.id)
        changes.append(f"removed ML backend {extra.id}, which was registered twice")
    if ours and _is_right(ours[0], url, user):
        return ours[0]
    try:
        if ours:
            changes.append(f"updated ML backend {ours[0].id}")
            _forget_webhook(client, project.id, ours[0].url, url)
            return client.update_backend(ours[0].id, project.id, url, title=TITLE, user=user, password=password)
        backend = client.create_backend(project.id, url, title=TITLE, user=user, password=password)
    except LabelStudioError as error:
        raise _explained(client, project.id, url, error) from error
    changes.append(f"registered ML backend {backend.id} at {url}")
    for twin in _own_backends(client, project.id, url):  # Label Studio repeats a request that met a locked SQLite
        if twin.id != backend.id:
            client.delete_backend(twin.id)
    return backend


def _own_backends(client: Client, project: int, url: str) -> list[Backend]:
    ours = [one for one in client.backends(project) if _same(one.url, url) or one.title == TITLE]
    return sorted(ours, key=lambda one: (not _same(one.url, url), one.id))


def _own_webhooks(client: Client, project: int, url: str) -> list[Webhook]:
    ours = (one for one in client.webhooks(project) if _same(one.url, f"{url}/webhook"))
    return sorted(ours, key=lambda one: one.id)


def _is_right(backend: Backend, url: str, user: str) -> bool:
    """Whether Label Studio reaches the backend with a password it accepts; the password itself is never shown."""
    settings = (backend.title, backend.user, backend.auth_method, backend.is_interactive, backend.has_password)
    return settings == (TITLE, user, "BASIC_AUTH", True, True) and backend.state == "CO" and _same(backend.url, url)


def _explained(client: Client, project: int, url: str, error: LabelStudioError) -> Exception:
    """Say what to change after Label Studio refused the backend."""
    said = str(error)
    if error.status == 403 and "reserved network" in said:
        saved = [one for one in client.backends(project) if _same(one.url, url)]
        for row in saved:  # with ML_BLOCK_LOCAL_IP=false alone the backend is kept, but no events would ever come
            client.delete_backend(row.id)
        half = "ML_BLOCK_LOCAL_IP=false alone is not enough. " if saved else ""
        return ConfigError(f"Label Studio refuses the backend at {url}: a private address. {half}{OPEN_UP}")
    if "authentication" in said or "401 Client Error" in said:
        return ConfigError(
            f"The front end at {url} refuses the password. Give it and `connect` the same ANOMALY_USER and "
            "ANOMALY_PASSWORD (or ANOMALY_DATA_DIR)."
        )
    if error.status == 400 and "Can't connect" in said or "resolve hostname" in said:
        return ConfigError(
            f"Label Studio cannot reach {url}. Start the front end (`ls-anomaly up`), and set ANOMALY_BACKEND_URL to "
            "its address as Label Studio sees it (in a container that is not localhost)."
        )
    if error.status == 400 and "valid URL" in said:
        return ConfigError(
            f"Label Studio sends no events to {url}: its webhooks want localhost, an IP address or a name with a dot. "
            "Set ANOMALY_BACKEND_URL to such an address."
        )
    return error


def _subscribe(client: Client, project: int, url: str, headers: Mapping[str, str], changes: list[str]) -> Webhook:
    address = f"{url}/webhook"
    ours = _own_webhooks(client, project, url)
    for extra in ours[1:]:
        client.delete_webhook(extra.id)
        changes.append(f"removed webhook {extra.id}, which existed twice")
    if not ours:
        try:
            webhook = client.create_webhook(project, address, headers=headers, actions=ACTIONS)
        except LabelStudioError as error:
            raise _explained(client, project, url, error) from error
        changes.append(f"created webhook {webhook.id}")
        for twin in _own_webhooks(client, project, url):
            if twin.id != webhook.id:
                client.delete_webhook(twin.id)
        return webhook
    if _is_subscribed(ours[0], headers):
        return ours[0]
    changes.append(f"set the headers and actions of webhook {ours[0].id}")
    return client.update_webhook(ours[0].id, headers=headers, actions=ACTIONS)


def _is_subscribed(webhook: Webhook, headers: Mapping[str, str]) -> bool:
    switches = (webhook.is_active, webhook.send_payload, webhook.send_for_all_actions)
    actions = set(webhook.actions) == set(ACTIONS)
    return switches == (True, True, False) and actions and dict(webhook.headers) == dict(headers)


def _forget_webhook(client: Client, project: int, old: str, new: str) -> None:
    """Remove the webhook of an address the backend has left."""
    if _same(old, new):
        return
    for webhook in client.webhooks(project):
        if _same(webhook.url, f"{old.rstrip('/')}/webhook"):
            client.delete_webhook(webhook.id)


def _leave_live_mode(client: Client, before: Project, changes: list[str]) -> None:
    """Registration makes the ML backend's title the model version: then annotators depend on a live backend.

    The version that was set before is put back; the first push of predictions sets its literal name.
    """
    wanted = "" if before.model_version == TITLE else before.model_version
    if client.project(before.id).model_version != wanted:
        client.set_model_version(before.id, wanted)
        if before.model_version == TITLE:
            changes.append("left live mode: predictions are shown by their literal version")


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")
