"""On what the numbers were measured."""

import datetime
import importlib
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision

from .version import __version__


def describe_environment(device: str, peers: Sequence[str]) -> dict[str, Any]:
    """Hardware, versions, commit, date and load of this machine."""
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "fcos_d2": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
    }
    if "adelaidet" in peers:
        adet = importlib.import_module("adet")
        result["adelaidet"] = getattr(adet, "__version__", "unknown")
    if device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
        result["cuda"] = torch.version.cuda
        result["cudnn"] = torch.backends.cudnn.version()
    return result


def _cpu_model() -> str:
    """The name of the CPU, which Python's platform module does not know on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, with a + for changes since; None outside of one."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder:
            return None  # installed somewhere inside of another project
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None
