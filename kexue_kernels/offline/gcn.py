"""AMD machine code as LLVM's assembly text, for CDNA."""

import re
from collections.abc import Iterator

from kexue_kernels.offline.instructions import Instruction

_LABEL = re.compile(r"^(\.L\w+):")
_LINE = re.compile(r"^\s+(?P<opcode>[a-z]\w+)(?P<operands>[^;]*)")
_METADATA = re.compile(r"^\s+\.(\w+):\s+(\d+)\s*$", re.MULTILINE)

_KINDS = (
    (r"v_mfma_\w+|v_smfmac_\w+", "tensor"),
    (r"(global|buffer|flat)_(load|store|atomic)\w*", "global"),
    (r"scratch_\w+", "local"),
    (r"ds_(b?permute|swizzle)\w*|v_\w+_dpp", "shuffle"),
    (r"ds_\w+", "shared"),
    (r"v_(exp|log|rcp|rsq|sqrt|sin|cos)\w*", "special"),
    (
        r"v_fma_mix\w*|v_(pk_)?(add|sub|subrev|mul|mul_legacy|fma|fmac|mac|mad|dot2c?)_(f32|f16|bf16)\w*",
        "fp32",
    ),
    (r"v_\w+_f64", "fp64"),
    (r"v_\w+", "integer"),
    (r"s_\w+|buffer_\w+", "control"),
)
_WIDTHS = {"x4": 16, "x3": 12, "x2": 8, "b128": 16, "b96": 12, "b64": 8, "short": 2, "b16": 2}
_WIDTHS |= {"byte": 1, "b8": 1}


def instructions(text: str) -> list[Instruction]:
    """The kernel's instructions, in order; addresses count them."""
    return list(_instructions(text[: text.find(".section\t.rodata")].splitlines()))


def _instructions(lines: list[str]) -> Iterator[Instruction]:
    labels = _labels(lines)
    address = 0
    for line in lines:
        if match := _LINE.match(line):
            opcode = match["opcode"]
            branch = opcode.startswith(("s_cbranch", "s_branch"))
            target = labels.get(match["operands"].strip()) if branch else None
            found = kind(opcode)
            yield Instruction(
                address, opcode, found, _bytes(opcode, found), _fmas(opcode, found), target
            )
            address += 1


def _labels(lines: list[str]) -> dict[str, int]:
    labels, address = {}, 0
    for line in lines:
        if match := _LABEL.match(line):
            labels[match[1]] = address
        elif _LINE.match(line):
            address += 1
    return labels


def kind(opcode: str) -> str:
    return next((found for pattern, found in _KINDS if re.fullmatch(pattern, opcode)), "other")


def _bytes(opcode: str, found: str) -> int:
    if found not in ("global", "shared", "local", "shuffle"):
        return 0
    size = next((size for part, size in _WIDTHS.items() if part in opcode), 4)
    return 2 * size if re.match(r"ds_(read|write)2", opcode) else size


def _fmas(opcode: str, found: str) -> int:
    """A wave's half-precision FMAs; single precision runs at an eighth of the rate."""
    shape = re.search(r"(\d+)x(\d+)x(\d+)", opcode)
    if found != "tensor" or shape is None:
        return 0
    fmas = int(shape[1]) * int(shape[2]) * int(shape[3])
    return 8 * fmas if opcode.endswith("f32") else fmas


def metadata(text: str) -> dict[str, int]:
    """The numbers in the kernel's metadata: "vgpr_count", "group_segment_fixed_size", ..."""
    section = text[text.find(".amdgpu_metadata") :]
    return {name: int(value) for name, value in _METADATA.findall(section)}
