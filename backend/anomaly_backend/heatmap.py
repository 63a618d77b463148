"""Heatmap pictures for the second image of the label config."""

from __future__ import annotations

import io
from functools import lru_cache
from textwrap import wrap
from urllib.parse import unquote

from flask import Response, request
from PIL import Image, ImageDraw

from anomaly_workers.store import ProjectStore

SIZE = (480, 320)


def respond(project: ProjectStore, source: str) -> Response:
    """Send the heatmap of the image at `source`, or a picture that says why there is none yet."""
    path = project.heatmap(source) or project.heatmap(unquote(source))
    if path is None:
        response = Response(placeholder(_reason(project, source)), mimetype="image/png")
        response.headers["Cache-Control"] = "no-store"
    else:
        response = Response(path.read_bytes(), mimetype="image/png")
        response.headers["Cache-Control"] = "no-cache"
        response.add_etag()
        response.make_conditional(request)
    # Label Studio loads pictures with crossOrigin=anonymous: without this header neither picture shows.
    response.headers["Access-Control-Allow-Origin"] = "*"
    response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    return response


@lru_cache(maxsize=64)
def placeholder(text: str) -> bytes:
    """Draw a plain picture that carries `text`, PNG."""
    picture = Image.new("RGB", SIZE, (38, 42, 51))
    lines = "\n".join(wrap(text, 46)[:8])
    ImageDraw.Draw(picture).multiline_text(
        (SIZE[0] / 2, SIZE[1] / 2), lines, fill=(222, 226, 235), font_size=17, anchor="mm", align="center", spacing=8
    )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _reason(project: ProjectStore, source: str) -> str:
    failed = [failure for failure in project.failures() if failure.image and failure.image in unquote(source)]
    if failed:
        return f"Could not be scored: {failed[0].reason}"
    if not project.target:
        return "Heatmap pending: the detector is still learning what normal looks like. Reload in a moment."
    return "Heatmap pending: this image is waiting to be scored. Reload in a moment."
