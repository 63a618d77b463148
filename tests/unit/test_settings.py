"""Settings come from ANOMALY_* variables, and a mistake names the variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomaly_workers.errors import ConfigError
from anomaly_workers.settings import backend_url, load_settings, public_url, to_environ


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="ANOMALY_PROT is not a setting"):
        load_settings({"ANOMALY_PROT": "9090"})


def test_a_value_that_does_not_fit_names_its_variable() -> None:
    with pytest.raises(ConfigError, match="ANOMALY_PORT.*'ninety'"):
        load_settings({"ANOMALY_PORT": "ninety"})


def test_an_empty_variable_means_the_default() -> None:
    assert load_settings({"ANOMALY_PORT": ""}).port == 9090


def test_other_programs_variables_are_ignored() -> None:
    assert load_settings({"PATH": "/bin", "ANOMALYST": "x"}) == load_settings({})


def test_secrets_are_masked() -> None:
    settings = load_settings({"ANOMALY_PASSWORD": "hunter2", "ANOMALY_LABEL_STUDIO_TOKEN": "ey.secret"})
    assert "hunter2" not in repr(settings)
    assert "secret" not in repr(settings)


def test_a_child_process_gets_the_same_settings(tmp_path: Path) -> None:
    settings = load_settings({"ANOMALY_PASSWORD": "hunter2", "ANOMALY_WORKERS": "2"}, data_dir=tmp_path)
    assert load_settings(to_environ(settings)) == settings


def test_label_studio_may_see_another_address_than_the_browser() -> None:
    settings = load_settings({"ANOMALY_PUBLIC_URL": "https://x.example/", "ANOMALY_BACKEND_URL": "http://web:9090/"})
    assert public_url(settings) == "https://x.example"
    assert backend_url(settings) == "http://web:9090"
    assert backend_url(load_settings({})) == "http://localhost:9090"
