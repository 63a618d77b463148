"""`ls-anomaly up`: all parts start together, and none outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from observe import marked, until

from anomaly_workers.settings import Settings, to_environ
from anomaly_workers.stack import Stack, answers


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def together(settings: Settings) -> Settings:
    return settings.model_copy(update={"port": free_port(), "workers": 1})


def test_a_killed_up_leaves_neither_worker_nor_front_end(together: Settings, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{together.port}/health"
    command = [str(Path(sys.executable).with_name("ls-anomaly")), "up"]
    up = subprocess.Popen(command, env=os.environ | to_environ(together), stdout=subprocess.DEVNULL)
    try:
        until(lambda: answers(address))
        assert len(marked(tmp_path)) > 2, "up, its front end and its workers"
    finally:
        up.kill()
        up.wait()
    until(lambda: not marked(tmp_path))
    assert not answers(address)


def test_a_front_end_that_hangs_is_killed_in_the_end(
    together: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("anomaly_workers.stack.STOP_SECONDS", 1.0)
    running = Stack(together)
    try:
        running.start()
        front = running._front
        assert front is not None
        os.killpg(front.pid, signal.SIGSTOP)
    finally:
        running.stop()
    assert front.returncode == -signal.SIGKILL
    assert "did not stop" in caplog.text
    until(lambda: not marked(tmp_path))
