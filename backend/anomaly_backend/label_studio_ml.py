"""The same answers for people who serve all their models with label-studio-ml, its 1.0.9 and its 2.x alike.

One class, given to `label_studio_ml.api.init_app`; the queue, the workers and the store behind it are those of the
own front end, found through the same ANOMALY_* variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any

from flask import Response, after_this_request, has_request_context, json, request
from label_studio_ml.model import LabelStudioMLBase

from anomaly_backend.dispatch import NOT_READY, Dispatcher
from anomaly_workers import queues, server
from anomaly_workers.labelstudio import payloads
from anomaly_workers.settings import load_settings
from anomaly_workers.store import Store
from anomaly_workers.types import JSON


class AnomalyBackend(LabelStudioMLBase):  # type: ignore[misc]  # label-studio-ml is not typed
    """The model as label-studio-ml wants it: made anew again and again, so it keeps nothing itself."""

    TRAIN_EVENTS = (
        *("ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"),
        *("TASKS_CREATED", "TASKS_DELETED", "PROJECT_UPDATED", "START_TRAINING"),
    )
    """What 1.0.9 hands to `fit`: its own list lacks new tasks and Start Training. 2.x filters before it asks us."""

    def __init__(
        self,
        project_id: str | None = None,
        label_config: str | None = None,
        train_output: JSON | None = None,
        **fields: Any,
    ) -> None:
        if "project_id" in signature(LabelStudioMLBase.__init__).parameters:
            super().__init__(project_id=project_id, label_config=label_config)
        else:
            super().__init__(label_config=label_config, train_output=train_output, **fields)
            _correct_version()

    def setup(self) -> None:
        """Set the version that /setup names to the deployed one; 2.x calls this whenever it makes a model."""
        if self.project_id:
            self.set("model_version", _deployed({"project": self.project_id, "schema": self.label_config}))

    def predict(self, tasks: Sequence[JSON], context: JSON | None = None, **_params: Any) -> list[JSON | list[JSON]]:
        """Return one item a task, in order: its stored prediction, or `[]`, for which Label Studio stores nothing.

        1.0.9 keeps one model for all projects, so that only the tasks tell whose they are.
        """
        answers: list[JSON | list[JSON]] = [NOT_READY] * len(tasks)
        for project in {task.get("project") for task in tasks}:
            places = [place for place, task in enumerate(tasks) if task.get("project") == project]
            ours = [tasks[place] for place in places]
            body = {"project": project, "tasks": ours, "params": {"context": context}}
            for place, answer in zip(places, _dispatcher(os.getpid()).predict(payloads.predict(body)), strict=True):
                answers[place] = answer
        return answers

    def fit(self, *given: Any, event: str = "", data: Mapping[str, Any] | None = None, **_params: Any) -> JSON:
        """Take a webhook's hint and return at once: fitting is the workers' business.

        1.0.9 calls `fit((), event=…, data=…)`, 2.x `fit(event, data)`; both have taken the action out of the data.
        """
        if len(given) == 2:
            event, data = given
        return _dispatcher(os.getpid()).webhook(payloads.event({**(data or {}), "action": event}))


@cache
def _dispatcher(_process: int) -> Dispatcher:
    """Build a process's dispatcher at its first request; 1.0.9 forks for every event, and connections are not shared.

    Raises:
        ConfigError: an ANOMALY_* variable does not fit.
    """
    settings = load_settings()
    connection = queues.connect(server.ensure(settings))
    return Dispatcher(Store(settings.data_dir), queues.Queues(connection, settings), settings)


def _deployed(body: JSON) -> str:
    return str(_dispatcher(os.getpid()).setup(payloads.setup(body))["model_version"])


def _correct_version() -> None:
    """Have 1.0.9's /setup name the deployed version.

    It would say "INITIAL" or a job's number, and Label Studio would store a double at every view: it skips the tasks
    that have a prediction of the version named. A model is neither asked for it nor told its project, but it is made
    during the request.
    """
    if not has_request_context() or request.path != "/setup":
        return
    version = _deployed(request.get_json())

    @after_this_request
    def correct(response: Response) -> Response:
        if response.status_code == 200:
            response.set_data(json.dumps({"model_version": version}))
        return response
