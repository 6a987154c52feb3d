"""NVIDIA machine code as nvdisasm and cuobjdump print it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kexue_kernels.offline.instructions import Instruction

_SECTION = re.compile(r"\.section\s+\.text\.([^\s,]+)")
_LABEL = re.compile(r"^(\.L[\w.]*):")
_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:\{\s*)?(?:@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_]*(?:\.[\w.]+)?)(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"`\((\.L[\w.]*)\)")

# By the first part of the opcode. Type conversions run on the special function unit; compares,
# selects and minima of floats on the integer unit; IMAD is counted there too.
_KINDS = {
    "global": "LDG STG LD ST ATOM ATOMG RED REDG LDGSTS UTMALDG UTMASTG UTMAREDG UBLKCP UBLKRED",
    "shared": "LDS STS LDSM STSM ATOMS LDTM STTM",
    "local": "LDL STL",
    "shuffle": "SHFL",
    "special": "MUFU F2F F2I I2F I2FP FRND POPC FLO BREV",
    "fp32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FSWZADD FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2 "
    "FHADD FHFMA",
    "fp64": "DFMA DADD DMUL DSETP",
    "integer": "IADD IADD3 IADD32I IMAD IMUL IMNMX VIADD VIADDMNMX VIMNMX VIMNMX3 IABS ISETP ISET "
    "ISCADD LEA LOP LOP3 SHF SHL SHR SGXT BMSK PRMT SEL MOV MOV32I P2R R2P PLOP3 PSETP VOTE VOTEU "
    "FSETP FSET FSEL FMNMX FMNMX3 FCHK F2FP HSETP2 HSET2 HMNMX2 IDP IDP4A LEPC",
    "control": "CGAERRBAR BRA BRX JMP JMX CALL RET EXIT BSSY BSYNC BREAK BMOV BPT KILL NOP YIELD "
    "BAR B2R R2B WARPSYNC DEPBAR LDGDEPBAR LDSDEPBAR MEMBAR FENCE ERRBAR CCTL CCTLL SYNCS ARRIVES "
    "ACQBULK ELECT WARPGROUP WARPGROUPSET ENDCOLLECTIVE MATCH REDUX CREDUX S2R S2UR CS2R R2UR LDC "
    "LDCU NANOSLEEP PREEXIT UTMACMDFLUSH UTMACCTL UCGABAR_ARV UCGABAR_WAIT",
}
_KIND = {opcode: kind for kind, opcodes in _KINDS.items() for opcode in opcodes.split()}
_TENSOR = re.compile(r"(?:[BDHIOQ]|[BHIQ]G|UTC[A-Z]*)MMA")
_UNIFORM = re.compile(r"U[A-Z0-9_]+")  # the uniform datapath: once per warp, beside the lanes

# m * n * k of the shapes that mma.sync instructions name
_SHAPES = {"884": 256, "1684": 512, "1688": 1024, "16816": 2048, "16832": 4096, "16864": 8192}


def functions(text: str) -> dict[str, list[Instruction]]:
    """Kernel name (mangled) -> its instructions, in order, from nvdisasm's output."""
    found: dict[str, list[Instruction]] = {}
    parts = _SECTION.split(text)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if code := list(_instructions(body)):
            found[name] = code
    return found


def _instructions(body: str) -> Iterator[Instruction]:
    lines = body.splitlines()
    labels = _labels(lines)
    for line in lines:
        if match := _LINE.search(line):
            opcode = match["opcode"]
            yield Instruction(
                address=int(match["address"], 16),
                opcode=opcode,
                kind=kind(opcode),
                bytes=_bytes(opcode),
                fmas=_fmas(opcode),
                target=_target(opcode, match["operands"], labels),
            )


def _labels(lines: list[str]) -> dict[str, int]:
    """Label -> address of the instruction that follows it."""
    labels, waiting = {}, []
    for line in lines:
        if match := _LABEL.match(line):
            waiting.append(match[1])
        elif match := _LINE.search(line):
            labels.update(dict.fromkeys(waiting, int(match["address"], 16)))
            waiting = []
    return labels


def _target(opcode: str, operands: str, labels: dict[str, int]) -> int | None:
    match = _TARGET.search(operands)
    if match is None or opcode.split(".")[0] not in ("BRA", "JMP"):
        return None
    return labels.get(match[1])


def kind(opcode: str) -> str:
    head = opcode.split(".")[0]
    if head in _KIND:
        return _KIND[head]
    if _TENSOR.fullmatch(head):
        return "tensor"
    return "control" if _UNIFORM.fullmatch(head) else "other"


def _bytes(opcode: str) -> int:
    """What one lane loads or stores; 0 for bulk copies, whose size is in a register."""
    head, *modifiers = opcode.split(".")
    if kind(opcode) not in ("global", "shared", "local", "shuffle") or head.startswith("U"):
        return 0
    if head in ("LDSM", "STSM"):  # 8x8 tiles of 16 bits: 4 bytes a lane each
        return 4 * int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 4
    for modifier in modifiers:
        if modifier in ("64", "128", "256"):
            return int(modifier) // 8
        if modifier in ("U8", "S8", "U16", "S16"):
            return int(modifier[1:]) // 8
    return 4


def _fmas(opcode: str) -> int:
    """A warp's half-precision FMAs (TF32 counts twice, 8 bits half); 0 where no shape is named."""
    head, *modifiers = opcode.split(".")
    if kind(opcode) != "tensor":
        return 0
    for modifier in modifiers:
        if modifier in _SHAPES:
            fmas = _SHAPES[modifier]
        elif match := re.fullmatch(r"(\d+)x(\d+)x(\d+)", modifier):
            fmas = int(match[1]) * int(match[2]) * int(match[3]) // 4  # four warps share it
        else:
            continue
        if "TF32" in modifiers:
            return 2 * fmas
        return fmas // 2 if head[0] in "IQ" else fmas
    return 0


@dataclass(frozen=True)
class Usage:
    """What `cuobjdump -res-usage` says of a kernel."""

    registers: int
    stack: int  # bytes per thread
    shared: int  # bytes per block, known when it was compiled
    local: int  # bytes per thread


_USAGE = re.compile(
    r"Function\s+(?P<name>[^\s:]+):\s*"
    r"REG:(?P<registers>\d+)\s+STACK:(?P<stack>\d+)\s+SHARED:(?P<shared>\d+)\s+LOCAL:(?P<local>\d+)"
)


def usages(text: str) -> dict[str, Usage]:
    """Kernel name (mangled) -> its resources, from cuobjdump's output."""
    found = {}
    for match in _USAGE.finditer(text):
        numbers = {key: int(value) for key, value in match.groupdict().items() if key != "name"}
        found[match["name"]] = Usage(**numbers)
    return found
