"""Reading what Label Studio sends to the front end; unusable bodies are refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anomaly_workers.errors import ConfigError
from anomaly_workers.types import JSON, Task


@dataclass(frozen=True, slots=True)
class Setup:
    """The body of /setup. Its access token is a legacy one that Label Studio itself refuses, so it is not read."""

    project: int
    label_config: str


@dataclass(frozen=True, slots=True)
class Predict:
    """The body of /predict.

    Attributes:
        project: project id.
        tasks: tasks with raw data, in the order that answers must have.
        label_config: the project's label config, "" if it was not sent.
        context: for an interactive request, the regions just drawn (`result`), else None.
    """

    project: int
    tasks: tuple[Task, ...]
    label_config: str
    context: JSON | None


@dataclass(frozen=True, slots=True)
class Event:
    """The body of /webhook.

    Attributes:
        action: e.g. "TASKS_CREATED".
        project: project id.
        tasks: tasks it is about, with raw data where Label Studio sends it (a deletion sends ids alone).
        annotations: annotation ids it is about; a deletion names no task.
        label_config: the project's label config, "" if it was not sent.
        model_version: the project's model version, "" if none.
        updated_at: newest `updated_at` of the annotations; with their ids it tells a repeated event, "" if none.
        cancelled: ids of annotations that are skips.
    """

    action: str
    project: int
    tasks: tuple[Task, ...] = ()
    annotations: tuple[int, ...] = ()
    label_config: str = ""
    model_version: str = ""
    updated_at: str = ""
    cancelled: tuple[int, ...] = ()


def setup(body: object) -> Setup:
    """Parse the body of /setup.

    Raises:
        ConfigError: no project in it.
    """
    fields = _object(body)
    return Setup(project_id(fields.get("project")), _text(fields.get("schema")))


def predict(body: object) -> Predict:
    """Parse the body of /predict.

    Raises:
        ConfigError: no project or no list of tasks in it.
    """
    fields = _object(body)
    tasks = fields.get("tasks")
    if not isinstance(tasks, list):
        raise ConfigError("The request has no list `tasks`. Is it sent by Label Studio?")
    params = fields.get("params")
    context = params.get("context") if isinstance(params, Mapping) else None
    return Predict(
        project=_project_of(fields.get("project"), tasks),
        tasks=tuple(_task(task) for task in tasks),
        label_config=_text(fields.get("label_config")),
        context=dict(context) if isinstance(context, Mapping) and context else None,
    )


def event(body: object) -> Event:
    """Parse the body of /webhook, of any action.

    Raises:
        ConfigError: no action or no project in it.
    """
    fields = _object(body)
    action = fields.get("action")
    if not isinstance(action, str) or not action:
        raise ConfigError("The event has no `action`. Is it sent by Label Studio?")
    project = fields.get("project")
    about = project if isinstance(project, Mapping) else {"id": project}
    tasks = [*_listed(fields.get("tasks")), *_listed(fields.get("task"))]
    annotations = [*_listed(fields.get("annotations")), *_listed(fields.get("annotation"))]
    return Event(
        action=action,
        project=project_id(about.get("id")),
        tasks=_tasks_of(tasks, annotations),
        annotations=tuple(_id(one.get("id"), "annotation") for one in annotations),
        label_config=_text(about.get("label_config")),
        model_version=_text(about.get("model_version")),
        updated_at=max((_text(one.get("updated_at")) for one in annotations), default=""),
        cancelled=tuple(_id(one.get("id"), "annotation") for one in annotations if one.get("was_cancelled") is True),
    )


def project_id(value: object) -> int:
    """Return the id of `5`, `"5"` or `"5.1795346383"` (the form of /setup and /predict).

    Raises:
        ConfigError: anything else.
    """
    return _id(value.split(".", 1)[0] if isinstance(value, str) else value, "project")


def _object(body: object) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise ConfigError("The request is not a JSON object. Is it sent by Label Studio?")
    return body


def _id(value: object, kind: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"The request has no usable {kind} id. Is it sent by Label Studio?")
    return value


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _listed(value: object) -> list[Mapping[str, Any]]:
    """One object or a list of them, as a list."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Mapping)]


def _task(value: object) -> Task:
    if not isinstance(value, Mapping):
        raise ConfigError("A task of the request is not a JSON object. Is it sent by Label Studio?")
    data = value.get("data")
    return Task(_id(value.get("id"), "task"), dict(data) if isinstance(data, Mapping) else {})


def _tasks_of(tasks: list[Mapping[str, Any]], annotations: list[Mapping[str, Any]]) -> tuple[Task, ...]:
    """The tasks sent, or those that the annotations name."""
    found = {task.id: task for task in map(_task, tasks)}
    for annotation in annotations:
        if annotation.get("task") is not None and not isinstance(annotation["task"], Mapping):
            task_id = _id(annotation["task"], "task")
            found.setdefault(task_id, Task(task_id, {}))
    return tuple(found.values())


def _project_of(value: object, tasks: list[Any]) -> int:
    """The request's project, else the one its first task names."""
    if value is None and tasks and isinstance(tasks[0], Mapping):
        value = tasks[0].get("project")
    return project_id(value)
