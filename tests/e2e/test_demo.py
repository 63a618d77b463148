"""`ls-anomaly demo`, as make calls it, on a plain folder nobody labelled."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from product import washers

from conftest import label_studio_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plain = tmp_path / "plain"
    plain.mkdir()
    for name, content in [*washers(14, seed=2), *washers(2, defect="chip", seed=3)]:
        (plain / name).write_bytes(content)
    return plain


def demo(tmp_path: Path, images: Path, *options: str) -> list[str]:
    command = [str(Path(sys.executable).with_name("ls-anomaly")), "demo", "--label-studio", str(label_studio_command())]
    return [*command, "--images", str(images), "--folder", str(tmp_path / "demo"), *options]


def mentions(text: str) -> list[str]:
    """Processes whose command line or environment names the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            seen = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            if text.encode() in seen and "pytest" not in (entry / "cmdline").read_text():
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.timeout(600)
def test_the_check_passes_on_a_plain_folder_and_leaves_nothing_running(tmp_path: Path, folder: Path) -> None:
    done = subprocess.run(demo(tmp_path, folder, "--check"), capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exactly one prediction of the deployed version" in done.stdout
    assert mentions(str(tmp_path / "demo")) == []


@pytest.mark.timeout(600)
def test_the_check_fails_with_the_reason_when_an_image_is_broken(tmp_path: Path, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"this is not a picture")
    done = subprocess.run(demo(tmp_path, folder, "--check"), capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 1
    assert "Not a readable image" in done.stdout


@pytest.mark.timeout(600)
def test_ctrl_c_in_the_middle_leaves_nothing_running(tmp_path: Path, folder: Path) -> None:
    with subprocess.Popen(demo(tmp_path, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        time.sleep(20)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=300)
    assert mentions(str(tmp_path / "demo")) == []


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = subprocess.run(demo(tmp_path, tmp_path / "empty"), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "holds no image" in done.stderr
    assert "Traceback" not in done.stderr
