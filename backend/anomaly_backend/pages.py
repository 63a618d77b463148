"""The pages for people: an index, one page a project, its tables, thumbnails and threshold."""

from __future__ import annotations

from urllib.parse import urlsplit

from flask import Blueprint, Flask, Response, abort, jsonify, request

from anomaly_backend.dispatch import Dispatcher
from anomaly_workers import tune
from anomaly_workers.errors import ConfigError
from anomaly_workers.pages import render, tables
from anomaly_workers.pages.collect import Collector, work
from anomaly_workers.pages.facts import Snapshot
from anomaly_workers.pages.thumbs import thumbnail
from anomaly_workers.settings import Settings, public_url

POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
KINDS = {"csv": "text/csv; charset=utf-8", "json": "application/json"}


def register(app: Flask, dispatcher: Dispatcher) -> None:
    """Add the pages to `app`."""
    pages = Blueprint("pages", __name__)
    collector = Collector(dispatcher.store, dispatcher.settings)
    _add_pages(pages, dispatcher, collector)
    _add_files(pages, dispatcher, collector)
    _add_threshold(pages, dispatcher)

    @pages.after_request
    def harden(answer: Response) -> Response:
        for name, value in HEADERS.items():
            answer.headers.setdefault(name, value)
        answer.headers.setdefault("Cache-Control", "no-store")
        return answer

    app.register_blueprint(pages)


def _add_pages(pages: Blueprint, dispatcher: Dispatcher, collector: Collector) -> None:
    @pages.get("/")
    def index() -> str:
        return render.index(collector.summaries(), work(dispatcher.queues, None))

    @pages.get("/projects/<int:project>")
    def page(project: int) -> str | tuple[str, int]:
        snapshot = collector.snapshot(project, dispatcher.queues)
        if snapshot is None:
            return render.missing(project), 404
        return render.project(snapshot, dispatcher.store.project(project).heatmap_of)


def _add_files(pages: Blueprint, dispatcher: Dispatcher, collector: Collector) -> None:
    def known(project: int) -> Snapshot:
        snapshot = collector.snapshot(project, dispatcher.queues)
        return abort(404) if snapshot is None else snapshot

    @pages.get("/projects/<int:project>/status.json")
    def status(project: int) -> Response:
        return jsonify(render.status(known(project)))

    @pages.get("/projects/<int:project>/<name>.<any(csv, json):kind>")
    def table(project: int, name: str, kind: str) -> Response:
        if name not in tables.TABLES:
            abort(404)
        snapshot = known(project)
        found = tables.table(snapshot, name)
        body = found.as_csv() if kind == "csv" else tables.dumps(found.as_json(snapshot))
        answer = Response(body, content_type=KINDS[kind])
        answer.headers["Content-Disposition"] = f'attachment; filename="project-{project}-{name}.{kind}"'
        return answer

    @pages.get("/projects/<int:project>/heatmaps/<key>.jpg")
    def heatmap(project: int, key: str) -> Response:
        path = dispatcher.store.project(project).heatmap_of(key) if key.isalnum() else None
        small = thumbnail(path) if path is not None else None
        if small is None:
            abort(404)
        answer = Response(small, mimetype="image/jpeg")
        answer.headers["Cache-Control"] = "private, max-age=300"
        return answer


def _add_threshold(pages: Blueprint, dispatcher: Dispatcher) -> None:
    @pages.post("/projects/<int:project>/threshold")
    def threshold(project: int) -> Response:
        _only_from_here(dispatcher.settings)
        store = dispatcher.store.project(project)
        if not store.is_connected:
            abort(404)
        wanted = tune.decide(store, dispatcher.settings, _rule(request.get_json(silent=True)))
        job = dispatcher.queues.enqueue_threshold(project)
        return jsonify({"job": job, "rule": wanted.rule, "value": wanted.value})


def _only_from_here(settings: Settings) -> None:
    """Refuse what another site could have a browser send with the password it remembers.

    A form cannot send JSON, and a script of another origin is stopped by the browser, as nothing here allows it.
    """
    if request.mimetype != "application/json":
        abort(415)
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    ours = {request.host, urlsplit(public_url(settings)).netloc}
    if site not in (None, "same-origin", "none") or (origin is not None and urlsplit(origin).netloc not in ours):
        abort(403)


def _rule(body: object) -> dict[str, str | float]:
    """Read {"rule": …, "value": …}.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(body, dict) or body.keys() - {"rule", "value"} or not isinstance(body.get("rule"), str):
        raise ConfigError('Send {"rule": "number", "value": 0.5}, with the rule fpr, f1 or number.')
    value = body.get("value", 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{value!r} is not a number.")
    return {"rule": body["rule"], "value": float(value)}
