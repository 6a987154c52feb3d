"""The CUDA C++ kernels inside the built extension, read from the machine code it carries."""

import importlib.util
import re
from pathlib import Path

from kexue_kernels import families
from kexue_kernels.offline import card, cuda_costs, sass, tools
from kexue_kernels.offline.archs import ARCHS
from kexue_kernels.offline.card import Card
from kexue_kernels.offline.instructions import hottest_loop
from kexue_kernels.offline.occupancy import occupancy

_CUBIN = re.compile(r"\.(sm_\d+)[a-z]?\.cubin$")
_KERNEL_INFO = re.compile(r"^\.nv\.info\.(\S+)$", re.MULTILINE)
_THREADS = re.compile(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\S+\s+Value:\s+([^\n]+)")
_SYSTEM_SHARED = 1024  # from sm_90 on ptxas counts the system's share as the kernel's


def extension_file() -> Path | None:
    """The compiled extension, found without loading it."""
    spec = importlib.util.find_spec("kexue_kernels._C")
    return Path(spec.origin) if spec is not None and spec.origin else None


def extract(folder: Path, archs: list[str]) -> tuple[list[tuple[str, Path]], str]:
    """(arch, cubin) pairs written to `folder`; and where there are none, why."""
    file = extension_file()
    if file is None:
        return [], "the C++ extension is not built, so there are no CUDA C++ kernels to inspect"
    try:
        tools.run("cuobjdump", "-xelf", "all", file, cwd=folder)
    except tools.ToolMissingError as error:
        return [], f"the CUDA C++ kernels can't be read: {error}"
    except RuntimeError as error:
        if "does not contain device code" in str(error):
            return [], "the C++ extension was built without CUDA: no CUDA C++ kernels to inspect"
        return [], f"the CUDA C++ kernels can't be read: {error}"
    found = [(match[1], path) for path in folder.iterdir() if (match := _CUBIN.search(path.name))]
    wanted = sorted((arch, path) for arch, path in found if arch in archs)
    built = ", ".join(sorted({arch for arch, _ in found}))
    return wanted, "" if wanted else f"the C++ extension's CUDA C++ kernels are for {built} alone"


def usages(cubin: Path) -> dict[str, sass.Usage]:
    """Kernel name (mangled) -> its resources, without a look at its instructions."""
    return sass.usages(tools.run("cuobjdump", "-res-usage", cubin))


def cards(arch: str, cubin: Path) -> list[Card]:
    """One card per kernel in the file. Shared memory asked for at launch is not in it."""
    code = sass.functions(tools.run("nvdisasm", "-c", "-ndf", cubin))
    needs = usages(cubin)
    threads = _threads(tools.run("cuobjdump", "-elf", cubin))
    names = tools.demangled(code)
    return [
        _card(arch, names[kernel], code[kernel], needs[kernel], threads.get(kernel))
        for kernel in code
        if kernel in needs
    ]


def _card(
    arch: str, name: str, code: list[sass.Instruction], usage: sass.Usage, threads: int | None
) -> Card:
    limits = ARCHS[arch]
    hopper_or_later = int(arch.removeprefix("sm_")) >= 90
    shared = max(0, usage.shared - _SYSTEM_SHARED) if hopper_or_later else usage.shared
    spills = sum(instruction.kind == "local" for instruction in code)
    stack = usage.stack + usage.local
    held = occupancy(limits, threads, usage.registers, shared) if threads else None
    family, op, short = _identity(name)
    loop = hottest_loop(code, limits)
    cost = cuda_costs.cost(family, short)
    return Card(
        family=family,
        op=op,
        backend="cuda",
        name=cuda_costs.readable(short),
        kernel=name,
        arch=arch,
        threads=threads,
        num_warps=-(-threads // limits.warp_size) if threads else None,
        registers=usage.registers,
        spills=spills,
        stack=stack,
        shared=shared,
        shared_limit=limits.shared_per_block,
        occupancy=held,
        loop=loop,
        roofline=card.roofline(limits, *cost, loop) if cost else None,
        problems=card.problems(spills, stack, shared, limits.shared_per_block, held),
    )


def _identity(declaration: str) -> tuple[str, str, str]:
    """(family, op, name with template arguments) of a demangled kernel."""
    name = _bare(declaration)
    for family in families.names():
        for op in families.ops(family):
            if op in name:
                return family, op, name
    return "", "", name


def _bare(declaration: str) -> str:
    """Without return type, namespaces and parameters."""
    depth = 0
    end = len(declaration)
    if declaration.endswith(")"):
        for end in range(len(declaration) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(declaration[end], 0)
            if depth == 0:
                break
    text = declaration[:end].replace("(anonymous namespace)", "").removeprefix("void ")
    head, bracket, arguments = text.partition("<")
    return head.rpartition("::")[2] + bracket + arguments


def _threads(elf: str) -> dict[str, int]:
    """Kernel -> threads per block, where it was compiled with launch bounds."""
    parts = _KERNEL_INFO.split(elf)
    found = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if match := _THREADS.search(body):
            x, y, z = (int(value, 16) for value in match[1].split()[:3])
            found[name] = x * y * z
    return found
