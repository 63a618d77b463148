"""What this machine is, as far as processes on it need to know: its identity, its processes, its GPUs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path


def identity() -> str:
    """Return a name under which process ids are comparable.

    A host name will not do: containers share one and have process ids of their own, or restart under the same one.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()  # not Linux, so no containers


def lives(pid: int) -> bool:
    """Tell whether a process with this id exists here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def gpus(environ: Mapping[str, str]) -> list[str]:
    """Return the CUDA devices as CUDA_VISIBLE_DEVICES names them, without loading CUDA into this process."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        named = [device.strip() for device in visible.split(",")]
        return [device for device in named if device and device != "-1"]
    return [str(number) for number in range(_count())]


def _count() -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
