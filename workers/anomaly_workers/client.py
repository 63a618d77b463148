"""Label Studio over HTTP: only calls that never make it ask the ML backend in return, except where said."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, cast

import httpx

from anomaly_workers.errors import LabelStudioError, Unauthorized
from anomaly_workers.tokens import TokenAuth
from anomaly_workers.types import JSON, Connection, Task

logger = logging.getLogger(__name__)

PAGE = 500  # tasks a page
IMPORT_ROWS = 1000  # predictions or tasks an import
IMPORT_BYTES = 32_000_000
UPLOAD_FILES = 50  # Label Studio takes at most 100 a request
ATTEMPTS = 6
IMPORT_ATTEMPTS = 3
PAUSE_SECONDS = 0.25  # doubles with every attempt
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
ANNOTATED_FIELDS = (  # of the task, then of its annotations
    "id,data,annotations,"
    "result,was_cancelled,completed_by,created_at,updated_at,ground_truth,lead_time,parent_prediction"
)
DROPPED = "Label Studio dropped it: its names or labels are not in the label config, or its score is not in [0, 1]."

Query = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Project:
    """What the product needs to know of a project."""

    id: int
    title: str
    label_config: str
    model_version: str
    sampling: str
    show_collab_predictions: bool
    evaluate_predictions_automatically: bool
    min_annotations_to_start_training: int
    tasks: int
    annotations: int
    predictions: int


@dataclass(frozen=True, slots=True)
class Annotated:
    """A task with its annotations; who lists them says whether skips are among them."""

    task: Task
    annotations: tuple[JSON, ...]


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which task an annotation belongs to, and the ISO time of its last change."""

    task: int
    updated_at: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A prediction that Label Studio did not take."""

    task_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook of a project; `headers` may hold a secret."""

    id: int
    url: str
    is_active: bool
    send_payload: bool
    send_for_all_actions: bool
    actions: tuple[str, ...]
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Backend:
    """An ML backend of a project. State: CO connected, DI disconnected, ER error, TR training, PR predicting."""

    id: int
    url: str
    title: str
    state: str
    error: str
    is_interactive: bool
    auth_method: str
    user: str
    model_version: str
    has_password: bool


class Client:
    """One Label Studio. Safe to share between threads; `close` it, or use it as a context manager."""

    def __init__(
        self,
        connection: Connection,
        *,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.connection = connection
        self._sleep = sleep
        self._http = httpx.Client(
            base_url=connection.url,
            auth=TokenAuth(connection.url, connection.token),
            timeout=httpx.Timeout(timeout, connect=5.0),
            transport=transport,
            follow_redirects=False,
            headers={"User-Agent": "label-studio-anomaly"},
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # --- who and what ---------------------------------------------------------------------------------------------

    def version(self) -> str:
        """Return Label Studio's release, e.g. "1.23.2"."""
        return str(self._get("/api/version").get("release", ""))

    def whoami(self) -> str:
        """Return the e-mail address of the token's user."""
        return str(self._get("/api/current-user/whoami").get("email", ""))

    def project(self, project: int) -> Project:
        """Return one project."""
        return _project(self._get(f"/api/projects/{project}/"))

    def projects(self) -> list[Project]:
        """Return every project the user sees; task counts may be missing."""
        found: list[Project] = []
        page = 1
        while True:
            answer = self._get("/api/projects/", {"page": page, "page_size": 100})
            found += [_project(item) for item in answer["results"]]
            if not answer.get("next"):
                return found
            page += 1

    def create_project(self, title: str, label_config: str, **fields: str | int | bool) -> Project:
        """Create a project."""
        return _project(
            self._send("POST", "/api/projects/", body={"title": title, "label_config": label_config} | fields)
        )

    def update_project(self, project: int, **fields: str | int | bool) -> Project:
        """Change fields of a project."""
        return _project(self._send("PATCH", f"/api/projects/{project}/", body=fields))

    def delete_project(self, project: int) -> None:
        """Delete a project with everything in it."""
        self._send("DELETE", f"/api/projects/{project}/")

    def set_label_config(self, project: int, xml: str) -> None:
        """Replace the label config."""
        self.update_project(project, label_config=xml)

    # --- tasks ----------------------------------------------------------------------------------------------------

    def open_tasks(self, project: int, *, without_version: str | None = None) -> Iterator[Task]:
        """Yield tasks that are not labelled yet, with raw data, by id; optionally only those lacking a version."""
        filters = [_filter("is_labeled", "equal", "Boolean", False)]
        if without_version is None:
            return self._tasks(project, filters)
        if self._is_part_of_another(project, without_version):  # the filter compares parts of the name
            pages = self._pages(project, filters, fields="id,data,predictions_model_versions", everything=True)
            return (_task(item) for item in pages if without_version not in _versions(item))
        filters.append(_filter("predictions_model_versions", "not_contains", "List", [without_version]))
        return self._tasks(project, filters)

    def all_tasks(self, project: int) -> Iterator[Task]:
        """Yield every task with raw data, by id."""
        return self._tasks(project, [])

    def tasks(self, project: int, tasks: Sequence[int]) -> list[Task]:
        """Return those of `tasks` that exist, with raw data, by id."""
        pages = (self._pages(project, [], fields="id,data", only=chunk) for chunk in _chunks(tasks) if chunk)
        return [_task(item) for page in pages for item in page]

    def annotated_tasks(self, project: int, *, since: str = "") -> Iterator[Annotated]:
        """Yield tasks with their submitted annotations, skips left out, by task id.

        Args:
            project: project id.
            since: an ISO time: only tasks whose annotations changed after it.
        """
        filters = [_filter("total_annotations", "greater", "Number", 0)]
        if since:
            filters.append(_filter("updated_at", "greater", "Datetime", since))
        for item in self._pages(project, filters, fields=ANNOTATED_FIELDS, everything=True):
            kept = tuple(one for one in item.get("annotations", ()) if not one.get("was_cancelled"))
            yield Annotated(_task(item), kept)

    def annotations(self, project: int, tasks: Sequence[int]) -> Iterator[Annotated]:
        """Yield those of `tasks` that exist with all their annotations, skips included."""
        for chunk in _chunks(tasks) if tasks else ():
            for item in self._pages(project, [], fields=ANNOTATED_FIELDS, everything=True, only=chunk, size=100):
                yield Annotated(_task(item), tuple(item.get("annotations", ())))

    def annotation_stamps(self, project: int, *, since: str = "") -> dict[int, Stamp]:
        """Return the stamp of every annotation by its id, skips included; masks stay in Label Studio.

        Args:
            project: project id.
            since: an ISO time: only annotations of tasks that changed after it.
        """
        changed = [_filter("updated_at", "greater", "Datetime", since)] if since else []
        found: dict[int, Stamp] = {}
        for counter in ("cancelled_annotations", "total_annotations"):
            filters = [_filter(counter, "greater", "Number", 0), *changed]
            for item in self._pages(project, filters, fields="id,annotations,updated_at", everything=True):
                for one in item.get("annotations", ()):
                    found[int(one["id"])] = Stamp(int(item["id"]), str(one["updated_at"]))
        return found

    def annotation_count(self, project: int) -> int:
        """Return how many annotations a project has, skips included."""
        answer = self._get(f"/api/projects/{project}/")
        return int(answer["total_annotations_number"]) + int(answer["skipped_annotations_number"])

    def import_tasks(self, project: int, tasks: Sequence[JSON]) -> list[int]:
        """Create tasks from `{"data": …, "annotations": […]}` and return their ids in order."""
        created: list[int] = []
        for batch in _batches(tasks):
            path = f"/api/projects/{project}/import?return_task_ids=true"
            created += self._send("POST", path, body=batch)["task_ids"]
        return created

    def upload(self, project: int, files: Sequence[tuple[str, bytes]]) -> list[str]:
        """Upload files without making tasks of them and return their `/data/upload/…` addresses in order."""
        addresses: list[str] = []
        for start in range(0, len(files), UPLOAD_FILES):
            part = [(f"file{place}", file) for place, file in enumerate(files[start : start + UPLOAD_FILES])]
            answer = self._send("POST", f"/api/projects/{project}/import?commit_to_project=false", files=part)
            ids = answer["file_upload_ids"]
            stored = self._get(f"/api/projects/{project}/file-uploads", {"ids": json.dumps(ids)})
            names = {item["id"]: f"/data/{item['file']}" for item in cast("list[JSON]", stored)}
            addresses += [names[one] for one in ids]
        return addresses

    def annotate(self, task_id: int, result: Sequence[JSON], **fields: str | int | bool) -> int:
        """Submit an annotation and return its id."""
        answer = self._send("POST", f"/api/tasks/{task_id}/annotations/", body={"result": list(result)} | fields)
        return int(answer["id"])

    def update_annotation(self, annotation: int, **fields: Any) -> None:
        """Change fields of an annotation."""
        self._send("PATCH", f"/api/annotations/{annotation}/", body=fields)

    def delete_task(self, task_id: int) -> None:
        """Delete a task."""
        self._send("DELETE", f"/api/tasks/{task_id}/")

    def download(self, path: str) -> bytes:
        """Return the bytes behind a path of Label Studio, e.g. `/data/upload/…`."""
        return self._ask("GET", path).content

    # --- predictions ----------------------------------------------------------------------------------------------

    def versions(self, project: int) -> dict[str, int]:
        """Return how many predictions each model version has."""
        return {str(name): int(count) for name, count in self._get(f"/api/projects/{project}/model-versions/").items()}

    def prediction_counts(self, project: int, version: str, *, tasks: Sequence[int] = ()) -> dict[int, int]:
        """Return for each task (or each of `tasks`) that has predictions of a version how many; no masks are loaded."""
        counts: dict[int, int] = {}
        unclear: list[int] = []
        filters = [_filter("predictions_model_versions", "contains", "List", [version])]
        fields = "id,total_predictions,predictions_model_versions"
        for chunk in _chunks(tasks):
            for item in self._pages(project, filters, fields=fields, everything=True, only=chunk):
                names = _versions(item)
                if version in names:
                    counts[item["id"]] = 1
                    if item["total_predictions"] > len(names):
                        unclear.append(item["id"])
        exact = self.prediction_ids(project, version, tasks=unclear) if unclear else {}
        return counts | {task: len(ids) for task, ids in exact.items()}

    def prediction_ids(self, project: int, version: str, *, tasks: Sequence[int] = ()) -> dict[int, list[int]]:
        """Return the prediction ids of a version for each task (or each of `tasks`) that has any; loads their masks."""
        found: dict[int, list[int]] = {}
        filters = [_filter("predictions_model_versions", "contains", "List", [version])]
        for chunk in _chunks(tasks):
            for item in self._pages(project, filters, fields="id,predictions", everything=True, only=chunk, size=100):
                ids = sorted(one["id"] for one in item.get("predictions", ()) if one.get("model_version") == version)
                if ids:
                    found[item["id"]] = ids
        return found

    def predictions(self, project: int, *, tasks: Sequence[int] = ()) -> dict[int, list[JSON]]:
        """Return the whole predictions of each task (or each of `tasks`)."""
        found: dict[int, list[JSON]] = {}
        for chunk in _chunks(tasks):
            for item in self._pages(project, [], fields="id,predictions", everything=True, only=chunk, size=100):
                found[item["id"]] = list(item.get("predictions", ()))
        return found

    def import_predictions(self, project: int, predictions: Sequence[JSON]) -> list[Rejected]:
        """Store predictions in bulk, each once even over a broken connection; return those that were not taken."""
        rejected: list[Rejected] = []
        for batch in _batches(predictions):
            rejected += self._import(project, batch)
        return rejected

    def delete_prediction(self, prediction: int) -> None:
        """Delete one prediction; one that is gone already is fine."""
        self._delete(f"/api/predictions/{prediction}/")

    def update_prediction(self, prediction: int, **fields: float | int) -> bool:
        """Change fields of a prediction, which its result survives; False if it is gone."""
        try:
            self._send("PATCH", f"/api/predictions/{prediction}/", body=fields)
        except LabelStudioError as error:
            if error.status != 404:
                raise
            return False
        return True

    def delete_version(self, project: int, version: str) -> int:
        """Delete every prediction of a version and return how many there were.

        In live mode Label Studio empties the project's model version whatever version goes: it is then put back.
        """
        before = self.project(project).model_version
        path = f"/api/projects/{project}/model-versions/"
        deleted = int(self._send("DELETE", path, body={"model_version": version})["deleted_predictions"])
        if before and before != version and self.project(project).model_version != before:
            self.set_model_version(project, before)
        return deleted

    def set_model_version(self, project: int, version: str) -> None:
        """Show the predictions of a version to annotators; it must have some. "" shows none."""
        self.update_project(project, model_version=version)

    # --- tabs of the Data Manager ---------------------------------------------------------------------------------

    def tabs(self, project: int) -> dict[int, JSON]:
        """Return what each tab of the project shows, by tab id."""
        stored = cast("list[JSON]", self._get("/api/dm/views/", {"project": project}))
        return {int(item["id"]): dict(item.get("data") or {}) for item in stored}

    def create_tab(self, project: int, data: JSON) -> int:
        """Create a tab and return its id."""
        return int(self._send("POST", "/api/dm/views/", body={"project": project, "data": data})["id"])

    def update_tab(self, tab: int, project: int, data: JSON) -> None:
        """Change what a tab shows."""
        self._send("PATCH", f"/api/dm/views/{tab}/", body={"project": project, "data": data})

    def delete_tab(self, tab: int) -> None:
        """Delete a tab; one that is gone already is fine."""
        self._delete(f"/api/dm/views/{tab}/")

    # --- webhooks and ML backends ---------------------------------------------------------------------------------

    def webhooks(self, project: int) -> list[Webhook]:
        """Return the project's webhooks."""
        return [_webhook(item) for item in cast("list[JSON]", self._get("/api/webhooks/", {"project": project}))]

    def create_webhook(self, project: int, url: str, *, headers: Mapping[str, str], actions: Sequence[str]) -> Webhook:
        """Create a webhook for some actions."""
        body = {"project": project, "url": url} | _webhook_fields(headers, actions)
        return _webhook(self._send("POST", "/api/webhooks/", body=body))

    def update_webhook(self, webhook: int, *, headers: Mapping[str, str], actions: Sequence[str]) -> Webhook:
        """Set a webhook's headers and actions."""
        return _webhook(self._send("PATCH", f"/api/webhooks/{webhook}/", body=_webhook_fields(headers, actions)))

    def delete_webhook(self, webhook: int) -> None:
        """Delete a webhook; one that is gone already is fine."""
        self._delete(f"/api/webhooks/{webhook}/")

    def backends(self, project: int) -> list[Backend]:
        """Return the project's ML backends; Label Studio asks each for its health and set-up."""
        return [_backend(item) for item in cast("list[JSON]", self._get("/api/ml/", {"project": project}))]

    def create_backend(self, project: int, url: str, *, title: str, user: str, password: str) -> Backend:
        """Register an ML backend; Label Studio asks it for its health and set-up first."""
        body = _backend_fields(project, url, title, user, password)
        return _backend(self._send("POST", "/api/ml/", body=body, attempts=1))

    def update_backend(self, backend: int, project: int, url: str, *, title: str, user: str, password: str) -> Backend:
        """Change a registered ML backend; Label Studio wants all of it again."""
        body = _backend_fields(project, url, title, user, password)
        return _backend(self._send("PATCH", f"/api/ml/{backend}", body=body, attempts=1))

    def delete_backend(self, backend: int) -> None:
        """Unregister an ML backend; one that is gone already is fine. Its webhook stays."""
        self._delete(f"/api/ml/{backend}")

    # --- how ------------------------------------------------------------------------------------------------------

    def _tasks(self, project: int, filters: list[JSON]) -> Iterator[Task]:
        return (_task(item) for item in self._pages(project, filters, fields="id,data"))

    def _pages(
        self,
        project: int,
        filters: list[JSON],
        *,
        fields: str,
        everything: bool = False,
        only: Sequence[int] = (),
        size: int = PAGE,
    ) -> Iterator[JSON]:
        """Yield tasks by id; asks for "ids above the last one", so that tasks may change meanwhile."""
        last = 0
        query: dict[str, str | int] = {"project": project, "page_size": size, "include": fields, "resolve_uri": "false"}
        if everything:
            query["fields"] = "all"
        while True:
            query["query"] = _query([*filters, _filter("id", "greater", "Number", last)], only)
            items = self._get("/api/tasks/", query).get("tasks", [])
            yield from items
            if len(items) < size:
                return
            last = items[-1]["id"]

    def _is_part_of_another(self, project: int, version: str) -> bool:
        return any(version in other for other in self.versions(project) if other != version)

    def _import(self, project: int, batch: Sequence[JSON]) -> list[Rejected]:
        path = f"/api/projects/{project}/import/predictions"
        for attempt in range(IMPORT_ATTEMPTS):
            try:
                created = self._send("POST", path, body=batch, attempts=1).get("created", 0)
            except LabelStudioError as error:
                if error.status == 400:
                    return self._import_halves(project, batch, str(error))
                if not _is_transient(error.status) or attempt == IMPORT_ATTEMPTS - 1:
                    raise
                self._wait(attempt, str(error))
                batch = self._missing(project, batch)
                if not batch:
                    return []
                continue
            if created == len(batch):
                return []
            return [Rejected(item["task"], DROPPED) for item in self._missing(project, batch)]
        return []

    def _import_halves(self, project: int, batch: Sequence[JSON], reason: str) -> list[Rejected]:
        """Find what makes Label Studio refuse a batch, of which it then stored nothing."""
        if len(batch) == 1:
            return [Rejected(int(batch[0].get("task") or 0), reason)]
        half = len(batch) // 2
        return self._import(project, batch[:half]) + self._import(project, batch[half:])

    def _missing(self, project: int, batch: Sequence[JSON]) -> list[JSON]:
        """The predictions of a batch that are not in Label Studio."""
        stored: set[tuple[int, str]] = set()
        for version in {str(item["model_version"]) for item in batch}:
            tasks = [int(item["task"]) for item in batch]
            stored |= {(task, version) for task in self.prediction_counts(project, version, tasks=tasks)}
        return [item for item in batch if (item["task"], item["model_version"]) not in stored]

    def _delete(self, path: str) -> None:
        try:
            self._send("DELETE", path)
        except LabelStudioError as error:
            if error.status != 404:
                raise

    def _get(self, path: str, query: Query | None = None) -> JSON:
        return cast("JSON", _json(self._ask("GET", path, query=query)))

    def _send(
        self, method: str, path: str, *, body: Any = None, files: Any = None, attempts: int | None = None
    ) -> JSON:
        if attempts is None:
            attempts = 1 if method == "POST" else ATTEMPTS  # a POST that may have been done is not repeated
        return cast("JSON", _json(self._ask(method, path, body=body, files=files, attempts=attempts)))

    def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Any = None,
        files: Any = None,
        attempts: int = ATTEMPTS,
    ) -> httpx.Response:
        attempt = 0
        while True:
            try:
                response = self._http.request(method, path, params=query, json=body, files=files)
            except httpx.ConnectError as error:
                failure, last = _unreachable(self.connection.url, error), attempt >= ATTEMPTS - 1  # nothing was sent
            except httpx.TransportError as error:
                failure, last = _unreachable(self.connection.url, error), attempt >= attempts - 1
            else:
                if response.is_success:
                    return response
                failure = _failure(method, path, response)
                last = attempt >= attempts - 1 or not _is_transient(failure.status, response)
            if last:
                raise failure
            self._wait(attempt, str(failure))
            attempt += 1

    def _wait(self, attempt: int, reason: str) -> None:
        seconds = PAUSE_SECONDS * 2**attempt
        logger.warning("%s Trying again in %.2f s.", reason, seconds)
        self._sleep(seconds)


def _unreachable(url: str, error: httpx.TransportError) -> LabelStudioError:
    failure = LabelStudioError(
        f"Label Studio at {url} does not answer ({type(error).__name__}). Start it, or correct the address."
    )
    failure.__cause__ = error
    return failure


def _failure(method: str, path: str, response: httpx.Response) -> LabelStudioError:
    status, said = response.status_code, _said(response)
    if status == 401:
        return Unauthorized(
            f"Label Studio did not accept the token ({said}). "
            "Use a personal access token from Account & Settings; legacy tokens are off by default.",
            status=status,
        )
    place = path.split("?", 1)[0]
    return LabelStudioError(
        f"Label Studio answered {status} to {method} {place}: {said}{_advice(status)}", status=status
    )


def _advice(status: int) -> str:
    if status == 403:
        return " Give the token's user access to the project."
    if status == 404:
        return " Check the project id and the address."
    if 300 <= status < 400:
        return " Use the address that Label Studio redirects to."
    return ""


def _said(response: httpx.Response) -> str:
    """One line of what an error answer says."""
    try:
        body = response.json()
    except ValueError:
        return response.reason_phrase or "no reason given"
    errors = body.get("validation_errors") if isinstance(body, Mapping) else None
    if isinstance(errors, Mapping) and errors:
        parts = [f"{name}: {value}" for name, values in errors.items() for value in _as_list(values)]
        return " ".join("; ".join(part.removeprefix("non_field_errors: ") for part in parts).split())[:600]
    detail = body.get("detail") if isinstance(body, Mapping) else body
    return " ".join(str(detail or response.reason_phrase).split())[:600]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_transient(status: int | None, response: httpx.Response | None = None) -> bool:
    """Whether trying again can help; a 500 with a reason of its own cannot be helped, a locked SQLite can."""
    if status == 500 and response is not None and "json" in response.headers.get("content-type", ""):
        return "locked" in response.text.lower()
    return status is None or status in TRANSIENT


def _json(response: httpx.Response) -> Any:
    if not response.content:
        return {}
    try:
        return response.json()
    except ValueError as error:
        raise LabelStudioError(
            f"{response.request.url} did not answer like Label Studio. Correct the address.",
            status=response.status_code,
        ) from error


def _filter(name: str, operator: str, kind: Literal["Boolean", "Datetime", "List", "Number"], value: Any) -> JSON:
    return {"filter": f"filter:tasks:{name}", "operator": operator, "type": kind, "value": value}


def _query(filters: list[JSON], only: Sequence[int]) -> str:
    query: JSON = {"filters": {"conjunction": "and", "items": filters}, "ordering": ["tasks:id"]}
    if only:
        query["selectedItems"] = {"all": False, "included": list(only)}
    return json.dumps(query)


def _chunks(tasks: Sequence[int], size: int = 200) -> Iterable[Sequence[int]]:
    """Parts of a list of task ids that fit an address; one empty part, all tasks, for an empty list."""
    return [tasks[start : start + size] for start in range(0, len(tasks), size)] or [()]


def _batches(items: Sequence[JSON]) -> Iterator[list[JSON]]:
    """Parts small enough for one request."""
    batch: list[JSON] = []
    weight = 0
    for item in items:
        size = len(json.dumps(item))
        if batch and (len(batch) == IMPORT_ROWS or weight + size > IMPORT_BYTES):
            yield batch
            batch, weight = [], 0
        batch.append(item)
        weight += size
    if batch:
        yield batch


def _task(item: JSON) -> Task:
    return Task(int(item["id"]), item.get("data") or {})


def _versions(item: JSON) -> set[str]:
    return {name.strip() for name in str(item.get("predictions_model_versions") or "").split(",") if name.strip()}


def _project(item: JSON) -> Project:
    return Project(
        id=int(item["id"]),
        title=str(item.get("title") or ""),
        label_config=str(item.get("label_config") or ""),
        model_version=str(item.get("model_version") or ""),
        sampling=str(item.get("sampling") or ""),
        show_collab_predictions=bool(item.get("show_collab_predictions")),
        evaluate_predictions_automatically=bool(item.get("evaluate_predictions_automatically")),
        min_annotations_to_start_training=int(item.get("min_annotations_to_start_training") or 0),
        tasks=int(item.get("task_number") or 0),
        annotations=int(item.get("total_annotations_number") or 0),
        predictions=int(item.get("total_predictions_number") or 0),
    )


def _webhook(item: JSON) -> Webhook:
    return Webhook(
        id=int(item["id"]),
        url=str(item["url"]),
        is_active=bool(item.get("is_active")),
        send_payload=bool(item.get("send_payload")),
        send_for_all_actions=bool(item.get("send_for_all_actions")),
        actions=tuple(item.get("actions") or ()),
        headers=dict(item.get("headers") or {}),
    )


def _webhook_fields(headers: Mapping[str, str], actions: Sequence[str]) -> JSON:
    return {
        "headers": dict(headers),
        "actions": list(actions),
        "send_for_all_actions": False,
        "send_payload": True,
        "is_active": True,
    }


def _backend(item: JSON) -> Backend:
    return Backend(
        id=int(item["id"]),
        url=str(item.get("url") or ""),
        title=str(item.get("title") or ""),
        state=str(item.get("state") or ""),
        error=str(item.get("error_message") or ""),
        is_interactive=bool(item.get("is_interactive")),
        auth_method=str(item.get("auth_method") or ""),
        user=str(item.get("basic_auth_user") or ""),
        model_version=str(item.get("model_version") or ""),
        has_password=bool(item.get("basic_auth_pass_is_set")),
    )


def _backend_fields(project: int, url: str, title: str, user: str, password: str) -> JSON:
    return {
        "project": project,
        "url": url,
        "title": title,
        "is_interactive": True,
        "auth_method": "BASIC_AUTH",
        "basic_auth_user": user,
        "basic_auth_pass": password,
    }
