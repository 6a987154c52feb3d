"""What this machine is and has, as plain data. Every absence is an answer, never an error."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kexue_kernels import _extension, backends, launchers

GPU_RUNS = Path(__file__).with_name("gpu_runs.json")


def versions() -> dict[str, str | None]:
    names = {"kexue-kernels": "kexue_kernels", "torch": "torch", "triton": "triton"}
    names |= {"numpy": "numpy"}
    return {"python": platform.python_version()} | {
        name: _version(name, module) for name, module in names.items()
    }


def _version(distribution: str, module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    loaded = sys.modules.get(module)
    if found := getattr(loaded, "__version__", None):
        return str(found)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def cpu() -> dict[str, Any]:
    extension = _extension.load().module
    return {
        "model": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability()
        if extension is None
        else extension.cpu_isa(),
        "isa_of": "PyTorch" if extension is None else "the C++ extension",
    }


def _cpu_model() -> str:
    """As the operating system words it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def cuda() -> dict[str, Any]:
    """Devices as PyTorch sees them, and the driver as it presents itself."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "runtime": torch.version.cuda,
        "driver": _driver(),
        "devices": [_device(index) for index in range(count)],
    }


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
    }


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.split()
    return lines[0] if result.returncode == 0 and lines else None


def extension() -> dict[str, Any]:
    """Whether the compiled module is there, and whether it serves (a stale one does not)."""
    spec = importlib.util.find_spec("kexue_kernels._C")
    loaded = _extension.load()
    return {
        "file": spec.origin if spec else None,
        "usable": loaded.module is not None,
        "reason": loaded.reason,
        "build": dict(getattr(loaded.module, "build_info", {})),
    }


def backend_states() -> dict[str, dict[str, Any]]:
    return {name: status._asdict() for name, status in backends().items()}


def gpu_runs(ops: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """For each GPU kernel of `ops` (family -> names): the devices that ran it correctly."""
    recorded: list[dict[str, str]] = json.loads(GPU_RUNS.read_text())
    return [
        {
            "family": family,
            "op": op,
            "backend": backend,
            "off_by_default": (backend, op) in launchers.OFF_BY_DEFAULT,
            "devices": [
                f"{run['device']} ({run['date']})"
                for run in recorded
                if (run["op"], run["backend"]) == (op, backend)
            ],
        }
        for family, names in ops.items()
        for op in names
        for backend in ("triton", "cuda")
        if launchers.implements(family, op, backend)
    ]
