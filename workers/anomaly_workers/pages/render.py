"""Draws the pages: Jinja2 templates over what was collected, escaped throughout."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from anomaly_workers.pages import figures, tables, thumbs
from anomaly_workers.pages.facts import Review, Scored, Snapshot, Summary, Work
from anomaly_workers.pages.tables import TABLES, Table
from anomaly_workers.types import JSON

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("uPlot.iife.min.js", "page.js")
STYLES = ("uPlot.min.css", "page.css")

SHOWN_IMAGES = 12
SHOWN_ROWS = 25
SHOWN_FAILURES = 20
SHOWN_JOBS = 8
SHOWN_VERSIONS = 20
HOUR = 3600.0

SURPRISES = {"false alarm": "alarm was rejected", "missed": "defect was missed"}
"""What a verdict against the prediction is called in the gallery."""

Heatmap = Callable[[str], Path | None]
"""From a key to the file of a heatmap, None if there is none."""

Draw = Callable[[str], "Picture | None"]
"""From the key of a heatmap to what shows it."""

Download = Callable[[str, str], str]
"""From a table's name and "csv" or "json" to an address."""

DRAWN = ("histogram", "roc", "precision-recall", "found", "drift", "workers")
"""The tables that a page itself shows."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A thumbnail's address, and its size in pixels, by which a browser keeps its place."""

    address: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Item:
    """One image of the gallery; `score` is None where none is known."""

    task: int
    address: str
    picture: Picture | None
    score: float | None
    is_anomaly: bool
    note: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """Some images with what they have in common."""

    name: str
    title: str
    about: str
    nothing: str
    items: tuple[Item, ...]


def index(summaries: Sequence[Summary], work: Work | None) -> str:
    """Return the page of all projects."""
    return _page("index.html", root="", summaries=summaries, work=work, links=None, inlined=None)


def missing(project: int) -> str:
    """Return the page of a project that is not known."""
    return _page("missing.html", root="../", project=project, inlined=None)


def project(snapshot: Snapshot, heatmap: Heatmap) -> str:
    """Return a project's page as the front end serves it."""
    base, stamp = str(snapshot.project), hashlib.sha256(snapshot.current.encode()).hexdigest()[:8]

    def draw(key: str) -> Picture | None:
        path = heatmap(key)
        size = thumbs.size(path) if path is not None else None
        return Picture(f"{base}/heatmaps/{key}.jpg?v={stamp}", *size) if size else None

    def download(name: str, kind: str) -> str:
        return f"{base}/{name}.{kind}"

    return _project(snapshot, draw, download, report=False)


def report(snapshot: Snapshot, heatmap: Heatmap) -> str:
    """Return a project's page as one file that asks for nothing else."""

    def draw(key: str) -> Picture | None:
        path = heatmap(key)
        size = thumbs.size(path) if path is not None else None
        content = thumbs.thumbnail(path) if path is not None else None
        return Picture(_inline("image/jpeg", content), *size) if content and size else None

    def download(name: str, kind: str) -> str:
        found = tables.table(snapshot, name)
        if kind == "csv":
            return _inline("text/csv;charset=utf-8", found.as_csv().encode())
        return _inline("application/json", tables.dumps(found.as_json(snapshot)).encode())

    return _project(snapshot, draw, download, report=True)


def status(snapshot: Snapshot) -> JSON:
    """Return what an open page asks for again and again."""
    return {
        "project": snapshot.project,
        "version": snapshot.current,
        "rollout": snapshot.rollout,
        "tasks": snapshot.tasks,
        "open": len(snapshot.open),
        "reviewed": len(snapshot.reviewed),
        "threshold": figures.threshold_of(snapshot),
        "work": _work_status(snapshot.work),
    }


def _work_status(work: Work | None) -> JSON | None:
    if work is None:
        return None
    jobs = [
        {"id": job.id, "kind": job.kind, "state": job.state, "percent": job.percent, "message": job.message}
        for job in work.jobs
    ]
    return {"waiting": sum(work.depth.values()), "depth": dict(work.depth), "workers": len(work.workers), "jobs": jobs}


def _project(snapshot: Snapshot, draw: Draw, download: Download, *, report: bool) -> str:
    given = figures.evidence(snapshot)
    labels, scores = figures.labelled(given)
    found = figures.found(snapshot.reviews, snapshot.tasks)
    drift = figures.drift(snapshot)
    curves = figures.roc(labels, scores), figures.precision_recall(labels, scores)
    made = {name: tables.table(snapshot, name) for name in DRAWN}
    now = figures.operating(given, figures.threshold_of(snapshot))
    return _page(
        "project.html",
        root="" if report else "../",
        inlined=_inlined() if report else None,
        snapshot=snapshot,
        evidence=given,
        now=now,
        roc=curves[0],
        precision_recall=curves[1],
        found=found,
        drift=drift,
        unusual=sum(day.unusual for day in drift.days),
        galleries=galleries(snapshot, draw),
        versions=[_version(snapshot, card) for card in reversed(snapshot.cards[-SHOWN_VERSIONS:])],
        rule=_rule(snapshot),
        tables=made,
        titles={name: title for name, (title, _, _) in TABLES.items()},
        shown={name: _thinned(table) for name, table in made.items()},
        download=download,
        review=review_address(snapshot),
        home=f"{snapshot.url}/projects/{snapshot.project}/data" if snapshot.url else "",
        lately=sum(snapshot.at - one.scored_at < HOUR for one in snapshot.scored),
        speed=_speed(snapshot.work),
        jobs=[job for job in snapshot.work.jobs if job.state != "finished"][:SHOWN_JOBS] if snapshot.work else [],
        failures=snapshot.failures[:SHOWN_FAILURES],
        payload=_payload(snapshot, given, now, curves, found, drift, report=report),
        report=report,
        task_address=lambda task: tables.task_address(snapshot, task),
    )


def galleries(snapshot: Snapshot, draw: Draw) -> list[Gallery]:
    """Return the images worth a look: the likeliest defects, the doubtful ones, those that opinions differ on."""

    def of(one: Scored, note: str) -> Item:
        address = tables.task_address(snapshot, one.task)
        return Item(one.task, address, draw(one.image), one.score, one.is_anomaly, note)

    ranked = figures.ranks(snapshot.open)
    doubtful = figures.least_certain(snapshot.open, SHOWN_IMAGES)
    return [
        Gallery(
            "highest",
            "Highest scores",
            "Open tasks that look least like the normal images.",
            "No open task is left.",
            tuple(of(one, "") for one in figures.highest(snapshot.open, SHOWN_IMAGES)),
        ),
        Gallery(
            "doubtful",
            "Least certain",
            "Open tasks nearest to the threshold, where your verdict teaches most.",
            "No open task is left.",
            tuple(of(one, _distance(one)) for one in doubtful),
        ),
        _apart(snapshot, ranked, of) if ranked else _surprises(snapshot, draw),
    ]


def _distance(one: Scored) -> str:
    apart = one.score - one.threshold
    return f"{abs(apart):.3f} {'above' if apart >= 0 else 'below'}"


def _apart(snapshot: Snapshot, ranked: Mapping[int, tuple[float, float]], of: Callable[[Scored, str], Item]) -> Gallery:
    apart = figures.disagreement(ranked)
    order = sorted((one for one in snapshot.open if one.task in apart), key=lambda one: (-apart[one.task], one.task))

    def note(one: Scored) -> str:
        bank, head = (max(1, round(rank * len(ranked) + 0.5)) for rank in ranked[one.task])
        return f"bank {bank} · head {head}"

    return Gallery(
        "disagreeing",
        "Most disagreeing",
        f"Of {number(len(ranked))} open tasks, those that the bank of normal patches and the head trained on defects "
        "rank furthest apart; below each, its place with either.",
        "No open task is left.",
        tuple(of(one, note(one)) for one in order[:SHOWN_IMAGES]),
    )


def _surprises(snapshot: Snapshot, draw: Draw) -> Gallery:
    def of(review: Review) -> Item:
        record = snapshot.record(review.task)
        address = tables.task_address(snapshot, review.task)
        drawn = draw(record.image) if record else None
        return Item(review.task, address, drawn, review.score, review.judged == "false alarm", SURPRISES[review.judged])

    newest = [review for review in reversed(snapshot.reviews) if review.judged in SURPRISES]
    return Gallery(
        "disagreeing",
        "Model and annotator disagree",
        "Reviewed tasks whose verdict was not the prediction's, newest first.",
        "None so far. Once a version has a head trained on defects, this shows what bank and head rank differently.",
        tuple(of(review) for review in newest[:SHOWN_IMAGES]),
    )


def review_address(snapshot: Snapshot) -> str:
    """Return where labelling begins, "" if no address is known."""
    if not snapshot.url:
        return ""
    tab = next((view for title, view in sorted(snapshot.tabs.items()) if title.startswith("Review next")), None)
    return f"{snapshot.url}/projects/{snapshot.project}/data?{f'tab={tab}&' if tab else ''}labeling=1"


def _rule(snapshot: Snapshot) -> str:
    """How the threshold in force was found."""
    rule = snapshot.card.get("rule", "fpr")
    rate = (snapshot.card.get("value") if rule == "fpr" else 0) or snapshot.card.get("target_fpr", snapshot.target_fpr)
    named = {"number": "set by hand", "f1": "the best F1 on confirmed images"}
    return named.get(rule, f"for false alarms on {percent(rate)} of normal images")


def _version(snapshot: Snapshot, card: JSON) -> JSON:
    """A card with what became of it, and its figures on confirmed images beside the version it was to replace."""
    decision = card.get("decision") or {}
    after, before = decision.get("challenger") or {}, decision.get("champion") or {}
    names = ("auroc", "recall", "false_positive_rate")
    return {
        **{name: card.get(name) for name in ("number", "version", "created", "kind", "images", "confirmed", "defects")},
        "state": tables.state_of(snapshot, card),
        "figures": {name: (after.get(name), before.get(name)) for name in names},
        "reason": decision.get("reason") or "",
    }


def _payload(
    snapshot: Snapshot,
    given: figures.Evidence,
    now: figures.Operating,
    curves: tuple[figures.Curve | None, figures.Curve | None],
    found: figures.Found,
    drift: figures.Drift,
    *,
    report: bool,
) -> JSON:
    """What the script draws."""
    bins = figures.histogram(given)
    return {
        "project": snapshot.project,
        "report": report,
        "version": snapshot.current,
        "threshold": now.threshold,
        "scores": {name: _floored(getattr(given, name)) for name in ("normals", "defects", "negatives", "open")},
        "histogram": {name: getattr(bins, name) for name in ("normals", "defects", "open")},
        "roc": _curve(curves[0]),
        "precisionRecall": _curve(curves[1]),
        "found": {"defects": found.defects, "rate": found.rate},
        "drift": {
            "days": [day.day for day in drift.days],
            "share": [day.share for day in drift.days],
            "images": [day.images for day in drift.days],
            "high": [day.high for day in drift.days],
            "unusual": [day.unusual for day in drift.days],
            "expected": drift.expected,
        },
    }


def _curve(curve: figures.Curve | None) -> JSON | None:
    return None if curve is None else {"x": curve.x, "y": curve.y, "thresholds": curve.thresholds}


def _floored(scores: Sequence[float]) -> list[float]:
    """Six digits, never rounded up over a threshold."""
    return [int(score * 1e6) / 1e6 for score in scores]


def _thinned(table: Table) -> Table:
    """As many rows as a person reads, evenly taken, the first and the last among them."""
    rows = [row for row in table.rows if any(row[2:])] if table.name == "histogram" else list(table.rows)
    if len(rows) > SHOWN_ROWS:
        last = len(rows) - 1
        rows = [rows[round(place * last / (SHOWN_ROWS - 1))] for place in range(SHOWN_ROWS)]
    return Table(table.name, table.title, table.columns, tuple(rows))


def _speed(work: Work | None) -> float | None:
    seconds = work.totals["scoring_seconds"] if work else 0.0
    return work.totals["images_scored"] / seconds if work and seconds else None


# -- markup


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("anomaly_workers.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "counted": counted,
        "percent": percent,
        "score": score,
        "date": date,
        "words": words,
        "cell": cell,
    }
    made.globals |= {"stamp": _stamp(), "styles": STYLES, "scripts": SCRIPTS}
    return made


def _page(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)


@cache
def _stamp() -> str:
    """Changes with the static files, so that a browser never keeps old ones."""
    content = b"".join((STATIC / name).read_bytes() for name in (*STYLES, *SCRIPTS))
    return hashlib.sha256(content).hexdigest()[:10]


@cache
def _inlined() -> JSON:
    read = {name: (STATIC / name).read_text(encoding="utf-8") for name in (*STYLES, *SCRIPTS)}
    return {"styles": [read[name] for name in STYLES], "scripts": [read[name] for name in SCRIPTS]}


def _inline(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"


def number(value: float | None) -> str:
    """Return a count for people: 5,000."""
    return "–" if value is None else f"{value:,.0f}"


def counted(value: int, noun: str) -> str:
    """Return a count with its noun: 1 defect, 2 defects."""
    return f"{number(value)} {noun}{'' if value == 1 else 's'}"


def percent(value: float | None) -> str:
    """Return a share for people: 0.8 %, 1 %, 12 %."""
    if value is None:
        return "–"
    digits = 0 if 0.1 <= value < 0.995 else 1
    return f"{100 * value:.{digits}f}".removesuffix(".0") + " %"


def score(value: float | None) -> str:
    """Return a score or an area for people: 0.512."""
    return "–" if value is None else f"{value:.3f}"


def date(value: str | float | None) -> str:
    """Return an ISO time, or seconds since the epoch, for people: 23 Nov 2026, 05:45 UTC."""
    if value is None:
        return "–"
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    else:
        moment = datetime.fromtimestamp(value, UTC)
    return f"{moment.day} {moment:%b %Y, %H:%M} UTC"


def words(name: str) -> str:
    """Return a column's name for people."""
    return name.replace("_", " ")


def cell(value: tables.Cell) -> str:
    """Return a table's cell for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"
    return str(value)
