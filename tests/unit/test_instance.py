"""What a Label Studio of our own inherits, and how a failed start explains itself."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anomaly_workers import instance
from anomaly_workers.errors import LabelStudioError


def command(folder: Path, body: str) -> Path:
    path = folder / "venv/bin/label-studio"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def begin(executable: Path, folder: Path, port: int, seconds: float = 20.0) -> instance.Instance:
    return instance.start(
        executable, folder=folder, port=port, email="a@example.com", password="long-enough", seconds=seconds
    )


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_start_that_ends_shows_the_end_of_the_log(tmp_path: Path, port: int) -> None:
    with pytest.raises(LabelStudioError, match="ended with code 3(.|\n)*no such table"):
        begin(command(tmp_path, "echo 'no such table'; exit 3"), tmp_path / "data", port)


def test_a_start_that_takes_too_long_leaves_nothing_running(tmp_path: Path, port: int) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(LabelStudioError, match="did not start in time"):
        begin(command(tmp_path, f"sleep 60 & echo $! > {pid}; wait"), tmp_path / "data", port, seconds=1.5)
    deadline = time.monotonic() + 5
    while _is_running(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(int(pid.read_text()))


def test_a_port_in_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(LabelStudioError, match=f"Port {taken}"):
            begin(command(tmp_path, "exit 0"), tmp_path / "data", taken)
    assert not (tmp_path / "data").exists()


def test_an_absent_command_is_told(tmp_path: Path, port: int) -> None:
    with pytest.raises(LabelStudioError, match="Install label-studio"):
        begin(tmp_path / "none", tmp_path / "data", port)


def test_label_studio_inherits_no_names_of_others(tmp_path: Path) -> None:
    foreign = {"USERNAME": "desktop", "HOST": "x", "LABEL_STUDIO_PORT": "1", "ANOMALY_PORT": "2", "PATH": "/bin"}
    found = instance._environment(foreign, "http://localhost:1", tmp_path)
    assert found["PATH"] == "/bin"
    assert found["LABEL_STUDIO_HOST"] == "http://localhost:1"
    assert not {"USERNAME", "HOST", "LABEL_STUDIO_PORT", "ANOMALY_PORT"} & set(found)
    assert found["COLLECT_ANALYTICS"] == "false"


def test_only_this_machine_is_open_to_it() -> None:
    assert "127.0.0.0/8" not in instance.OPEN_TO_THIS_MACHINE["USER_ADDITIONAL_BANNED_SUBNETS"]
    assert "169.254.0.0/16" in instance.OPEN_TO_THIS_MACHINE["USER_ADDITIONAL_BANNED_SUBNETS"]


def test_stopping_twice_is_fine(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    one = instance.Instance("http://x", "e", "p", "t", tmp_path, 0.0, process)
    one.stop()
    one.stop()
    assert process.poll() is not None


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
