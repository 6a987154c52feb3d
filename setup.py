"""Builds the optional extension `kexue_kernels._C` from csrc with CMake.

Environment: KEXUE_BUILD_CUDA = auto (default: if nvcc is found and compiles), 1 (required) or
0 (off); KEXUE_CUDA_ARCHS = for instance "sm_80;sm_90a" (default: sm_80, sm_90a, sm_100).
Where no compiler is found the package installs without the extension and runs on PyTorch.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_CHOICES = ("auto", "0", "1")


class CMakeBuild(build_ext):
    """One extension, one CMake project; optional unless CUDA is required."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("KEXUE_BUILD_CUDA", "auto").lower()
        if cuda not in CUDA_CHOICES:
            raise SystemExit(f"KEXUE_BUILD_CUDA: expected one of {CUDA_CHOICES}, got {cuda!r}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        for attempt in ("auto", "0") if cuda == "auto" else (cuda,):
            try:
                return self._cmake(target, attempt)
            except (OSError, ImportError, subprocess.CalledProcessError) as error:
                message = f"the build with KEXUE_BUILD_CUDA={attempt} failed: {_brief(error)}"
                if cuda == "1":
                    raise SystemExit(f"kexue_kernels: {message}") from None
                _warn(message)
        _warn(f"installing without {ext.name}: CPU calls use blocked PyTorch, which is slower")
        return None

    def _cmake(self, target: Path, cuda: str) -> None:
        import pybind11  # in the build's requirements

        # an editable build's temporary folder goes when pip ends; one that stays rebuilds less
        kept = ROOT / "build" / "editable"
        build = kept if self.editable_mode else Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # The cache may name tools of a build environment that is gone; compiled objects stay.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = _tool("cmake") or "cmake"
        defines = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "KEXUE_BUILD_CUDA": cuda,
            "KEXUE_CUDA_ARCHS": os.environ.get("KEXUE_CUDA_ARCHS", ""),
        }
        generator = []
        if ninja := _tool("ninja"):
            generator = ["-G", "Ninja"]
            defines["CMAKE_MAKE_PROGRAM"] = ninja
        arguments = [f"-D{name}={value}" for name, value in defines.items()]
        subprocess.check_call([cmake, "-S", ROOT / "csrc", "-B", build, *generator, *arguments])
        subprocess.check_call([cmake, "--build", build, "--parallel", str(self._jobs())])

    def _jobs(self) -> int:
        return self.parallel or int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))


def _tool(name: str) -> str | None:
    """An executable of this interpreter's environment, or of PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _brief(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"CMake exited with status {error.returncode} (its output is above)"
    return str(error)


def _warn(message: str) -> None:
    print(f"kexue_kernels: WARNING: {message}", file=sys.stderr, flush=True)


setup(
    ext_modules=[Extension("kexue_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
