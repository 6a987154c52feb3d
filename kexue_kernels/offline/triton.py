"""Compile the Triton kernels that the families ship, and read what came out."""

import importlib
import pkgutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from kexue_kernels.offline import card, gcn, sass, tools
from kexue_kernels.offline.archs import ARCHS, Arch
from kexue_kernels.offline.card import Card
from kexue_kernels.offline.case import TritonCase
from kexue_kernels.offline.instructions import Instruction, hottest_loop
from kexue_kernels.offline.occupancy import occupancy


def modules(family: str) -> list[str]:
    """The family's modules with kernels to compile: `triton_<op>`, with `compile_cases`."""
    package = importlib.import_module(f"kexue_kernels.{family}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    full = [f"{package.__name__}.{name}" for name in names if name.startswith("triton_")]
    return [name for name in full if hasattr(importlib.import_module(name), "compile_cases")]


def cases(module: str) -> list[TritonCase]:
    found: list[TritonCase] = importlib.import_module(module).compile_cases()
    return found


def cards(family: str, module: str, index: int, arch: str) -> list[Card]:
    """The card of `cases(module)[index]`. Needs a process where Triton does not interpret."""
    case = cases(module)[index]
    identity: dict[str, Any] = {
        "family": family,
        "op": case.op,
        "backend": "triton",
        "name": case.name,
        "kernel": case.kernel.partition(":")[2],
        "arch": arch,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
    }
    try:
        return [Card(**identity, **_compiled(case, ARCHS[arch]))]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return [Card(**identity, error=reason, problems=["it does not compile"])]


def _compiled(case: TritonCase, arch: Arch) -> dict[str, Any]:
    kernel = _compile(case, arch)
    read = _read_amd if arch.name.startswith("gfx") else _read_nvidia
    needs = read(kernel)
    shared = kernel.metadata.shared
    threads = case.num_warps * arch.warp_size
    held = occupancy(arch, threads, needs.registers, shared)
    loop = hottest_loop(needs.code, arch)
    return {
        "threads": threads,
        "registers": needs.registers,
        "spills": needs.spills,
        "scalar_spills": needs.scalar_spills,
        "stack": needs.stack,
        "shared": shared,
        "shared_limit": arch.shared_per_block,
        "occupancy": held,
        "loop": loop,
        "roofline": card.roofline(arch, case.bytes_per_element, case.flops_per_element, loop),
        "problems": card.problems(needs.spills, needs.stack, shared, arch.shared_per_block, held),
    }


def _compile(case: TritonCase, arch: Arch) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, attribute = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), attribute)
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16
    }
    source = ASTSource(kernel, dict(case.signature), dict(case.constexprs), aligned)
    if arch.name.startswith("gfx"):
        target = GPUTarget("hip", arch.name, arch.warp_size)
    else:
        target = GPUTarget("cuda", int(arch.name.removeprefix("sm_")), arch.warp_size)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=target, options=options)


class _Needs(NamedTuple):
    code: list[Instruction]
    registers: int
    stack: int
    spills: int
    scalar_spills: int = 0


def _read_nvidia(kernel: Any) -> _Needs:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        name = kernel.metadata.name
        code = sass.functions(tools.run("nvdisasm", "-c", "-ndf", cubin))[name]
        usage = sass.usages(tools.run("cuobjdump", "-res-usage", cubin))[name]
    spills = sum(instruction.kind == "local" for instruction in code)
    return _Needs(code, usage.registers, usage.stack + usage.local, spills)


def _read_amd(kernel: Any) -> _Needs:
    text = kernel.asm["amdgcn"]
    numbers = gcn.metadata(text)
    return _Needs(
        gcn.instructions(text),
        numbers["vgpr_count"],
        numbers["private_segment_fixed_size"],
        numbers["vgpr_spill_count"],
        numbers["sgpr_spill_count"],
    )
