"""`info`: what is here, and what is not and why."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from typer.testing import CliRunner

import kexue_kernels
from kexue_kernels import _extension
from kexue_kernels.cli import app, machine
from kexue_kernels.cli.info import NOT_RUN

ROOT = Path(kexue_kernels.__file__).parents[1]
find_spec = importlib.util.find_spec


def facts() -> dict[str, Any]:
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def shown(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "250")
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def another_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Puts a compiled module with this interface number where the package's own is."""

    def put(interface: int) -> None:
        module = ModuleType("kexue_kernels._C")
        module.interface, module.has_cuda = interface, True  # type: ignore[attr-defined]
        module.build_info = {"compiler": "Ancient 1.0", "cuda": ""}  # type: ignore[attr-defined]
        module.cpu_isa = lambda: "sse9"  # type: ignore[attr-defined]
        module.__spec__ = ModuleSpec(module.__name__, None, origin="/old/_C.so")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(kexue_kernels, "_C", module, raising=False)
        _extension.load.cache_clear()

    yield put
    monkeypatch.undo()
    _extension.load.cache_clear()


def test_versions_and_machine() -> None:
    found = facts()
    assert found["versions"]["kexue-kernels"] == kexue_kernels.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["cpu"]["model"]
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cuda"]["runtime"] == torch.version.cuda
    assert len(found["cuda"]["devices"]) == torch.cuda.device_count()


def test_backends_are_those_of_the_package() -> None:
    states = {
        name: {"available": status.available, "reason": status.reason}
        for name, status in kexue_kernels.backends().items()
    }
    assert facts()["backends"] == states


def test_kernels_say_whether_a_gpu_has_run_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = tmp_path / "runs.json"
    monkeypatch.setattr(machine, "GPU_RUNS", runs)
    runs.write_text("[]")
    kernels = facts()["gpu_kernels"]
    scans = ("linear_scan", "selective_scan", "selective_state_update")
    assert [(k["op"], k["backend"]) for k in kernels if k["family"] == "scan"] == [
        (op, backend) for op in scans for backend in ("triton", "cuda")
    ]
    others = {(k["family"], k["op"]) for k in kernels if k["backend"] == "triton"}
    assert others > {
        ("mla", "mla_decode"),
        ("monarch", "monarch_matmul"),
        ("vq", "nearest_codebook"),
    }
    assert all(k["devices"] == [] for k in kernels)
    assert shown(monkeypatch).count(NOT_RUN) == len(kernels)
    entry = {"op": "linear_scan", "backend": "triton", "device": "GPU X", "date": "2020-02-02"}
    runs.write_text(json.dumps([entry]))
    text = shown(monkeypatch)
    assert text.count(NOT_RUN) == len(kernels) - 1
    assert "GPU X (2020-02-02)" in text


def test_packaged_record_of_gpu_runs_is_readable() -> None:
    for entry in json.loads(machine.GPU_RUNS.read_text()):
        assert set(entry) == {"op", "backend", "device", "date"}


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name)
    )
    found = facts()
    assert found["versions"]["triton"] is None
    assert found["backends"]["triton"] == {"available": False, "reason": "Triton is not installed"}
    assert "not installed" in shown(monkeypatch)


def test_without_extension(monkeypatch: pytest.MonkeyPatch, without_extension: None) -> None:
    found = facts()
    assert not found["extension"]["usable"]
    assert found["extension"]["reason"] == "removed for a test"
    assert found["backends"]["cpu"]["available"]
    assert found["cpu"]["isa_of"] == "PyTorch"
    assert "removed for a test" in shown(monkeypatch)


def test_stale_extension(
    monkeypatch: pytest.MonkeyPatch, another_extension: Callable[[int], None]
) -> None:
    another_extension(_extension.INTERFACE - 1)
    found = facts()
    assert found["extension"]["file"] == "/old/_C.so"
    assert not found["extension"]["usable"]
    assert "stale" in found["extension"]["reason"]
    assert not found["backends"]["cuda"]["available"]
    assert "stale" in found["backends"]["cuda"]["reason"]
    assert "stale" in shown(monkeypatch)


def test_usable_extension_says_how_it_was_built(
    monkeypatch: pytest.MonkeyPatch, another_extension: Callable[[int], None]
) -> None:
    another_extension(_extension.INTERFACE)
    found = facts()
    assert found["extension"] == {
        "file": "/old/_C.so",
        "usable": True,
        "reason": "",
        "build": {"compiler": "Ancient 1.0", "cuda": ""},
    }
    assert (found["cpu"]["isa"], found["cpu"]["isa_of"]) == ("sse9", "the C++ extension")
    assert "compiler Ancient 1.0" in shown(monkeypatch)


def test_without_compilers_and_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert facts()["cuda"]["driver"] is None
    assert "no NVIDIA driver answers" in shown(monkeypatch)


def test_driver_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts()["cuda"]["driver"] == "580.1"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert facts()["cuda"]["driver"] is None


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "kexue_kernels", "info", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(result.stdout)["versions"]["torch"] == torch.__version__


def test_nothing_heavy_at_import() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import kexue_kernels.cli; "
        "print(*(set(sys.modules) - before))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert not loaded & {"triton", "matplotlib", "numba", "scipy", "pytest"}
    assert "kexue_kernels.benchmarks" not in result.stdout
