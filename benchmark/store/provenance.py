"""On what a number was measured: code, versions, device, threads."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

from dfqbench.files import PACKAGE
from dfqbench.store.environment import GIT, environment_without

PACKAGES = ("dfqbench", "torch", "torchvision", "timm", "pytorchcv", "numpy")


@functools.cache
def git_revision() -> str | None:
    """The checkout's commit, with '+' where files differ from it; None for an installed package."""
    here = PACKAGE.parent
    if not (here / ".git").exists():
        return None
    environment = environment_without(GIT)  # a git hook's GIT_DIR names another checkout
    try:

        def git(*words: str) -> str:
            answer = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=20, env=environment)
            return answer.stdout.strip()

        changed = git("status", "--porcelain", "--untracked-files=no", "--", "benchmark", "methods", "pyproject.toml")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """A GPU's own name; for a CPU its vendor's name for it, and whether it has AMX, with which bf16 is another matter."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    said = {key.strip(): value.strip() for key, _, value in lines}
    name = said.get("model name") or platform.processor() or platform.machine()
    return f"{name} with AMX" if "amx_bf16" in said.get("flags", "").split() else name


@functools.cache
def driver_version() -> str | None:
    """Of NVIDIA's kernel module; None where the system does not say."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d[\d.]*)", said, re.MULTILINE)
    return found[1] if found else None


def _of_gpu() -> dict[str, Any]:
    """Whose kernels ran, and whether all of them give the same bits every time."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return {"driver": driver_version(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "deterministic": strict}


def provenance(device: torch.device) -> dict[str, Any]:
    """A record of JSON values."""
    return {
        "git": git_revision(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "device": device.type,
        "device_name": device_name(device),
        **(_of_gpu() if device.type == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "host": fingerprint_of_host(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def fingerprint_of_host() -> str:
    """Tells machines apart without naming them."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
