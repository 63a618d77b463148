"""The slow way to learn: fitting versions on what looks normal, and on what annotators confirmed."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from typing import cast

from torch import Tensor

from anomaly_workers import heap, operating, policy, scoring, sweep
from anomaly_workers.counters import count
from anomaly_workers.detectors.patchwise import PatchwiseDetector, fingerprint
from anomaly_workers.detectors.scales import Grids
from anomaly_workers.feedback import Example, FeedbackLog
from anomaly_workers.operating import Evidence
from anomaly_workers.policy import Rule
from anomaly_workers.refine import gate
from anomaly_workers.refine.gate import Thresholds
from anomaly_workers.refine.study import Lesson, inside_cells, invent, study
from anomaly_workers.runtime import Runtime, Session
from anomaly_workers.store import ProjectStore
from anomaly_workers.sweep import TrainingTasks
from anomaly_workers.types import JSON, Picture, Progress, no_progress

SETTLE_SECONDS, SETTLE_MOST = 3.0, 30.0
"""Quiet time after the last annotation before a run starts, and how long it is waited for."""

COURTESY_SECONDS = 60.0
"""Longest that a learning run on a GPU steps aside for scoring at a time."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """An image that annotators agree on, decoded."""

    example: Example
    picture: Picture = field(repr=False)


@dataclass(frozen=True, slots=True)
class Material:
    """What a run learns from.

    Attributes:
        available: images of the project that could be learnt as normal.
        tasks: those that are, with `pictures` and `flags`, whether annotators confirmed each.
        confirmed: every image with a verdict that holds, defects too.
    """

    available: int
    tasks: Sequence[int] = field(repr=False)
    pictures: Sequence[Picture] = field(repr=False)
    flags: Sequence[bool] = field(repr=False)
    confirmed: Sequence[Confirmed] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fitted detector with its scores of confirmed images that it has not seen, by task, and its threshold's rule."""

    detector: PatchwiseDetector = field(repr=False)
    scores: Mapping[int, float] = field(repr=False)
    kind: str
    rule: Rule = "fpr"
    value: float = 0.0


def fit(runtime: Runtime, progress: Progress, *, project: int, run: str) -> dict[str, int | str]:
    """Fit a version on what is known to be normal, train its head on confirmed defects, deploy it if it is better.

    `run` says why: "first" (no version yet), "growth" (many more images than the last fit saw), "training" (somebody
    pressed Start training), "feedback" (enough new verdicts). A version that does not pass the gate is kept with the
    reason on its card, and may still be promoted by hand.
    """
    try:
        return _learn(runtime, progress, project=project, run=run)
    finally:
        heap.give_back()


def _learn(runtime: Runtime, progress: Progress, *, project: int, run: str) -> dict[str, int | str]:
    session = runtime.session(project)
    if session.store.current and run == "first":
        return {"skipped": "there is a version already"}
    before = session.store.current
    polite = _courteous(runtime, progress)
    polite(0.0, "reading annotations")
    log = FeedbackLog(session.store)
    _settle(session, log, polite)
    seen = max((entry.seq for entry in log.entries()), default=0)  # before the examples: what comes meanwhile is new
    examples = log.examples()
    chosen = sweep.training_tasks(session.client, session.store, examples, limit=runtime.settings.max_fit_images)
    if not session.store.current and not sweep.may_fit(len(chosen.tasks), project, runtime.redis, runtime.settings):
        return {"waiting": f"{len(chosen.tasks)} images are few: waiting whether more come"}
    began = time.monotonic()
    detector = cast("PatchwiseDetector", runtime.new_detector())
    material = _gathered(runtime, session, detector, chosen, examples, scoring.part(polite, 0.0, 0.25))
    if len(material.tasks) < 2:
        return {"waiting": len(material.tasks)}
    weight = runtime.settings.head_weight
    trained = _candidates(detector, material, scoring.part(polite, 0.25, 0.9), weight=weight)
    candidates = [_with_threshold(runtime, session, one, material.confirmed) for one in trained]
    winner, decision = _choose(runtime, session, candidates, material.confirmed)
    card = _card(runtime, material, winner, run) | {
        "fit_seconds": round(time.monotonic() - began, 2),
        "parent": session.store.current or None,
        "project_tasks": session.client.project(project).tasks,
        "feedback": seen,
        "decision": decision.card() if decision else {"promote": True, "reason": _ungated(session, run)},
    }
    with session.store.new_version() as scratch:
        winner.detector.save(scratch)
        version = session.store.publish(scratch, card)
    session.store.keep_learnt(seen)
    count(runtime.redis, "fits")
    if decision and not decision.promote:
        _go_on(runtime, session, log)
        return {"version": version, "kept back": decision.reason}
    if overtaken(session.store, before):
        return {"version": version, "kept back": f"{session.store.target} was chosen while this one was fitted"}
    _deploy(runtime, session, version, winner.detector, polite)
    return {"version": version, "images": len(material.tasks)}


def _deploy(runtime: Runtime, session: Session, version: str, detector: PatchwiseDetector, progress: Progress) -> None:
    """Roll a version out: the open tasks are scored with it before it replaces another."""
    runtime.keep_warm(session.store.id, version, detector)
    session.store.roll_out(version)
    progress(0.98, "queueing open tasks")
    sweep.sweep_project(session.client, session.store, runtime.queues, runtime.settings)


def overtaken(store: ProjectStore, before: str) -> bool:
    """Tell whether somebody deployed, or rolls out, other weights since `before` was deployed; thresholds may move."""
    same = store.family(before)
    return bool(before) and not {store.current, store.target} <= same


def _settle(session: Session, log: FeedbackLog, progress: Progress) -> None:
    """Read the annotations, until none came for a moment: whoever submits ten in a row wants one run for all."""
    until = time.monotonic() + SETTLE_MOST
    while log.reconcile(session.client, session.controls) and time.monotonic() < until:
        progress(0.0, "waiting for the last annotation")
        time.sleep(SETTLE_SECONDS)


def _go_on(runtime: Runtime, session: Session, log: FeedbackLog) -> None:
    """Have another run follow if there are enough new verdicts again."""
    if sweep.may_learn(session.store, log, runtime.settings):
        runtime.queues.enqueue_fit(session.store.id, "feedback")


def _gathered(
    runtime: Runtime,
    session: Session,
    detector: PatchwiseDetector,
    chosen: TrainingTasks,
    examples: Sequence[Example],
    progress: Progress,
) -> Material:
    """Fetch and decode the images; those that cannot be read are left out, with a noted failure."""
    fetching = scoring.part(progress, 0.0, 1.0, "fetching images")
    pictures = scoring.gather(runtime, session, chosen.tasks, side=detector.side, progress=fetching)
    usable = [
        (task.id, picture, flag)
        for task, picture, flag in zip(chosen.tasks, pictures, chosen.confirmed, strict=True)
        if picture is not None
    ]
    normals = {task: picture for task, picture, _ in usable}
    return Material(
        available=chosen.available,
        tasks=list(normals),
        pictures=list(normals.values()),
        flags=[flag for _, _, flag in usable],
        confirmed=_confirmed(runtime, session, detector, examples, normals),
    )


def _candidates(
    detector: PatchwiseDetector, material: Material, progress: Progress, *, weight: float
) -> list[Candidate]:
    """Fit the bank and, on confirmed defects, a head of that weight; return both, the one with a head first."""
    pictures, confirmed = material.pictures, material.confirmed
    grids = detector.grids(pictures, progress=scoring.part(progress, 0.0, 0.3))
    defects = [one for one in confirmed if one.example.anomaly]
    lesson_grids = detector.grids([one.picture for one in defects])
    kept = detector.fit_grids(grids, pictures, material.flags, scoring.part(progress, 0.3, 0.6), defects=lesson_grids)
    prints = [fingerprint(picture) for picture in pictures]
    places = {prints[i]: place for place, i in enumerate(kept)}  # twins share a place
    normals_by_place = {
        task: places[known] for task, known in zip(material.tasks, prints, strict=True) if known in places
    }
    wanted = [one.example.task for one in confirmed if one.example.anomaly is False]
    inside = [task for task in wanted if task in normals_by_place]
    outside = [one for one in confirmed if one.example.anomaly or one.example.task not in normals_by_place]
    found = detector.predict([one.picture for one in outside])
    bank = Candidate(
        detector,
        {one.example.task: detection.score for one, detection in zip(outside, found, strict=True)}
        | {task: detector.held_out[normals_by_place[task]] for task in inside},
        "bank",
    )
    if not defects or not detector.learns_defects or not weight:
        return [bank]
    lessons = [Lesson(grid, _inside(one.example, grid)) for one, grid in zip(defects, lesson_grids, strict=True)]
    normal_grids = [grids[i] for i in kept]
    grids_of = partial(detector.grids, progress=scoring.part(progress, 0.6, 0.7, "synthesising defects"))
    invented = invent(grids_of, [pictures[i] for i in kept])
    part = scoring.part(progress, 0.7, 1.0)
    taught = study(detector.memory, normal_grids, lessons, invented=invented, weight=weight, progress=part)
    joined = detector.joined(taught.head, taught.normals.tolist())
    scores = {task: joined.held_out[normals_by_place[task]] for task in inside}
    scores |= {
        one.example.task: joined.calibrated(float(raw)) for one, raw in zip(defects, taught.lessons, strict=True)
    }
    rest = [one for one in outside if not one.example.anomaly]
    scores |= {
        one.example.task: detection.score
        for one, detection in zip(rest, joined.predict([one.picture for one in rest]), strict=True)
    }
    return [Candidate(joined, scores, "bank and head"), bank]


def _with_threshold(
    runtime: Runtime, session: Session, candidate: Candidate, confirmed: Sequence[Confirmed]
) -> Candidate:
    """Put the threshold where the project's policy wants it."""
    detector = candidate.detector
    verdicts = {one.example.task: bool(one.example.anomaly) for one in confirmed}
    judged = {task: (score, verdicts[task]) for task, score in candidate.scores.items()}
    known = Evidence(detector.calibration, detector.options.target_fpr, detector.held_out, judged, detector.left_out)
    detector.threshold, rule, value = operating.settle(policy.read(session.store), known, runtime.settings)
    return replace(candidate, rule=rule, value=value)


def _choose(
    runtime: Runtime, session: Session, candidates: Sequence[Candidate], confirmed: Sequence[Confirmed]
) -> tuple[Candidate, gate.Decision | None]:
    """Return the first candidate that the gate lets pass, else the first; None where there is nothing to compare."""
    if not session.store.current or not confirmed:
        return candidates[-1], None
    champion = _champion_scores(runtime, session, confirmed)
    line = float(session.store.card(session.store.current)["threshold"])
    decided = [
        (
            one,
            gate.decide(_trials(confirmed, champion, one.scores), thresholds=Thresholds(line, one.detector.threshold)),
        )
        for one in candidates
    ]
    return next(((one, decision) for one, decision in decided if decision.promote), decided[0])


def _trials(
    confirmed: Sequence[Confirmed], champion: Mapping[int, float], challenger: Mapping[int, float]
) -> list[gate.Trial]:
    return [
        gate.Trial(
            task=one.example.task,
            anomaly=bool(one.example.anomaly),
            champion=champion[one.example.task],
            challenger=challenger[one.example.task],
        )
        for one in confirmed
    ]


def _champion_scores(runtime: Runtime, session: Session, confirmed: Sequence[Confirmed]) -> dict[int, float]:
    """Return the deployed version's score of each image, the one it had before it learnt from it where it did."""
    card = session.store.card(session.store.current)
    held_out = {int(task): float(score) for task, score in card.get("held_out", {}).items()}
    rest = [one for one in confirmed if one.example.task not in held_out]
    detector = runtime.published(session.store.id, session.store.current)
    found = detector.predict([one.picture for one in rest])
    return held_out | {one.example.task: detection.score for one, detection in zip(rest, found, strict=True)}


def _confirmed(
    runtime: Runtime,
    session: Session,
    detector: PatchwiseDetector,
    examples: Sequence[Example],
    known: Mapping[int, Picture],
) -> list[Confirmed]:
    """Return the images with a verdict that holds; those that cannot be read are left out, with a noted failure."""
    agreed = {example.task: example for example in examples if example.anomaly is not None}
    pictures: dict[int, Picture | None] = dict(known)
    tasks = session.client.tasks(session.store.id, sorted(agreed.keys() - known.keys()))
    read = scoring.gather(runtime, session, tasks, side=detector.side, progress=no_progress) if tasks else []
    pictures |= {task.id: picture for task, picture in zip(tasks, read, strict=True)}
    return [
        Confirmed(example, picture) for task, example in agreed.items() if (picture := pictures.get(task)) is not None
    ]


def _card(
    runtime: Runtime,
    material: Material,
    winner: Candidate,
    run: str,
) -> JSON:
    defects = [one.example for one in material.confirmed if one.example.anomaly]
    return {
        "detector": runtime.settings.detector,
        "backbone": runtime.settings.backbone,
        "image_size": runtime.settings.image_size,
        "seed": winner.detector.options.seed,
        "head_weight": runtime.settings.head_weight,
        "run": run,
        "kind": winner.kind,
        "mode": "confirmed normals" if all(material.flags) else "cold start",
        "images": len(material.tasks),
        "confirmed": sum(material.flags),
        "defects": len(defects),
        "defects_with_mask": sum(example.defect is not None for example in defects),
        "tasks": list(material.tasks),
        "annotations": sorted(one for item in material.confirmed for one in item.example.annotations),
        "held_out": {str(task): round(score, 6) for task, score in winner.scores.items()},
        "normals": [round(score, 6) for score in winner.detector.held_out],
        "left_out": winner.detector.left_out,
        "project_images": material.available,
        "threshold": winner.detector.threshold,
        "rule": winner.rule,
        "value": winner.value,
        "target_fpr": runtime.settings.target_fpr,
        "code": metadata.version("label-studio-anomaly"),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


def _ungated(session: Session, run: str) -> str:
    if not session.store.current:
        return "first version"
    return f"{run}: nothing is confirmed yet that versions could be compared on"


def _inside(example: Example, grid: Grids) -> Tensor | None:
    if example.defect is None:
        return None
    return inside_cells(example.defect, grid.shape).to(grid.device)


def _courteous(runtime: Runtime, progress: Progress) -> Progress:
    """Step aside, on a GPU, as long as images wait to be scored; on a CPU the operating system sees to it."""
    if runtime.device == "cpu":
        return progress

    def polite(fraction: float, stage: str) -> None:
        progress(fraction, stage)
        until = time.monotonic() + COURTESY_SECONDS
        while time.monotonic() < until:
            depth = runtime.queues.depth()
            if not depth["interactive"] + depth["score"]:
                return
            progress(fraction, "waiting: scoring goes first")
            time.sleep(0.2)

    return polite
