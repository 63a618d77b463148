"""What people decide for one project: the review order, the operating point, for how many annotators."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import encode
from anomaly_workers.store import ProjectStore
from anomaly_workers.types import JSON

Rule = Literal["fpr", "f1", "number"]
"""How the operating point is found: from the normals' scores, from confirmed images, or given."""

NAME = "policy"
MOST_ANNOTATORS = encode.MOST_SHARES


@dataclass(frozen=True, slots=True)
class Policy:
    """A project's choices; the defaults are what a project has that nobody decided anything for.

    Attributes:
        strategy: name of the query strategy, "mix" by default.
        rule: how the threshold is found.
        value: for "fpr" the target false-positive rate in (0, 0.5), 0 meaning the setting's; for "number" the
            threshold itself in (0, 1) on the calibrated scale; unused for "f1".
        annotators: how many people review at once, each with a tab of their own.
    """

    strategy: str = "mix"
    rule: Rule = "fpr"
    value: float = 0.0
    annotators: int = 1

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ConfigError(f"{self.rule!r} is no rule for a threshold. Use one of: {', '.join(get_args(Rule))}.")
        if self.rule == "fpr" and not 0 <= self.value < 0.5:
            raise ConfigError(f"A false-positive rate of {self.value} makes no sense. Give one between 0 and 0.5.")
        if self.rule == "number" and not 0 < self.value < 1:
            raise ConfigError(f"A threshold of {self.value} is off the scale. Give one between 0 and 1.")
        if not 1 <= self.annotators <= MOST_ANNOTATORS:
            raise ConfigError(f"{self.annotators} annotators are not possible. Give 1 to {MOST_ANNOTATORS}.")


def read(store: ProjectStore) -> Policy:
    """Return a project's policy."""
    stored = store.document(NAME)
    known = {field.name for field in fields(Policy)}
    return Policy(**{name: value for name, value in stored.items() if name in known})


def change(store: ProjectStore, changes: JSON) -> Policy:
    """Change some of a project's choices; return the policy that holds now.

    Raises:
        ConfigError: a choice that makes no sense; nothing is changed then.
    """
    policy = replace(read(store), **changes)
    store.keep_document(NAME, asdict(policy))
    return policy
