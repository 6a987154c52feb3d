"""What nvcc makes of a CUDA source, from the built extension or, where that has none, made here."""

import shutil
import subprocess
from pathlib import Path

from kexue_kernels.offline import cubins, sass, tools
from tests.emulation import ROOT

ARCHS = ("sm_80", "sm_90", "sm_100")


def nvcc() -> str | None:
    folders = sorted(Path("/usr/local").glob("cuda*/bin"))
    return shutil.which("nvcc") or next(
        (found for folder in folders if (found := shutil.which("nvcc", path=folder))), None
    )


def find(folder: Path, source: str, kernel: str) -> tuple[dict[str, list[Path]], str]:
    """Cubins with that kernel by architecture; and where there can't be any, why."""
    found, why = cubins.extract(folder, list(ARCHS))
    found = [(arch, path) for arch, path in found if kernel.encode() in path.read_bytes()]
    if not found:
        if nvcc() is None:
            return {}, f"{why or 'the extension is older than the kernel'}; no nvcc"
        found = [_compile(folder, source, arch) for arch in ARCHS]
    return {arch: [path for name, path in found if name == arch] for arch in ARCHS}, ""


def opcodes(paths: list[Path], kernel: str) -> dict[str, list[str]]:
    """Those of each kernel with that name in its own."""
    texts = [tools.run("nvdisasm", "-c", path) for path in paths]
    kernels = [item for text in texts for item in sass.functions(text).items()]
    return {name: [i.opcode for i in code] for name, code in kernels if kernel in name}


def _compile(folder: Path, source: str, arch: str) -> tuple[str, Path]:
    cubin, program = folder / f"{arch}.cubin", nvcc()
    assert program is not None
    number = arch.removeprefix("sm_") + "a" * (arch == "sm_90")
    flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}", "-cubin"]
    subprocess.run([program, *flags, ROOT / source, "-o", cubin], check=True)
    return arch, cubin
