"""The feedback log says what Label Studio says, whatever was lost, repeated or torn on the way."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from anomaly_workers.client import Annotated, Client, Stamp
from anomaly_workers.errors import LabelStudioError, StoreError
from anomaly_workers.feedback import SIDE, Entry, Example, FeedbackLog, Judged
from anomaly_workers.labelstudio import encode, masks
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import JSON, Connection, Control, Controls, Detection, Region, Task

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "payloads/annotations.json").read_text())
SIZE = (48, 64)
ANN, BOB, CLEO = 1, 2, 3
Mask = NDArray[np.bool_]


def controls(tag: str = "BrushLabels") -> Controls:
    return Controls(
        image="image",
        value="image",
        choices=Control("Choices", "cls", "image", ("normal", "anomaly")),
        normal="normal",
        anomaly="anomaly",
        mask=Control(tag, "mask", "image", ("Defect",)),
        mask_label="Defect",
    )


WITHOUT_CHOICES = replace(controls(), choices=None, normal=None, anomaly=None)


@dataclass
class LabelStudio:
    """Label Studio's list of annotations in memory; every change takes a second of its clock."""

    now: datetime = datetime(2024, 1, 1, tzinfo=UTC)
    annotations_of: dict[int, dict[int, JSON]] = field(default_factory=dict)
    changed_at: dict[int, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failures: int = 0
    pause: float = 0.0
    last_id: int = 0

    def submit(self, task: int, result: Sequence[JSON], by: int = ANN, **fields: Any) -> int:
        self.last_id += 1
        at = self._touch(task)
        about = {"id": self.last_id, "completed_by": by, "created_at": at, "updated_at": at, "was_cancelled": False}
        self.annotations_of[task][self.last_id] = about | {"result": list(result)} | fields
        return self.last_id

    def change(self, annotation: int, **fields: Any) -> None:
        task = self._task_of(annotation)
        self.annotations_of[task][annotation] |= {"updated_at": self._touch(task)} | fields

    def delete(self, annotation: int) -> None:
        task = self._task_of(annotation)
        self._touch(task)
        del self.annotations_of[task][annotation]

    def delete_task(self, task: int) -> None:
        del self.annotations_of[task]

    def stamps(self) -> dict[int, str]:
        return {one: about["updated_at"] for found in self.annotations_of.values() for one, about in found.items()}

    def annotation_count(self, project: int) -> int:
        self.asked.append("count")
        return len(self.stamps())

    def annotation_stamps(self, project: int, *, since: str = "") -> dict[int, Stamp]:
        self.asked.append("recent stamps" if since else "all stamps")
        time.sleep(self.pause)
        return {
            one: Stamp(task, about["updated_at"])
            for task, found in self.annotations_of.items()
            if self.changed_at[task] > since
            for one, about in found.items()
        }

    def annotations(self, project: int, tasks: Sequence[int]) -> Iterator[Annotated]:
        self.asked.append("annotations")
        if self.failures:
            self.failures -= 1
            raise LabelStudioError("Label Studio does not answer.")
        for task in sorted(set(tasks) & self.annotations_of.keys()):
            yield Annotated(Task(task, {"image": f"/data/{task}.png"}), tuple(self.annotations_of[task].values()))

    def _task_of(self, annotation: int) -> int:
        return next(task for task, found in self.annotations_of.items() if annotation in found)

    def _touch(self, task: int) -> str:
        self.now += timedelta(seconds=1)
        self.changed_at[task] = self.now.isoformat().replace("+00:00", ".000000Z")
        self.annotations_of.setdefault(task, {})
        return self.changed_at[task]


@pytest.fixture
def label_studio() -> LabelStudio:
    return LabelStudio()


@pytest.fixture
def project(tmp_path: Path) -> ProjectStore:
    return Store(tmp_path).project(3)


@pytest.fixture
def log(project: ProjectStore) -> FeedbackLog:
    return FeedbackLog(project)


def disc(top: int, left: int, radius: int) -> Mask:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    found: Mask = (rows - top) ** 2 + (columns - left) ** 2 <= radius**2
    return found


LEFT, RIGHT = disc(24, 14, 8), disc(24, 48, 8)


def regions(*drawn: Mask, tag: str = "BrushLabels", size: tuple[int, int] = SIZE) -> list[JSON]:
    """Regions drawn by hand."""
    empty = Detection(0.9, 0.5, np.zeros(SIZE, np.float32), size)
    result = encode.prediction(1, empty, [Region(mask, 0.7) for mask in drawn], controls(tag), "drawn")["result"]
    return [{key: value for key, value in one.items() if key not in ("id", "score")} for one in result[1:]]


def choice(value: str) -> JSON:
    return {"from_name": "cls", "to_name": "image", "type": "choices", "value": {"choices": [value]}}


def predicted(project: ProjectStore, task: int, *found: Mask, score: float, name: str = "a") -> list[JSON]:
    """Deploy a version that predicted these regions; return its result as a browser submits it untouched."""
    with project.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(name.encode())
        version = project.publish(scratch, {"detector": "patchcore"})
    project.deploy(version, reason="test")
    detection = Detection(score, 0.5, np.zeros(SIZE, np.float32), SIZE)
    prediction = encode.prediction(task, detection, [Region(one, score) for one in found], controls(), version)
    about = {"anomaly_score": score, "threshold": 0.5}
    project.keep_record(version, task, prediction | {"anomaly": about}, detection.anomaly_map)
    return [region | {"origin": "prediction"} for region in prediction["result"]]


def overlap(one: Mask, other: Mask) -> float:
    return float((one & other).sum() / (one | other).sum())


def only(entries: Sequence[Entry]) -> Entry:
    (entry,) = entries
    return entry


# -- what one annotation says


@pytest.mark.parametrize("tag", ["BrushLabels", "BitmaskLabels", "PolygonLabels", "RectangleLabels"])
def test_a_defect_drawn_with_any_tool_is_kept(label_studio: LabelStudio, log: FeedbackLog, tag: str) -> None:
    drawn = np.zeros(SIZE, bool)
    drawn[10:30, 20:50] = True
    label_studio.submit(5, [choice("anomaly"), *regions(drawn, tag=tag)])
    entry = only(log.reconcile(label_studio, controls(tag)))
    assert (entry.task, entry.image, entry.kind) == (5, "/data/5.png", "submitted")
    assert (entry.anomaly, entry.annotator, entry.origin) == (True, ANN, "manual")
    assert overlap(log.mask(entry.defect), drawn) > 0.95


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_what_a_browser_sent_is_kept(label_studio: LabelStudio, log: FeedbackLog, name: str) -> None:
    label_studio.submit(5, [choice("anomaly"), *RECORDED[name]])
    entry = only(log.reconcile(label_studio, controls()))
    kept = log.mask(entry.defect)
    assert entry.origin in ("prediction", "prediction-changed", "manual")
    assert entry.unreadable == ()
    assert max(kept.shape) <= SIDE
    assert 0 < kept.mean() < 0.5


def test_soft_alpha_of_an_edited_brush_counts_above_a_half(label_studio: LabelStudio, log: FeedbackLog) -> None:
    (brush,) = (region for region in RECORDED["corrected_prediction"] if region["type"] == "brushlabels")
    alpha = masks.from_rle(brush["value"]["rle"], (512, 512))
    assert ((alpha > 0) & (alpha <= 127)).any()
    label_studio.submit(5, [choice("anomaly"), brush])
    entry = only(log.reconcile(label_studio, controls()))
    assert (log.mask(entry.defect) == (alpha > 127)).all()


def test_soft_alpha_of_a_bitmask_counts_above_a_half(label_studio: LabelStudio, log: FeedbackLog) -> None:
    (bitmask,) = RECORDED["corrected_bitmask"]
    alpha = masks.from_png(bitmask["value"]["imageDataURL"])
    assert ((alpha > 0) & (alpha <= 127)).any()
    label_studio.submit(5, [choice("anomaly"), bitmask])
    entry = only(log.reconcile(label_studio, controls()))
    assert (log.mask(entry.defect) == (alpha > 127)).all()


def test_a_kept_mask_is_bounded_and_has_the_images_aspect(label_studio: LabelStudio, log: FeedbackLog) -> None:
    label_studio.submit(5, [choice("anomaly"), *regions(LEFT, size=(3000, 4000))])
    entry = only(log.reconcile(label_studio, controls()))
    assert log.mask(entry.defect).shape == (384, 512)


def test_an_untouched_prediction_is_confirmed(
    label_studio: LabelStudio, log: FeedbackLog, project: ProjectStore
) -> None:
    label_studio.submit(5, predicted(project, 5, LEFT, RIGHT, score=0.9), parent_prediction=7, lead_time=4.5)
    entry = only(log.reconcile(label_studio, controls()))
    assert (entry.judged, entry.origin, entry.rejected) == ("confirmed", "prediction", "")
    assert (entry.version, entry.score) == (project.current, 0.9)
    assert (entry.parent_prediction, entry.lead_time) == (7, 4.5)
    assert overlap(log.mask(entry.defect), LEFT | RIGHT) > 0.95


def test_a_deleted_region_is_a_rejected_alarm_at_that_place(
    label_studio: LabelStudio, log: FeedbackLog, project: ProjectStore
) -> None:
    verdict, _left, right = predicted(project, 5, LEFT, RIGHT, score=0.9)
    label_studio.submit(5, [verdict, right])
    entry = only(log.reconcile(label_studio, controls()))
    assert entry.judged == "confirmed"
    assert overlap(log.mask(entry.defect), RIGHT) > 0.95
    assert overlap(log.mask(entry.rejected), LEFT) > 0.95


def test_a_region_drawn_anew_is_not_rejected(
    label_studio: LabelStudio, log: FeedbackLog, project: ProjectStore
) -> None:
    verdict, _left, right = predicted(project, 5, LEFT, RIGHT, score=0.9)
    label_studio.submit(5, [verdict, right, *regions(disc(24, 14, 11))])
    entry = only(log.reconcile(label_studio, controls()))
    assert (entry.rejected, entry.origin) == ("", "prediction-changed")


def test_who_did_not_begin_with_the_prediction_rejects_nothing(
    label_studio: LabelStudio, log: FeedbackLog, project: ProjectStore
) -> None:
    predicted(project, 5, LEFT, score=0.9)
    label_studio.submit(5, [choice("anomaly"), *regions(RIGHT)])
    entry = only(log.reconcile(label_studio, controls()))
    assert (entry.judged, entry.rejected, entry.version) == ("confirmed", "", project.current)


def test_normal_on_a_high_score_rejects_every_predicted_place(
    label_studio: LabelStudio, log: FeedbackLog, project: ProjectStore
) -> None:
    predicted(project, 5, LEFT, RIGHT, score=0.9)
    label_studio.submit(5, [choice("normal")])
    entry = only(log.reconcile(label_studio, controls()))
    assert (entry.judged, entry.anomaly, entry.defect) == ("false alarm", False, "")
    assert overlap(log.mask(entry.rejected), LEFT | RIGHT) > 0.95


@pytest.mark.parametrize(
    ("score", "said", "judged"),
    [
        (0.9, "anomaly", "confirmed"),
        (0.2, "anomaly", "missed"),
        (0.9, "normal", "false alarm"),
        (0.2, "normal", "agreed normal"),
        (0.9, "unsure", "unknown"),
    ],
)
def test_the_verdict_judges_the_prediction(
    label_studio: LabelStudio, log: FeedbackLog, project: ProjectStore, score: float, said: str, judged: Judged
) -> None:
    predicted(project, 5, score=score)
    label_studio.submit(5, [choice(said)])
    assert only(log.reconcile(label_studio, controls())).judged == judged


def test_a_verdict_without_a_prediction_of_ours_judges_nothing(label_studio: LabelStudio, log: FeedbackLog) -> None:
    label_studio.submit(5, [choice("normal")], parent_prediction=8)
    entry = only(log.reconcile(label_studio, controls()))
    assert (entry.judged, entry.version, entry.score, entry.anomaly) == ("unknown", "", None, False)


def test_the_version_is_the_one_whose_regions_were_submitted(
    label_studio: LabelStudio, log: FeedbackLog, project: ProjectStore
) -> None:
    submitted = predicted(project, 5, LEFT, score=0.9, name="old")
    seen = project.current
    predicted(project, 5, RIGHT, score=0.1, name="new")
    label_studio.submit(5, submitted)
    entry = only(log.reconcile(label_studio, controls()))
    assert (entry.version, entry.score, entry.judged) == (seen, 0.9, "confirmed")


@pytest.mark.parametrize(("drawn", "anomaly"), [([LEFT], True), ([], False)])
def test_without_choices_the_marks_decide(
    label_studio: LabelStudio, log: FeedbackLog, drawn: list[Mask], anomaly: bool
) -> None:
    label_studio.submit(5, regions(*drawn))
    assert only(log.reconcile(label_studio, WITHOUT_CHOICES)).anomaly is anomaly


def test_without_choices_and_masks_nothing_decides(label_studio: LabelStudio, log: FeedbackLog) -> None:
    label_studio.submit(5, [])
    number_alone = replace(WITHOUT_CHOICES, mask=None, mask_label=None)
    assert only(log.reconcile(label_studio, number_alone)).anomaly is None


def test_with_choices_the_marks_do_not_decide(label_studio: LabelStudio, log: FeedbackLog) -> None:
    label_studio.submit(5, regions(LEFT))
    label_studio.submit(6, [choice("normal"), *regions(LEFT)])
    unsaid, normal = log.reconcile(label_studio, controls())
    assert (unsaid.anomaly, normal.anomaly, normal.defect) == (None, False, "")


def test_a_mask_of_which_a_part_is_unreadable_is_not_known(label_studio: LabelStudio, log: FeedbackLog) -> None:
    (good,) = regions(LEFT)
    label_studio.submit(5, [choice("anomaly"), good, good | {"value": {"rle": [1, 2]}}])
    entry = only(log.reconcile(label_studio, controls()))
    assert (entry.anomaly, entry.defect, len(entry.unreadable)) == (True, "", 1)
    assert only_example(log).defect is None


def test_a_skip_says_nothing_until_it_is_submitted(label_studio: LabelStudio, log: FeedbackLog) -> None:
    annotation = label_studio.submit(5, [], was_cancelled=True)
    skipped = only(log.reconcile(label_studio, WITHOUT_CHOICES))
    assert (skipped.kind, skipped.anomaly) == ("skipped", None)
    assert log.examples() == []
    label_studio.change(annotation, was_cancelled=False, result=regions(LEFT))
    changed = only(log.reconcile(label_studio, WITHOUT_CHOICES))
    assert (changed.kind, changed.anomaly) == ("changed", True)
    assert len(log.examples()) == 1


# -- what happens to annotations


def test_a_change_replaces_what_was_said(label_studio: LabelStudio, log: FeedbackLog) -> None:
    annotation = label_studio.submit(5, [choice("normal")])
    log.reconcile(label_studio, controls())
    label_studio.change(annotation, result=[choice("anomaly")])
    changed = only(log.reconcile(label_studio, controls()))
    assert (changed.kind, changed.anomaly, changed.seq) == ("changed", True, 2)
    assert log.current() == {annotation: changed}
    assert [entry.anomaly for entry in log.entries()] == [False, True]


def test_a_deleted_annotation_is_noted_once(label_studio: LabelStudio, log: FeedbackLog) -> None:
    first = label_studio.submit(5, [choice("anomaly"), *regions(LEFT)])
    second = label_studio.submit(5, [choice("normal")], BOB)
    log.reconcile(label_studio, controls())
    label_studio.delete(first)
    deleted = only(log.reconcile(label_studio, controls()))
    assert (deleted.kind, deleted.annotation, deleted.anomaly) == ("deleted", first, True)
    assert log.reconcile(label_studio, controls()) == []
    assert set(log.current()) == {second}
    assert only_example(log).anomaly is False


def test_a_deleted_task_takes_its_annotations_with_it(label_studio: LabelStudio, log: FeedbackLog) -> None:
    for by in (ANN, BOB):
        label_studio.submit(5, [choice("anomaly")], by)
    label_studio.submit(6, [choice("normal")])
    log.reconcile(label_studio, controls())
    label_studio.delete_task(5)
    assert [entry.kind for entry in log.reconcile(label_studio, controls())] == ["deleted", "deleted"]
    assert [example.task for example in log.examples()] == [6]


def test_a_deletion_and_a_submission_at_once_are_both_noted(label_studio: LabelStudio, log: FeedbackLog) -> None:
    first = label_studio.submit(5, [choice("anomaly")])
    log.reconcile(label_studio, controls())
    label_studio.delete(first)
    label_studio.submit(6, [choice("normal")])
    assert sorted(entry.kind for entry in log.reconcile(label_studio, controls())) == ["deleted", "submitted"]


def test_the_same_listing_five_times_counts_once(label_studio: LabelStudio, log: FeedbackLog) -> None:
    for task in range(1, 8):
        label_studio.submit(task, [choice("normal")])
    found = [len(log.reconcile(label_studio, controls())) for _ in range(5)]
    assert found == [7, 0, 0, 0, 0]
    assert [entry.seq for entry in log.entries()] == list(range(1, 8))


def test_nothing_new_is_found_out_without_masks_and_without_the_whole_list(
    label_studio: LabelStudio, log: FeedbackLog
) -> None:
    label_studio.submit(5, [choice("normal")])
    log.reconcile(label_studio, controls())
    label_studio.asked.clear()
    assert log.reconcile(label_studio, controls()) == []
    assert label_studio.asked == ["recent stamps", "count"]


def test_an_old_annotation_that_changed_long_after_is_found(label_studio: LabelStudio, log: FeedbackLog) -> None:
    first = label_studio.submit(5, [choice("normal")])
    label_studio.now += timedelta(days=30)
    label_studio.submit(6, [choice("normal")])
    log.reconcile(label_studio, controls())
    label_studio.now += timedelta(days=30)
    label_studio.change(first, result=[choice("anomaly")])
    assert only(log.reconcile(label_studio, controls())).annotation == first


def test_a_clock_that_ran_ahead_hides_nothing(label_studio: LabelStudio, log: FeedbackLog) -> None:
    right = label_studio.now = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=30)
    first = label_studio.submit(5, [choice("normal")])
    label_studio.now += timedelta(days=300)
    label_studio.submit(6, [choice("normal")])
    log.reconcile(label_studio, controls())
    label_studio.now = right + timedelta(seconds=10)
    label_studio.change(first, result=[choice("anomaly")])
    assert only(log.reconcile(label_studio, controls())).annotation == first


def test_what_a_broken_connection_left_out_comes_with_the_next_round(
    label_studio: LabelStudio, log: FeedbackLog
) -> None:
    label_studio.submit(5, [choice("normal")])
    label_studio.failures = 1
    with pytest.raises(LabelStudioError):
        log.reconcile(label_studio, controls())
    assert len(log.reconcile(label_studio, controls())) == 1


# -- what annotators say together


def only_example(log: FeedbackLog) -> Example:
    (example,) = log.examples()
    return example


def test_the_majority_decides(label_studio: LabelStudio, log: FeedbackLog) -> None:
    ids = [label_studio.submit(5, [choice(said)], by) for by, said in enumerate(("anomaly", "normal", "anomaly"), 1)]
    log.reconcile(label_studio, controls())
    example = only_example(log)
    assert (example.anomaly, example.annotators, example.annotations) == (True, 3, tuple(ids))
    assert (example.defect, example.rejected) == (None, None)
    assert (example.image, example.first_at) == ("/data/5.png", "2024-01-01T00:00:01.000000Z")


@pytest.mark.parametrize("said", [("anomaly", "normal"), ("unsure", "unsure")])
def test_a_tie_or_no_verdict_is_undecided(
    label_studio: LabelStudio, log: FeedbackLog, said: tuple[str, str], project: ProjectStore
) -> None:
    predicted(project, 5, RIGHT, score=0.9)
    for by, word in zip((ANN, BOB), said, strict=True):
        label_studio.submit(5, [choice(word), *regions(LEFT)], by)
    log.reconcile(label_studio, controls())
    example = only_example(log)
    assert (example.anomaly, example.defect, example.rejected) == (None, None, None)


def test_each_annotator_counts_once_with_the_newest_annotation(label_studio: LabelStudio, log: FeedbackLog) -> None:
    first = label_studio.submit(5, [choice("normal")], ANN)
    changed, older = (label_studio.submit(5, [choice("anomaly")], BOB) for _ in range(2))
    label_studio.change(changed, result=[choice("normal")])
    log.reconcile(label_studio, controls())
    example = only_example(log)
    assert older in log.current()
    assert (example.anomaly, example.annotators, example.annotations) == (False, 2, (first, changed))


def test_the_defect_is_where_most_of_those_who_drew_saw_it(label_studio: LabelStudio, log: FeedbackLog) -> None:
    for by, drawn in ((ANN, [LEFT]), (BOB, [LEFT, RIGHT]), (CLEO, [])):
        label_studio.submit(5, [choice("anomaly"), *regions(*drawn)], by)
    log.reconcile(label_studio, controls())
    defect = only_example(log).defect
    assert defect is not None
    assert overlap(defect, LEFT) > 0.95


def test_masks_of_different_sizes_are_merged(label_studio: LabelStudio, log: FeedbackLog) -> None:
    for by, size in ((ANN, SIZE), (BOB, (96, 128))):
        label_studio.submit(5, [choice("anomaly"), *regions(LEFT, size=size)], by)
    log.reconcile(label_studio, controls())
    defect = only_example(log).defect
    assert defect is not None
    assert overlap(masks.enlarged(defect, SIZE), LEFT) > 0.9


def test_a_place_is_rejected_by_the_majority(
    label_studio: LabelStudio, log: FeedbackLog, project: ProjectStore
) -> None:
    verdict, left, _right = predicted(project, 5, LEFT, RIGHT, score=0.9)
    label_studio.submit(5, [verdict, left], ANN)
    label_studio.submit(5, [choice("normal")], BOB)
    label_studio.submit(5, [verdict, left], CLEO)
    log.reconcile(label_studio, controls())
    example = only_example(log)
    assert example.judged == ("confirmed", "false alarm", "confirmed")
    assert (example.version, example.score) == (project.current, 0.9)
    assert example.defect is not None
    assert overlap(example.defect, LEFT) > 0.95
    assert example.rejected is not None
    assert overlap(example.rejected, RIGHT) > 0.95


def test_a_place_that_only_a_few_rejected_is_not_rejected(
    label_studio: LabelStudio, log: FeedbackLog, project: ProjectStore
) -> None:
    verdict, left, right = predicted(project, 5, LEFT, RIGHT, score=0.9)
    label_studio.submit(5, [verdict, left], ANN)
    for by in (BOB, CLEO):
        label_studio.submit(5, [verdict, left, right], by)
    log.reconcile(label_studio, controls())
    assert only_example(log).rejected is None


# -- files


def test_a_torn_last_line_is_forgotten_and_written_again(label_studio: LabelStudio, log: FeedbackLog) -> None:
    for task in (5, 6):
        label_studio.submit(task, [choice("normal")])
    first, second = log.reconcile(label_studio, controls())
    tear(log, -20)
    assert log.entries() == [first]
    again = only(log.reconcile(label_studio, controls()))
    assert replace(again, at=second.at) == second
    assert log.entries() == [first, again]


@pytest.mark.parametrize("left", [1, -1])
def test_a_log_torn_anywhere_is_whole_again(label_studio: LabelStudio, log: FeedbackLog, left: int) -> None:
    label_studio.submit(5, [choice("normal")])
    log.reconcile(label_studio, controls())
    tear(log, left)
    log.reconcile(label_studio, controls())
    assert set(log.current()) == {1}


def tear(log: FeedbackLog, left: int) -> None:
    path = log._path
    path.write_bytes(path.read_bytes()[:left])


def test_a_damaged_line_is_named(label_studio: LabelStudio, log: FeedbackLog) -> None:
    label_studio.submit(5, [choice("normal")])
    log.reconcile(label_studio, controls())
    log._path.write_bytes(log._path.read_bytes() + b"{}\n")
    with pytest.raises(StoreError, match=r"log\.jsonl, line 2, cannot be read.*remove it"):
        log.entries()


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "another"])
def test_a_damaged_mask_is_named(label_studio: LabelStudio, log: FeedbackLog, content: bytes | str | None) -> None:
    label_studio.submit(5, [choice("anomaly"), *regions(LEFT)])
    entry = only(log.reconcile(label_studio, controls()))
    path = log._mask_path(entry.defect)
    if content == "another":
        Image.new("1", (8, 8)).save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(StoreError, match=rf"{entry.defect}\.png .*Restore .*feedback from a backup, or remove it"):
        log.examples()


def test_equal_masks_are_kept_once(label_studio: LabelStudio, log: FeedbackLog) -> None:
    for task in (5, 6):
        label_studio.submit(task, [choice("anomaly"), *regions(LEFT)])
    first, second = log.reconcile(label_studio, controls())
    assert first.defect == second.defect
    assert [path.name for path in log._mask_path("").parent.iterdir()] == [f"{first.defect}.png"]


def test_two_processes_append_once(tmp_path: Path, label_studio: LabelStudio) -> None:
    for task in range(1, 31):
        label_studio.submit(task, [choice("anomaly"), *regions(LEFT)])
    label_studio.pause = 0.05
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(2)
    both = [spawn.Process(target=reconcile_often, args=(tmp_path, label_studio, start)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    entries = FeedbackLog(Store(tmp_path).project(3)).entries()
    assert [entry.seq for entry in entries] == list(range(1, 31))
    assert len({entry.annotation for entry in entries}) == 30


def reconcile_often(folder: Path, label_studio: LabelStudio, start: Barrier) -> None:
    log = FeedbackLog(Store(folder).project(3))
    start.wait(60)
    for _ in range(3):
        log.reconcile(label_studio, controls())


# -- whatever happens, in whatever order


def happen(label_studio: LabelStudio, chance: random.Random) -> None:
    """Let one thing happen that annotators do."""
    known = list(label_studio.stamps())
    said = [choice(chance.choice(["normal", "anomaly", "unsure"])), *chance.choice([[], regions(LEFT)])]
    what = chance.random()
    if what < 0.5 or not known:
        label_studio.submit(chance.randint(1, 12), said, chance.randint(1, 3), was_cancelled=chance.random() < 0.2)
    elif what < 0.75:
        label_studio.change(chance.choice(known), result=said, was_cancelled=chance.random() < 0.2)
    elif what < 0.95:
        label_studio.delete(chance.choice(known))
    else:
        label_studio.delete_task(chance.choice(list(label_studio.annotations_of)))
    label_studio.now += timedelta(seconds=chance.choice([0, 1, 300]))


@pytest.mark.parametrize("seed", range(20))
def test_the_log_replays_to_label_studios_list(label_studio: LabelStudio, log: FeedbackLog, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        happen(label_studio, chance)
        if chance.random() < 0.3:
            log.reconcile(label_studio, controls())
            assert replayed(log) == label_studio.stamps()
    log.reconcile(label_studio, controls())
    assert replayed(log) == label_studio.stamps()
    assert log.reconcile(label_studio, controls()) == []


def replayed(log: FeedbackLog) -> dict[int, str]:
    return {annotation: entry.updated_at for annotation, entry in log.current().items()}


@pytest.mark.parametrize("seed", range(5))
def test_when_the_log_was_reconciled_does_not_matter(label_studio: LabelStudio, tmp_path: Path, seed: int) -> None:
    often, once = (FeedbackLog(Store(tmp_path / name).project(3)) for name in ("often", "once"))
    chance = random.Random(seed)
    for _ in range(30):
        happen(label_studio, chance)
        often.reconcile(label_studio, controls())
    once.reconcile(label_studio, controls())
    assert said(often) == said(once)
    assert [plain(example) for example in often.examples()] == [plain(example) for example in once.examples()]


def said(log: FeedbackLog) -> dict[int, Entry]:
    """What the log knows of each annotation, without when and as what it was learnt of."""
    plainly = {"changed": "submitted"}
    return {
        one: replace(entry, seq=0, at="", kind=plainly.get(entry.kind, entry.kind))  # type: ignore[arg-type]
        for one, entry in log.current().items()
    }


def plain(example: Example) -> tuple[Any, ...]:
    drawn = [None if mask is None else mask.tolist() for mask in (example.defect, example.rejected)]
    return example.task, example.anomaly, example.annotations, example.judged, example.first_at, drawn


# -- what Label Studio is asked


def test_listings_include_skips_and_leave_masks_behind() -> None:
    asked: list[httpx.URL] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        if request.url.path == "/api/projects/3/":
            return httpx.Response(200, json={"total_annotations_number": 2, "skipped_annotations_number": 1})
        skipped = {"id": 9, "updated_at": "2024-01-01T00:00:01Z", "was_cancelled": True}
        return httpx.Response(200, json={"tasks": [{"id": 5, "data": {}, "annotations": [skipped]}]})

    transport = httpx.MockTransport(answer)
    with Client(Connection("http://ls", 3, "legacy"), transport=transport) as client:
        assert client.annotation_count(3) == 3
        assert list(client.annotations(3, [])) == []
        assert len(asked) == 1
        assert client.annotation_stamps(3, since="2024-01-01T00:00:00Z") == {9: Stamp(5, "2024-01-01T00:00:01Z")}
        assert [url.params["include"] for url in asked[1:]] == ["id,annotations,updated_at"] * 2
        assert [len(item.annotations) for item in client.annotations(3, [5])] == [1]
