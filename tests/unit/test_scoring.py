"""What scoring keeps of an image."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from anomaly_workers import scoring
from anomaly_workers.labelstudio import config
from anomaly_workers.runtime import Session
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import JSON, Detection, Picture, Task

CONFIG = (
    '<View><Image name="i" value="$image"/><BrushLabels name="m" toName="i"><Label value="Defect"/></BrushLabels>'
    "</View>"
)
PICTURE = Picture(np.zeros((16, 16, 3), np.uint8), (16, 16))
SCORED = scoring.Scored(
    Task(7, {"image": "/a.png"}), PICTURE, Detection(0.4, 0.5, np.zeros((4, 4), np.float32), (16, 16))
)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    store = Store(tmp_path).project(1)
    with store.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(b"weights")
        store.roll_out(store.publish(scratch, {"detector": "patchcore"}))
    return cast("Session", SimpleNamespace(store=store, controls=config.parse(CONFIG)))


def about(store: ProjectStore) -> JSON:
    record = store.record(store.current, 7)
    assert record is not None
    return cast("JSON", record["anomaly"])


def test_a_task_is_first_scored_once(session: Session) -> None:
    store = session.store
    scoring.keep(session, store.current, SCORED)
    assert about(store)["first_at"].endswith("+00:00")
    earlier = "2026-01-02T03:04:05+00:00"
    kept = {"anomaly": about(store) | {"first_at": earlier}}
    store.derive_record(store.current, 7, kept)

    renamed = scoring.re_encoded(session, store.current, SCORED.task)
    scoring.keep(session, store.current, SCORED)

    assert about(store)["first_at"] == earlier
    assert renamed is not None
    assert renamed["anomaly"]["first_at"] == earlier
