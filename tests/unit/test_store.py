"""The store keeps what it is given, and a reader never sees half a file."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from pathlib import Path

import numpy as np
import pytest

from anomaly_workers.errors import StoreError
from anomaly_workers.store import PERMANENT, Failure, ProjectStore, Store, image_key
from anomaly_workers.types import Connection


@pytest.fixture
def project(tmp_path: Path) -> ProjectStore:
    project = Store(tmp_path).project(3)
    project.connect(Connection("http://label-studio", 3, "secret"))
    return project


def publish(project: ProjectStore, content: bytes = b"weights") -> str:
    with project.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(content)
        return project.publish(scratch, {"detector": "patchcore"})


def test_a_connection_is_readable_by_its_owner_alone(project: ProjectStore) -> None:
    assert project.connection().token == "secret"
    assert (project.folder / "connection.json").stat().st_mode & 0o077 == 0
    assert "secret" not in repr(project.connection())


def test_a_heatmap_belongs_to_whoever_has_its_token(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.owns_heatmap(1, store.heatmap_token(1))
    for other in (store.heatmap_token(2), "", "é", "\ud800"):
        assert not store.owns_heatmap(1, other)


def test_deleted_tasks_are_remembered(project: ProjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.deleted == frozenset()
    project.keep_deleted([3, 1])
    project.keep_deleted([2, 3])
    assert project.deleted == {1, 2, 3}
    monkeypatch.setattr("anomaly_workers.store.MOST_DELETED", 2)
    project.keep_deleted([4])
    assert project.deleted == {3, 4}, "the newest"


def test_an_unconnected_project_says_how_to_connect(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="ls-anomaly connect --project 9"):
        Store(tmp_path).project(9).connection()


def test_the_first_version_is_deployed_and_the_next_is_rolled_out(project: ProjectStore) -> None:
    first, second = publish(project, b"a"), publish(project, b"b")
    project.roll_out(first)
    project.roll_out(second)
    assert (project.current, project.rollout, project.target) == (first, second, second)
    project.deploy(second, reason="all open tasks scored")
    assert (project.current, project.rollout) == (second, "")
    assert [entry["to"] for entry in project.history()] == [first, second]


def test_version_numbers_go_up_and_names_carry_the_hash(project: ProjectStore) -> None:
    first, second = publish(project, b"a"), publish(project, b"a")
    assert first.startswith("patchcore-v1-")
    assert second.startswith("patchcore-v2-")
    assert first.rsplit("-", 1)[1] == second.rsplit("-", 1)[1]


def test_an_abandoned_version_leaves_nothing(project: ProjectStore) -> None:
    with pytest.raises(RuntimeError), project.new_version() as scratch:
        (scratch / "half").write_bytes(b"")
        raise RuntimeError
    assert list((project.folder / "versions").iterdir()) == []


def test_a_version_name_cannot_leave_the_store(project: ProjectStore) -> None:
    with pytest.raises(StoreError, match="not a version name"):
        project.record("../../etc", 1)


def test_a_map_survives_within_a_sixteenth_bit(project: ProjectStore) -> None:
    anomaly_map = np.random.default_rng(0).random((7, 11), dtype=np.float32)
    project.keep_record("patchcore-v1-a", 12345, {"score": 0.5}, anomaly_map)
    stored = project.anomaly_map("patchcore-v1-a", 12345)
    assert stored is not None
    np.testing.assert_allclose(stored, anomaly_map, atol=1 / 65535)
    assert project.record("patchcore-v1-a", 12345) == {"score": 0.5}
    assert project.record("patchcore-v1-a", 1) is None


def test_pushed_marks_come_and_go(project: ProjectStore) -> None:
    project.keep_record("v", 1, {}, np.zeros((2, 2), np.float32))
    project.mark_pushed("v", {1: True})
    assert project.is_pushed("v", 1)
    project.mark_pushed("v", {1: False})
    assert not project.is_pushed("v", 1)


def test_a_broken_image_is_not_tried_again_until_it_changes(project: ProjectStore) -> None:
    project.keep_failure(5, "truncated\nfile", "/data/upload/3/a.jpg", permanent=True)
    failure = project.failure(5)
    assert failure is not None
    assert failure.reason == "truncated file"
    assert failure.attempts == PERMANENT
    assert not failure.is_due("/data/upload/3/a.jpg", failure.at + 1e9)
    assert failure.is_due("/data/upload/3/b.jpg", failure.at)


def test_a_passing_fault_is_tried_again_with_growing_pauses() -> None:
    early, late = Failure(1, "timeout", "a", 1, at=0.0), Failure(1, "timeout", "a", 4, at=0.0)
    assert early.is_due("a", now=60.0)
    assert not late.is_due("a", now=60.0)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("/data/upload/3/ab-x.png", "http://localhost:8080/data/upload/3/ab-x.png"),
        ("/data/upload/3/ab-x.png", "http://host/prefix/data/upload/3/ab-x.png"),
        ("/data/local-files/?d=set1/im.png", "http://host/data/local-files/?d=set1/im.png"),
        ("s3://imgs/a b.png", "/tasks/83/resolve/?fileuri=" + urlsafe_b64encode(b"s3://imgs/a b.png").decode()),
        (
            "s3://imgs/a.png",
            "http://h/tasks/83/resolve/?fileuri=" + urlsafe_b64encode(b"s3://imgs/a.png").decode().rstrip("="),
        ),
        ("https://cdn.example/x.png?v=2", "https://cdn.example/x.png?v=2"),
    ],
)
def test_an_image_has_one_key_however_it_is_written(raw: str, shown: str) -> None:
    assert image_key(raw) == image_key(shown)


def test_secrets_are_made_once(tmp_path: Path) -> None:
    first = Store(tmp_path).secret("password")
    assert Store(tmp_path).secret("password") == first
    assert len(first) >= 24
    assert (tmp_path / "secrets" / "password").stat().st_mode & 0o077 == 0


def test_heatmap_addresses_differ_by_project(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.owns_heatmap(1, store.heatmap_token(1))
    assert not store.owns_heatmap(2, store.heatmap_token(1))
