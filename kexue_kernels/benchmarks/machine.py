"""Where a measurement was taken: device, processor, versions."""

import datetime
import importlib.metadata
import os
import pathlib
import platform

import torch

import kexue_kernels as kk

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "mambapy", "accelerated-scan", "fla-core"),
    *("faiss-cpu", "fastkmeans", "flash-kmeans", "vector-quantize-pytorch", "torch-structured"),
)


def device(chosen: torch.device) -> dict[str, object]:
    found: dict[str, object] = {
        "device": chosen.type,
        "name": cpu_model(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        found["name"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "kexue_kernels": kk.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def backends() -> dict[str, str]:
    return {
        name: status.reason if status.available else f"off: {status.reason}"
        for name, status in kk.backends().items()
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
