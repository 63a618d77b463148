"""The project pages: figures against scikit-learn and by hand, markup that nothing escapes from, and who may ask."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image
from redis import ConnectionError as RedisDown
from sklearn.metrics import auc, average_precision_score, roc_auc_score, roc_curve

from anomaly_backend.app import create_app
from anomaly_backend.dispatch import Dispatcher
from anomaly_workers.errors import StoreError
from anomaly_workers.pages import figures, render, report, tables
from anomaly_workers.pages.collect import Collector
from anomaly_workers.pages.facts import Scored, Snapshot
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.store import ProjectStore, Store, image_key
from anomaly_workers.types import Connection

AUTH = ("label-studio", "pass")
HOSTILE = "</script><img src=x onerror=alert(1)>.png"


class Unreachable:
    """Queues whose Redis is away, except for the one order that is noted."""

    def __init__(self) -> None:
        self.moved: list[int] = []
        self.connection = SimpleNamespace(hincrbyfloat=lambda *_: None)

    def depth(self) -> dict[str, int]:
        raise RedisDown("away")

    def enqueue_threshold(self, project: int) -> str:
        self.moved.append(project)
        return f"threshold-{project}-move"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({}, data_dir=tmp_path, password="pass", user="label-studio")


@pytest.fixture
def queues() -> Unreachable:
    return Unreachable()


@pytest.fixture
def client(settings: Settings, queues: Unreachable) -> FlaskClient:
    dispatcher = Dispatcher(Store(settings.data_dir), queues, settings)  # type: ignore[arg-type]
    return create_app(settings, dispatcher).test_client()


@pytest.fixture
def project(settings: Settings) -> ProjectStore:
    """A connected project without images."""
    store = Store(settings.data_dir).project(3)
    store.connect(Connection(url="http://ls:8080", project=3, token="secret"))
    return store


def deployed(project: ProjectStore, **card: Any) -> str:
    with project.new_version() as scratch:
        (scratch / "weights").write_text(json.dumps(card))
        version = project.publish(scratch, {"detector": "patchcore", "threshold": 0.5, "target_fpr": 0.01} | card)
    project.deploy(version, reason="test")
    return version


def keep(project: ProjectStore, version: str, task: int, score: float, **more: Any) -> None:
    about = {"anomaly_score": score, "threshold": 0.5, "image": image_key(f"{task}.png")} | more
    record = {"task": task, "result": [{"score": 0.9}], "score": 0.1, "anomaly": about}
    project.keep_record(version, task, record, np.full((4, 4), score, np.float32))


def review(project: ProjectStore, verdicts: Mapping[int, bool | None], **more: Any) -> None:
    """Write one annotation a task, a minute apart."""
    lines = []
    for seq, (task, anomaly) in enumerate(verdicts.items(), 1):
        at = f"2026-11-20T10:{seq:02d}:00Z"
        entry = {"seq": seq, "at": at, "annotation": seq, "task": task, "image": f"{task}.png", "kind": "submitted"}
        entry |= {"created_at": at, "updated_at": at, "annotator": 1, "anomaly": anomaly, "unreadable": []} | more
        lines.append(json.dumps(entry) + "\n")
    folder = project.folder / "feedback"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(lines))


def seen(project: ProjectStore, settings: Settings) -> Snapshot:
    snapshot = Collector(Store(settings.data_dir), settings).snapshot(project.id)
    assert snapshot is not None
    return snapshot


# -- figures


@pytest.mark.parametrize("digits", [1, 9])
def test_the_curves_are_those_of_scikit_learn(digits: int) -> None:
    random = np.random.default_rng(0)
    labels = random.random(200) < 0.3
    scores = np.round(np.where(labels, random.normal(0.6, 0.2, 200), random.normal(0.4, 0.2, 200)), digits)

    roc, precision_recall = figures.roc(labels, scores), figures.precision_recall(labels, scores)

    assert roc is not None
    assert precision_recall is not None
    assert roc.area == pytest.approx(roc_auc_score(labels, scores))
    assert auc(roc.x, roc.y) == pytest.approx(roc.area, abs=1e-5), "no corner is lost"
    assert len(roc.x) <= len(roc_curve(labels, scores)[0])
    assert precision_recall.area == pytest.approx(average_precision_score(labels, scores))


def test_there_is_no_curve_of_one_kind() -> None:
    assert figures.roc(np.ones(3, np.bool_), np.arange(3.0)) is None
    assert figures.precision_recall(np.zeros(3, np.bool_), np.arange(3.0)) is None


def test_a_threshold_implies_what_can_be_counted_by_hand() -> None:
    given = figures.Evidence(
        normals=(0.1, 0.2, 0.3, 0.6),
        held_out=True,
        defects=(0.4, 0.7, 0.9),
        good=(0.2, 0.8),
        open=(0.5, 0.5),
        unknown=0,
    )

    now = figures.operating(given, 0.5)

    assert now.false_positive_rate == 0.25
    assert now.recall == pytest.approx(2 / 3)
    assert now.precision == pytest.approx(2 / 3)
    assert now.f1 == pytest.approx(2 / 3)
    assert (now.flagged, now.open) == (2, 2)


def test_nothing_known_implies_nothing() -> None:
    now = figures.operating(figures.Evidence((), False, (), (), (), 0), 0.5)
    assert (now.false_positive_rate, now.recall, now.precision, now.f1, now.flagged) == (None, None, None, None, 0)


def test_the_histogram_loses_no_score() -> None:
    drawn = figures.histogram(figures.Evidence((0.0, 0.5, 1.0), True, (0.99,), (), (), 0))
    assert sum(drawn.normals) == 3
    assert drawn.normals[0] == drawn.normals[25] == drawn.normals[49] == 1
    assert drawn.defects[49] == 1


def test_random_order_finds_the_known_defects_evenly(project: ProjectStore, settings: Settings) -> None:
    review(project, {1: True, 2: False, 3: True, 4: None})
    found = figures.found(seen(project, settings).reviews, 8)
    assert found.defects == (1, 1, 2, 2)
    assert found.rate == 0.25


def test_a_day_stands_out_from_the_days_before_it(project: ProjectStore, settings: Settings) -> None:
    version = deployed(project, tasks=[1], normals=[0.2] * 100)
    days = {1: [0.9], 2: [0.1] * 38 + [0.9, 0.9], 3: [0.1] * 38 + [0.9, 0.9], 4: [0.1] * 30 + [0.9] * 10}
    scored = tuple(
        Scored(100 * day + place, score, 0.5, "", None, day * 86_400.0, day * 86_400.0)
        for day, scores in days.items()
        for place, score in enumerate(scores)
    )
    snapshot = seen(project, settings)
    snapshot = Snapshot(
        **{**{name: getattr(snapshot, name) for name in Snapshot.__dataclass_fields__}, "scored": scored}
    )

    drawn = figures.drift(snapshot)

    assert snapshot.current == version
    assert drawn.limit == pytest.approx(0.2)
    assert [(day.day, day.images, day.high) for day in drawn.days] == [
        ("1970-01-02", 1, 1),
        ("1970-01-03", 40, 2),
        ("1970-01-04", 40, 2),
        ("1970-01-05", 40, 10),
    ]
    assert [day.unusual for day in drawn.days] == [False, False, False, True]


def test_few_normals_are_expected_above_the_threshold_of_the_fit(project: ProjectStore, settings: Settings) -> None:
    version = deployed(project, normals=[0.2, 0.3], threshold=0.8, target_fpr=0.01)
    for task, score in enumerate((0.4, 0.6, 0.9)):
        keep(project, version, task, score)

    drift = figures.drift(seen(project, settings))

    assert (drift.limit, drift.expected) == (0.5, 0.01), "the rate belongs to one half, wherever the threshold is now"
    assert [day.high for day in drift.days] == [2]


def test_what_a_version_was_fitted_on_is_not_new_to_it(project: ProjectStore, settings: Settings) -> None:
    version = deployed(project, tasks=[1, 2], held_out={"2": 0.9})
    for task in (1, 2, 3):
        keep(project, version, task, 0.3)

    (day,) = figures.drift(seen(project, settings)).days

    assert (day.images, day.high) == (2, 1), "task 1 is left out, task 2 counts with its held-out score"


def test_bank_and_head_disagree_by_rank() -> None:
    scored = [Scored(task, 0.5, 0.5, "", parts, 0, 0) for task, parts in enumerate([(1, 30), (2, 20), (3, 10)])]
    apart = figures.disagreement(figures.ranks(scored))
    assert apart == pytest.approx({0: math.log(5), 1: 0, 2: math.log(5)})


# -- collecting


def test_scores_count_as_they_were_before_their_verdict(project: ProjectStore, settings: Settings) -> None:
    version = deployed(project, held_out={"1": 0.71})
    for task in (1, 2, 3):
        keep(project, version, task, 0.2)
    review(project, {1: True, 2: False}, version=version, score=0.64)

    given = figures.evidence(seen(project, settings))

    assert given.defects == (0.71,), "by a model that had not seen it"
    assert given.good == (0.64,), "what the annotator saw, not what calming made of it"
    assert given.open == (pytest.approx(0.2),)


def test_a_moved_threshold_keeps_the_scores_of_reviewed_tasks(project: ProjectStore, settings: Settings) -> None:
    first = deployed(project)
    keep(project, first, 1, 0.9)
    keep(project, first, 2, 0.45)
    review(project, {1: True}, version=first, score=0.9)
    second = deployed(project, threshold=0.4, weights_of=first)
    keep(project, second, 2, 0.45)

    snapshot = seen(project, settings)

    assert [(one.task, one.is_anomaly) for one in snapshot.scored] == [(1, True), (2, True)]
    assert [one.task for one in snapshot.open] == [2]
    assert figures.evidence(snapshot).defects == (0.9,)


def test_scores_of_other_weights_are_left_out_after_a_rollback(project: ProjectStore, settings: Settings) -> None:
    first = deployed(project)
    keep(project, first, 2, 0.3)
    newer = deployed(project, weights="others")
    review(project, {1: True, 2: False}, version=newer, score=0.95)
    project.deploy(first, reason="rollback")

    given = figures.evidence(seen(project, settings))

    assert (given.defects, given.good, given.unknown) == ((), (0.3,), 1)


def test_images_count_on_the_day_they_were_first_scored(project: ProjectStore, settings: Settings) -> None:
    version = deployed(project)
    keep(project, version, 1, 0.3, first_at="1970-01-03T00:00:00+00:00")
    keep(project, version, 2, 0.3)
    (one, other) = seen(project, settings).scored
    assert one.first_at == one.scored_at == 2 * figures.DAY
    assert other.first_at == pytest.approx(time.time(), abs=60), "an older record has its file's time"


def test_only_what_the_deployed_version_lacks_is_read_of_its_family(
    project: ProjectStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = deployed(project)
    for task in (1, 2):
        keep(project, first, task, 0.4)
    second = deployed(project, threshold=0.4, weights_of=first)
    keep(project, second, 1, 0.9)
    read: list[str] = []
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, *more: read.append(str(path)) or opened(path, *more))
    collector = Collector(Store(settings.data_dir), settings)

    snapshot = collector.snapshot(3)

    assert snapshot is not None
    assert [one.score for one in snapshot.scored] == [0.9, 0.4]
    records = [Path(path).relative_to(project.folder / "records").as_posix() for path in read if "records" in path]
    assert sorted(records) == sorted([f"{second}/0/1.json", f"{first}/0/2.json"])

    (project.folder / "records" / second / "0" / "1.json").unlink()
    again = collector.snapshot(3)
    assert again is not None
    assert [one.score for one in again.scored] == [0.4, 0.4]


def test_deleted_tasks_are_not_open(client: FlaskClient, project: ProjectStore, settings: Settings) -> None:
    version = deployed(project)
    for task in (1, 2, 3):
        keep(project, version, task, 0.4)
    body = {"action": "TASKS_DELETED", "project": {"id": 3}, "tasks": [{"id": 1}, {"id": 3}]}
    assert client.post("/webhook", json=body, auth=AUTH).status_code == 201
    assert [one.task for one in seen(project, settings).open] == [2]
    (line,) = Collector(Store(settings.data_dir), settings).summaries()
    assert line.scored == 1


@pytest.mark.parametrize(
    "content",
    [
        '{"anomaly": {',
        '{"anomaly": 3}',
        '{"anomaly": []}',
        '["anomaly_score"]',
        '{"anomaly": {"anomaly_score": "high"}}',
        '{"anomaly": {"anomaly_score": NaN}}',
        '{"anomaly": {"anomaly_score": 0.5, "parts": 7}}',
        '{"anomaly": {"anomaly_score": 0.5, "first_at": "soon"}}',
        "",
    ],
)
def test_a_damaged_record_is_passed_over(project: ProjectStore, settings: Settings, content: str) -> None:
    version = deployed(project)
    keep(project, version, 1, 0.3)
    (project.folder / "records" / version / "0" / "2.json").write_text(content)
    assert [one.task for one in seen(project, settings).scored] == [1]


@pytest.mark.parametrize("line", ["{", '{"at": 3}', None])
def test_a_damaged_log_spoils_its_own_line_alone(client: FlaskClient, settings: Settings, line: str | None) -> None:
    for number in (3, 4):
        store = Store(settings.data_dir).project(number)
        store.connect(Connection(url="http://ls:8080", project=number, token="secret"))
        store.keep_title(f"Bolts {number}")
    review(store, {1: True}, created_at="soon")
    if line is not None:
        (store.folder / "feedback" / "log.jsonl").write_text(line + "\n")
    page = client.get("/", auth=AUTH)
    assert page.status_code == 200
    assert "Bolts 3" in page.text
    assert "log.jsonl" in page.text


def test_changed_records_are_read_again_and_damaged_ones_passed_over(project: ProjectStore, settings: Settings) -> None:
    version = deployed(project)
    keep(project, version, 1, 0.3)
    collector = Collector(Store(settings.data_dir), settings)
    assert [one.score for one in collector.snapshot(3).scored] == [0.3]  # type: ignore[union-attr]

    keep(project, version, 1, 0.8, parts=[1.5, 2.5])
    (project.folder / "records" / version / "0" / "2.json").write_text('{"anomaly": {')

    (one,) = collector.snapshot(3).scored  # type: ignore[union-attr]
    assert (one.score, one.parts) == (0.8, (1.5, 2.5))


# -- tables


def test_a_table_leaves_as_csv_without_formulas(project: ProjectStore, settings: Settings) -> None:
    review(project, {1: True}, image='=HYPERLINK("http://evil","x")\r\n,', score=-0.5)
    table = tables.table(seen(project, settings), "reviews")

    text = table.as_csv()
    header, row = csv.reader(io.StringIO(text, newline=""))

    assert text.endswith("\r\n")
    assert header[3] == "image"
    assert row[3] == '\'=HYPERLINK("http://evil","x")\r\n,'
    assert row[8] == "-0.5", "a number stays a number"


@pytest.mark.parametrize("name", list(tables.TABLES))
def test_every_table_has_a_title_and_whole_rows(project: ProjectStore, settings: Settings, name: str) -> None:
    version = deployed(project, normals=[0.1, 0.2])
    keep(project, version, 1, 0.3)
    keep(project, version, 2, 0.9)
    review(project, {1: False, 2: True})
    project.keep_failure(9, "damaged", "9.png", permanent=True)
    snapshot = seen(project, settings)

    table = tables.table(snapshot, name)

    assert table.rows or name in ("queues", "workers", "jobs", "drift")
    assert {len(row) for row in table.rows} <= {len(table.columns)}
    assert json.loads(tables.dumps(table.as_json(snapshot)))["project"] == 3


# -- rendering


def test_a_page_says_what_to_do_while_there_is_nothing(client: FlaskClient, project: ProjectStore) -> None:
    assert "ls-anomaly connect" in client.get("/projects/9", auth=AUTH).text
    empty = client.get("/projects/3", auth=AUTH)
    assert empty.status_code == 200
    assert "Import images in Label Studio" in empty.text
    assert "Redis does not answer" in empty.text


def test_a_page_of_one_task_shows_it(client: FlaskClient, project: ProjectStore) -> None:
    version = deployed(project)
    keep(project, version, 1, 0.75)
    page = client.get("/projects/3", auth=AUTH).text
    assert "http://ls:8080/projects/3/data?task=1" in page
    assert "0.750" in page
    assert "<b>1</b>" in page, "one open task"


@pytest.mark.parametrize(("rate", "shown"), [(0.0125, "1.25"), (0.0005, "0.05"), (0.01, "1.0")])
def test_no_rate_in_force_blocks_the_form(client: FlaskClient, project: ProjectStore, rate: float, shown: str) -> None:
    keep(project, deployed(project), 1, 0.75)
    project.keep_document("policy", {"rule": "fpr", "value": rate})
    page = client.get("/projects/3", auth=AUTH).text
    assert f'min="0.001" max="49.99" step="any" value="{shown}"' in page
    for other in ("number", "f1"):
        assert f'value="{other}" formnovalidate' in page


def test_an_open_page_can_tell_that_another_version_is_deployed(client: FlaskClient, project: ProjectStore) -> None:
    version = deployed(project)
    page = client.get("/projects/3", auth=AUTH).text
    assert f'"version": "{version}"' in page
    assert '<a href="3">reload</a>' in page
    assert client.get("/projects/3/status.json", auth=AUTH).get_json()["version"] == version


def test_the_index_lists_projects(client: FlaskClient, project: ProjectStore) -> None:
    project.keep_title("Bolts & <nuts>")
    version = deployed(project)
    keep(project, version, 1, 0.3)
    page = client.get("/", auth=AUTH).text
    assert "Bolts &amp; &lt;nuts&gt;" in page
    assert 'href="projects/3"' in page


def test_nothing_hostile_leaves_its_place(client: FlaskClient, project: ProjectStore) -> None:
    project.keep_title(HOSTILE)
    version = deployed(project, decision={"reason": HOSTILE, "promote": True})
    keep(project, version, 1, 0.9, image=HOSTILE)
    review(project, {1: True, 2: False}, image=HOSTILE)
    project.keep_failure(4, HOSTILE, HOSTILE, permanent=True)
    page = client.get("/projects/3", auth=AUTH).text
    assert "<img src=x" not in page
    assert page.count("</script>") == len(render.SCRIPTS) + 1


def test_an_address_that_is_no_web_address_is_never_linked(client: FlaskClient, settings: Settings) -> None:
    store = Store(settings.data_dir).project(5)
    store.connect(Connection(url="javascript:alert(1)//", project=5, token="x"))
    assert "javascript:" not in client.get("/projects/5", auth=AUTH).text


def test_the_review_button_leads_to_the_tab_that_connect_made(project: ProjectStore, settings: Settings) -> None:
    assert render.review_address(seen(project, settings)) == "http://ls:8080/projects/3/data?labeling=1"
    project.keep_document("tabs", {"Likely defects": 4, "Review next": 7})
    assert render.review_address(seen(project, settings)) == "http://ls:8080/projects/3/data?tab=7&labeling=1"


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0.0, "0 %"), (0.01, "1 %"), (0.008, "0.8 %"), (0.996, "99.6 %"), (1.0, "100 %")]
)
def test_shares_are_written_for_people(value: float | None, shown: str) -> None:
    assert render.percent(value) == shown


def test_a_report_is_whole(project: ProjectStore, settings: Settings, tmp_path: Path) -> None:
    version = deployed(project)
    keep(project, version, 1, 0.9)
    picture = io.BytesIO()
    Image.new("RGB", (640, 480)).save(picture, "PNG")
    project.keep_heatmap(version, "1.png", picture.getvalue())

    report.write(settings, 3, tmp_path / "out" / "report.html")

    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert "data:text/csv" in page
    assert '<link rel="stylesheet"' not in page
    assert "<form" not in page
    with pytest.raises(StoreError, match="connect --project 4"):
        report.write(settings, 4, tmp_path / "none.html")


# -- serving


@pytest.mark.parametrize("path", ["/", "/projects/3", "/projects/3/status.json", "/projects/3/scores.csv"])
def test_pages_want_the_password(client: FlaskClient, project: ProjectStore, path: str) -> None:
    refused = client.get(path)
    assert refused.status_code == 401
    assert "Basic" in refused.headers["WWW-Authenticate"]
    answer = client.get(path, auth=AUTH)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "same-origin"


def test_files_are_served(client: FlaskClient, project: ProjectStore) -> None:
    version = deployed(project)
    keep(project, version, 1, 0.9)
    picture = io.BytesIO()
    Image.new("RGB", (1024, 512)).save(picture, "PNG")
    project.keep_heatmap(version, "1.png", picture.getvalue())
    small = client.get(f"/projects/3/heatmaps/{image_key('1.png')}.jpg", auth=AUTH)
    assert Image.open(io.BytesIO(small.data)).size == (360, 180)
    assert client.get("/projects/3/heatmaps/none.jpg", auth=AUTH).status_code == 404
    assert client.get("/projects/3/secrets.csv", auth=AUTH).status_code == 404
    assert client.get("/projects/9/scores.csv", auth=AUTH).status_code == 404
    assert client.get("/projects/3/scores.csv", auth=AUTH).text.startswith("task,score")
    assert client.get("/projects/3/scores.json", auth=AUTH).get_json()["rows"][0]["task"] == 1
    with client.get("/static/page.js") as script:
        assert script.status_code == 200


def test_a_threshold_is_kept_and_its_move_is_queued(
    client: FlaskClient, project: ProjectStore, queues: Unreachable
) -> None:
    answer = client.post("/projects/3/threshold", json={"rule": "number", "value": 0.7}, auth=AUTH)
    assert answer.get_json() == {"job": "threshold-3-move", "rule": "number", "value": 0.7}
    assert project.document("policy")["value"] == 0.7
    assert queues.moved == [3]


@pytest.mark.parametrize(
    "body", [{"rule": "number", "value": 1.5}, {"rule": "guess"}, {"value": 0.5}, [], {"rule": "fpr", "annotators": 3}]
)
def test_a_threshold_that_makes_no_sense_is_refused(
    client: FlaskClient, project: ProjectStore, queues: Unreachable, body: Any
) -> None:
    answer = client.post("/projects/3/threshold", json=body, auth=AUTH)
    assert answer.status_code == 400
    assert answer.get_json()["error"]
    assert (project.document("policy"), queues.moved) == ({}, [])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json", "Origin": "http://evil.test"}, 403),
        ({"Content-Type": "application/json", "Origin": "null"}, 403),
        ({"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "application/json", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json", "Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Content-Type": "application/json", "Origin": "http://localhost:9090"}, 200),
    ],
)
def test_another_site_cannot_move_a_threshold(
    client: FlaskClient, project: ProjectStore, queues: Unreachable, headers: dict[str, str], status: int
) -> None:
    body = json.dumps({"rule": "number", "value": 0.7})
    assert client.post("/projects/3/threshold", data=body, headers=headers, auth=AUTH).status_code == status
    assert bool(queues.moved) == (status == 200)
