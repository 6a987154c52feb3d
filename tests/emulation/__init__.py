"""Builds the CUDA sources of csrc for the CPU: every CUDA thread a thread (cuda_emulation.h)."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def compiler() -> str | None:
    """The C++ compiler to use, if there is one."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(folder: Path, source: str = "module.cpp", name: str = "kexue_emulated") -> ModuleType:
    """Compile and load a source, which has some of what kexue_kernels._C has of CUDA."""
    import pybind11

    cxx = compiler()
    assert cxx is not None
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [
        ROOT / "csrc",
        ROOT / "tests/emulation",
        pybind11.get_include(),
        sysconfig.get_paths()["include"],
    ]
    flags = ["-std=c++20", "-Og", "-Wall", "-Wno-unknown-pragmas", "-fvisibility=hidden"]
    command = [cxx, *flags, "-fPIC", "-shared", "-pthread", *(f"-I{path}" for path in includes)]
    command += [str(ROOT / "tests/emulation" / source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{cxx} failed: {result.stderr}")
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
