"""Who may ask: basic authentication, the only kind Label Studio can send."""

from __future__ import annotations

from hmac import compare_digest

from flask import Flask, Response, request

OPEN = frozenset({"health", "heatmap", "static"})
"""Endpoints without a password: liveness says nothing, and a heatmap's path cannot be guessed."""


def protect(app: Flask, user: str, password: str) -> None:
    """Demand `user` and `password` on every endpoint that is not OPEN; unknown paths are refused alike."""

    @app.before_request
    def check() -> Response | None:
        if request.endpoint in OPEN or _is(user, password):
            return None
        refusal = Response("Wrong user or password: see ANOMALY_USER and ANOMALY_PASSWORD.\n", 401)
        refusal.headers["WWW-Authenticate"] = 'Basic realm="label-studio-anomaly"'
        return refusal


def _is(user: str, password: str) -> bool:
    given = request.authorization
    if given is None or given.type != "basic":
        return False
    # Both compared, so that the time taken tells nothing about the user's name.
    right_user = compare_digest((given.username or "").encode(), user.encode())
    return compare_digest((given.password or "").encode(), password.encode()) and right_user
