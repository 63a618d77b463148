"""Every table of a page: what its charts show, as rows that also leave as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from anomaly_workers.pages import figures
from anomaly_workers.pages.facts import Scored, Snapshot
from anomaly_workers.types import JSON

Cell = str | int | float | bool | None

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A spreadsheet takes text that begins so for a formula: https://owasp.org/www-community/attacks/CSV_Injection"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns.

    Attributes:
        name: last part of its address.
        title: for people.
        columns: their names, as in the JSON's keys.
        rows: each as long as `columns`.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def as_csv(self) -> str:
        """Return the table after RFC 4180, with a header, safe to open in a spreadsheet."""
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(self.columns)
        writer.writerows([_harmless(cell) for cell in row] for row in self.rows)
        return buffer.getvalue()

    def as_json(self, snapshot: Snapshot) -> JSON:
        """Return the table with what it belongs to."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {
            "project": snapshot.project,
            "version": snapshot.current,
            "table": self.name,
            "at": moment(snapshot.at),
            "rows": rows,
        }


def table(snapshot: Snapshot, name: str) -> Table:
    """Return one table.

    Raises:
        KeyError: there is none of that name.
    """
    title, columns, rows = TABLES[name]
    return Table(name, title, columns, tuple(tuple(row) for row in rows(snapshot)))


def task_address(snapshot: Snapshot, task: int) -> str:
    """Return where a task is in Label Studio, "" if no address is known."""
    return f"{snapshot.url}/projects/{snapshot.project}/data?task={task}" if snapshot.url else ""


def moment(seconds: float) -> str:
    """Return an ISO time, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _scores(snapshot: Snapshot) -> list[list[Cell]]:
    apart = figures.disagreement(figures.ranks(snapshot.open))
    said = {review.task: review for review in snapshot.reviews}

    def line(one: Scored) -> list[Cell]:
        review = said.get(one.task)
        bank, head = one.parts or (None, None)
        return [
            one.task,
            round(one.score, 6),
            one.threshold,
            "anomaly" if one.is_anomaly else "normal",
            "skipped" if one.task in snapshot.skipped else "reviewed" if review else "open",
            None if review is None else _word(review.anomaly),
            bank,
            head,
            round(apart[one.task], 4) if one.task in apart else None,
            moment(one.first_at),
            task_address(snapshot, one.task),
        ]

    return [line(one) for one in snapshot.scored]


def _histogram(snapshot: Snapshot) -> list[list[Cell]]:
    drawn = figures.histogram(figures.evidence(snapshot))
    bins = zip(drawn.edges, drawn.edges[1:], drawn.normals, drawn.defects, drawn.open, strict=False)
    return [list(row) for row in bins]


def _roc(snapshot: Snapshot) -> list[list[Cell]]:
    return _points(figures.roc(*figures.labelled(figures.evidence(snapshot))))


def _precision_recall(snapshot: Snapshot) -> list[list[Cell]]:
    return _points(figures.precision_recall(*figures.labelled(figures.evidence(snapshot))))


def _points(curve: figures.Curve | None) -> list[list[Cell]]:
    if curve is None:
        return []
    points = zip(curve.thresholds, curve.x, curve.y, strict=True)
    return [[threshold if threshold <= 1 else None, x, y] for threshold, x, y in points]


def _versions(snapshot: Snapshot) -> list[list[Cell]]:
    return [_version(snapshot, card) for card in snapshot.cards]


def _version(snapshot: Snapshot, card: Mapping[str, object]) -> list[Cell]:
    decision = card.get("decision")
    decision = decision if isinstance(decision, Mapping) else {}
    after = decision.get("challenger") or {}
    before = decision.get("champion") or {}
    plain = ("number", "version", "created", "kind", "mode", "images", "confirmed", "defects", "defects_with_mask")
    return [
        *(_cell(card.get(name)) for name in plain),
        state_of(snapshot, card),
        *(_cell(after.get(name)) for name in ("auroc", "recall", "false_positive_rate", "margin")),
        *(_cell(before.get(name)) for name in ("auroc", "recall", "false_positive_rate", "margin")),
        _cell(decision.get("reason")),
        _cell(card.get("threshold")),
        _cell(card.get("fit_seconds")),
    ]


def state_of(snapshot: Snapshot, card: Mapping[str, object]) -> str:
    """Return what became of a version: "deployed", "rolling out", "replaced" or "kept back"."""
    version = card.get("version")
    if version == snapshot.current:
        return "deployed"
    if version == snapshot.rollout:
        return "rolling out"
    return "replaced" if any(entry.get("to") == version for entry in snapshot.history) else "kept back"


def _deployments(snapshot: Snapshot) -> list[list[Cell]]:
    return [[_cell(entry.get(name)) for name in ("at", "from", "to", "reason")] for entry in snapshot.history]


def _reviews(snapshot: Snapshot) -> list[list[Cell]]:
    return [
        [
            number,
            moment(review.at),
            review.task,
            review.image,
            _word(review.anomaly),
            review.judged,
            review.annotators,
            review.version,
            review.score,
            task_address(snapshot, review.task),
        ]
        for number, review in enumerate(snapshot.reviews, 1)
    ]


def _found(snapshot: Snapshot) -> list[list[Cell]]:
    drawn = figures.found(snapshot.reviews, snapshot.tasks)
    return [[number, known, round(number * drawn.rate, 3)] for number, known in enumerate(drawn.defects, 1)]


def _drift(snapshot: Snapshot) -> list[list[Cell]]:
    drawn = figures.drift(snapshot)
    return [[day.day, day.images, day.high, round(day.share, 6), drawn.expected, day.unusual] for day in drawn.days]


def _failures(snapshot: Snapshot) -> list[list[Cell]]:
    return [
        [one.task, one.image, one.reason, max(one.attempts, 0), moment(one.at), task_address(snapshot, one.task)]
        for one in snapshot.failures
    ]


def _queues(snapshot: Snapshot) -> list[list[Cell]]:
    return [[name, waiting] for name, waiting in snapshot.work.depth.items()] if snapshot.work else []


def _workers(snapshot: Snapshot) -> list[list[Cell]]:
    if snapshot.work is None:
        return []
    return [[one.name, one.state, one.device, one.job, round(one.age, 1)] for one in snapshot.work.workers]


def _jobs(snapshot: Snapshot) -> list[list[Cell]]:
    if snapshot.work is None:
        return []
    return [[job.id, job.kind, job.state, job.percent, job.message, job.worker] for job in snapshot.work.jobs]


Rows = Callable[[Snapshot], Sequence[Sequence[Cell]]]

_FIGURES = ("auroc", "recall", "false_positive_rate", "margin")
TABLES: Mapping[str, tuple[str, tuple[str, ...], Rows]] = {
    "scores": (
        "Scores of all tasks",
        (
            "task",
            "score",
            "threshold",
            "says",
            "state",
            "verdict",
            "bank",
            "head",
            "disagreement",
            "first_scored",
            "url",
        ),
        _scores,
    ),
    "histogram": ("Score histogram", ("from", "to", "normals", "defects", "open"), _histogram),
    "roc": ("ROC curve", ("threshold", "false_positive_rate", "recall"), _roc),
    "precision-recall": ("Precision and recall", ("threshold", "recall", "precision"), _precision_recall),
    "versions": (
        "Versions",
        (
            *("number", "version", "created", "kind", "mode", "images", "confirmed", "defects", "defects_with_mask"),
            "state",
            *_FIGURES,
            *(f"champion_{name}" for name in _FIGURES),
            *("reason", "threshold", "fit_seconds"),
        ),
        _versions,
    ),
    "deployments": ("Deployments", ("at", "from", "to", "reason"), _deployments),
    "reviews": (
        "Reviews",
        ("number", "at", "task", "image", "verdict", "judged", "annotators", "version", "score", "url"),
        _reviews,
    ),
    "found": ("Defects found by reviews", ("reviews", "defects", "random_order"), _found),
    "drift": ("New images by day", ("day", "images", "high", "share", "expected", "unusual"), _drift),
    "failures": ("Tasks that could not be scored", ("task", "image", "reason", "attempts", "at", "url"), _failures),
    "queues": ("Queues", ("queue", "waiting"), _queues),
    "workers": ("Workers", ("worker", "state", "device", "job", "heartbeat_seconds"), _workers),
    "jobs": ("Jobs", ("job", "kind", "state", "percent", "message", "worker"), _jobs),
}
"""Title, columns and rows of every table, by the last part of its address."""


def dumps(found: JSON) -> str:
    """Return JSON for a file."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _word(anomaly: bool | None) -> str:
    return {True: "defect", False: "normal", None: "undecided"}[anomaly]


def _cell(value: object) -> Cell:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _harmless(cell: Cell) -> Cell:
    if isinstance(cell, str) and cell.startswith(_FORMULA):
        return f"'{cell}"
    return cell
