"""The front end as a WSGI application."""

from __future__ import annotations

import logging
import os

from flask import Flask, Response, jsonify
from werkzeug.exceptions import HTTPException

from anomaly_backend import auth, pages, routes
from anomaly_backend.dispatch import Dispatcher
from anomaly_workers import queues, server
from anomaly_workers.errors import AnomalyError, ConfigError, LabelStudioError
from anomaly_workers.pages import render
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.store import Store

logger = logging.getLogger(__name__)

MAX_BODY = 512 * 1024 * 1024
"""Label Studio embeds every prediction of every task: 50 MB were seen for 60 tasks."""


def create_app(settings: Settings, dispatcher: Dispatcher) -> Flask:
    """Build the application from its parts."""
    app = Flask("anomaly_backend", static_folder=render.STATIC)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    password = settings.password.get_secret_value() or dispatcher.store.secret("password")
    auth.protect(app, settings.user, password)
    routes.register(app, dispatcher)
    pages.register(app, dispatcher)
    app.register_error_handler(AnomalyError, _explain)
    app.register_error_handler(Exception, _apologise)
    return app


def from_environment() -> Flask:
    """Build the application from ANOMALY_* variables; what gunicorn calls."""
    settings = load_settings()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    connection = queues.connect(server.ensure(settings), tries=2)
    dispatcher = Dispatcher(Store(settings.data_dir), queues.Queues(connection, settings), settings)
    logger.info("front end ready, process %d", os.getpid())
    return create_app(settings, dispatcher)


def _explain(error: Exception) -> tuple[Response, int]:
    status = 400 if isinstance(error, ConfigError) else 502 if isinstance(error, LabelStudioError) else 500
    logger.warning("answered %d: %s", status, error)
    return jsonify({"error": str(error)}), status


def _apologise(error: Exception) -> tuple[Response, int] | HTTPException:
    if isinstance(error, HTTPException):
        return error
    logger.exception("a request failed")
    return jsonify({"error": "Internal error; the reason is in the front end's log."}), 500
