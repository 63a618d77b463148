"""What people decide for a project."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomaly_workers import policy
from anomaly_workers.errors import ConfigError
from anomaly_workers.store import ProjectStore, Store


@pytest.fixture
def project(tmp_path: Path) -> ProjectStore:
    return Store(tmp_path).project(3)


def test_a_project_nobody_decided_for_has_the_defaults(project: ProjectStore) -> None:
    assert policy.read(project) == policy.Policy(strategy="mix", rule="fpr", value=0.0, annotators=1)


def test_one_choice_leaves_the_others(project: ProjectStore) -> None:
    policy.change(project, {"rule": "number", "value": 0.7})
    policy.change(project, {"strategy": "margin"})

    assert policy.read(project) == policy.Policy(strategy="margin", rule="number", value=0.7)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "fpr", "value": 0.5},
        {"rule": "number", "value": 0.0},
        {"rule": "number", "value": 1.5},
        {"rule": "guess"},
        {"annotators": 0},
        {"annotators": 11},
    ],
)
def test_a_choice_that_makes_no_sense_changes_nothing(project: ProjectStore, changes: dict[str, object]) -> None:
    policy.change(project, {"rule": "number", "value": 0.7})

    with pytest.raises(ConfigError):
        policy.change(project, changes)

    assert policy.read(project).value == 0.7


def test_a_choice_of_a_newer_release_is_passed_over(project: ProjectStore) -> None:
    project.keep_document(policy.NAME, {"strategy": "random", "invented": True})

    assert policy.read(project).strategy == "random"
