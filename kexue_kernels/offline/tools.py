"""The binary tools that read compiled kernels: cuobjdump, nvdisasm, c++filt."""

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path


class ToolMissingError(RuntimeError):
    """A tool that reads compiled kernels is nowhere on this machine."""


@functools.cache
def find(*names: str) -> Path | None:
    """The first of `names` in Triton's wheel, in the CUDA toolkit or on PATH."""
    folders = [folder for folder in _folders() if folder.is_dir()]
    for name in names:
        for folder in folders:
            if os.access(folder / name, os.X_OK):
                return folder / name
        if found := shutil.which(name):
            return Path(found)
    return None


def run(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """What the tool prints; RuntimeError with its complaint where it fails."""
    tool = find(name)
    if tool is None:
        raise ToolMissingError(f"{name} is neither in Triton's wheel nor in a CUDA toolkit")
    result = subprocess.run([tool, *arguments], cwd=cwd, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{name} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Mangled name -> C++ declaration; unchanged where no demangler is installed."""
    names = list(names)
    tool = find("cu++filt", "c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout
    return dict(zip(names, text.splitlines(), strict=True))


def _folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("triton")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(place) / "backends" / "nvidia" / "bin"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home) / "bin"
    yield Path("/usr/local/cuda/bin")
