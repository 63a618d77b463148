"""The addresses Label Studio asks."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response, abort, jsonify, request

from anomaly_backend import heatmap, metrics
from anomaly_backend.dispatch import Dispatcher
from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import payloads


def register(app: Flask, dispatcher: Dispatcher) -> None:
    """Add every address to `app`."""

    @app.get("/health", endpoint="health")
    def health() -> Response:
        # Touches nothing: Label Studio gives it one second and asks on every page.
        return jsonify({"status": "UP", "model_class": "label-studio-anomaly"})

    @app.post("/setup")
    def setup() -> Response:
        return jsonify(dispatcher.setup(payloads.setup(_body())))

    @app.post("/predict")
    def predict() -> Response:
        return jsonify({"results": dispatcher.predict(payloads.predict(_body()))})

    @app.post("/webhook")
    def webhook() -> tuple[Response, int]:
        return jsonify(dispatcher.webhook(payloads.event(_body()))), 201

    @app.get("/versions")
    def versions() -> Response:
        return jsonify({"versions": dispatcher.versions()})

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(
            metrics.render(dispatcher.queues, dispatcher.store), mimetype="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get("/heatmap/<int:project>/<token>", endpoint="heatmap")
    def picture(project: int, token: str) -> Response:
        if not dispatcher.store.owns_heatmap(project, token):
            abort(404)
        # Label Studio puts $image into the address as it is, without escaping: everything after src= belongs to it.
        _, _, source = request.query_string.decode(errors="replace").partition("src=")
        return heatmap.respond(dispatcher.store.project(project), source)


def _body() -> dict[str, Any]:
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise ConfigError("The body must be a JSON object, as Label Studio sends it.")
    return body
