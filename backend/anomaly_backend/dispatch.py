"""Answers from what is stored; what is missing is queued, never waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from anomaly_backend import interactive
from anomaly_workers.counters import count
from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import config
from anomaly_workers.labelstudio.payloads import Event, Predict, Setup
from anomaly_workers.queues import Queues
from anomaly_workers.settings import Settings
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import JSON, Connection, Task

logger = logging.getLogger(__name__)

PENDING = "anomaly-pending"
"""What /setup says before the first version. Never null: Label Studio would store a duplicate at every view."""

NOT_READY: list[JSON] = []
"""The right answer for a task that is not scored yet: Label Studio stores nothing and asks again."""


class Dispatcher:
    """The front end without HTTP.

    Attributes:
        store: versions and predictions.
        queues: where work is left for the workers.
        settings: the process's settings.
    """

    def __init__(self, store: Store, queues: Queues, settings: Settings) -> None:
        self.store = store
        self.queues = queues
        self.settings = settings

    def setup(self, request: Setup) -> JSON:
        """Say which version is deployed, exactly as stored predictions carry it (contract section 2)."""
        project = self._project(request.project)
        if project.is_connected:
            project.keep_label_config(request.label_config)
        return {"model_version": project.current or PENDING}

    def predict(self, request: Predict) -> list[JSON | list[JSON]]:
        """Return what Label Studio already took, `[]` for the rest, which is queued before all other work."""
        count(self.queues.connection, "predict_requests")
        project = self._project(request.project)
        if project.is_connected:
            project.keep_label_config(request.label_config)
        if request.context:
            answer = interactive.answer(project, request.tasks, request.context)
            return [answer or NOT_READY for _ in request.tasks]
        answers = [self._known(project, task) for task in request.tasks]
        missing = [task for task, known in zip(request.tasks, answers, strict=True) if known is None]
        self._queue(project, missing, urgent=True)
        return [NOT_READY if known is None else known for known in answers]

    def webhook(self, event: Event) -> JSON:
        """Take a hint; the sweep finds whatever a lost or refused hint would have said."""
        count(self.queues.connection, "webhooks")
        project = self._project(event.project)
        if not project.is_connected:
            logger.info("project %s is not connected, %s ignored", event.project, event.action)
            return {}
        project.keep_label_config(event.label_config)
        if event.action == "TASKS_CREATED":
            return {"jobs": self._queue(project, event.tasks)}
        if event.action.startswith("ANNOTATION"):
            return {"job": self.queues.enqueue_feedback(project.id)}
        if event.action == "START_TRAINING":
            return {"job": self.queues.enqueue_fit(project.id, "training")}
        if event.action == "TASKS_DELETED":
            gone = [task.id for task in event.tasks]
            project.forget_failures(gone)
            project.keep_deleted(gone)
        return {}

    def versions(self) -> list[str]:
        """Return the names of all versions of all projects; Label Studio does not say which project it means."""
        return [str(card["version"]) for project in self.store.projects() for card in project.versions()]

    def _project(self, project: int) -> ProjectStore:
        """Return the project; adopt it if the settings say how to reach its Label Studio."""
        found = self.store.project(project)
        token = self.settings.label_studio_token.get_secret_value()
        if not found.is_connected and self.settings.label_studio_url and token:
            found.connect(Connection(url=self.settings.label_studio_url.rstrip("/"), project=project, token=token))
        return found

    def _known(self, project: ProjectStore, task: Task) -> JSON | None:
        if not project.current or not project.is_pushed(project.current, task.id):
            return None
        record = project.record(project.current, task.id)
        return None if record is None else {name: record[name] for name in ("result", "score", "model_version")}

    def _queue(self, project: ProjectStore, tasks: Sequence[Task], *, urgent: bool = False) -> list[str]:
        if not tasks or not project.is_connected:
            return []
        if not project.target:
            return [self.queues.enqueue_fit(project.id, "first")]
        failing = project.failing()
        due = [task for task in tasks if task.id not in failing or self._is_due(project, task)]
        return self.queues.enqueue_score(project.id, project.target, due, urgent=urgent)

    def _is_due(self, project: ProjectStore, task: Task) -> bool:
        failure = project.failure(task.id)
        return failure is None or failure.is_due(_image_value(project, task), time.time())


def _image_value(project: ProjectStore, task: Task) -> str:
    try:
        return config.image_of(task.data, config.parse(project.label_config).value) or ""
    except ConfigError:
        return ""
