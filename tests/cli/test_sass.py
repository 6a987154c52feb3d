"""Reading NVIDIA machine code: snippets in the form that nvdisasm and cuobjdump print."""

import pytest

from kexue_kernels.offline import sass
from kexue_kernels.offline.archs import ARCHS
from kexue_kernels.offline.instructions import hottest_loop

LISTING = """\
\t.headerflags\t@"EF_CUDA_SM90"
//--------------------- .text.first                --------------------------
\t.section\t.text.first,"ax",@progbits
\t.align\t128
        .global         first
first:
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   BSSY B0, `(.L_x_9) ;
.L_x_0:
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDS.64 R8, [R1+UR6] ;
.L_x_1:
        /*0050*/              @!P2 LDG.E R10, desc[UR4][R2.64] ;
        /*0060*/                   FFMA R3, R3, R11, R12 ;
        /*0070*/                   MUFU.EX2 R11, R10 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0090*/                   IADD3.X R5, R5.reuse, UR5, RZ, P1, !PT ;
        /*00a0*/              @!P2 STG.E.U16 desc[UR4][R6.64], R12 ;
        /*00b0*/               @P1 BRA `(.L_x_1) ;
        /*00c0*/              @!P3 BRA.U UP0, `(.L_x_0) ;
.L_x_9:
        /*00d0*/                   EXIT ;
.L_x_2:
        /*00e0*/                   BRA `(.L_x_2);
        /*00f0*/                   NOP;
\t.section\t.text._Z6secondPf,"ax",@progbits
_Z6secondPf:
        /*0000*/                   STL.128 [R1], R4 ;
        /*0010*/                   LDL R4, [R1+0x8] ;
        /*0020*/                   EXIT ;
"""


def test_functions_are_told_apart() -> None:
    code = sass.functions(LISTING)
    assert list(code) == ["first", "_Z6secondPf"]
    assert [i.opcode for i in code["_Z6secondPf"]] == ["STL.128", "LDL", "EXIT"]
    assert [i.bytes for i in code["_Z6secondPf"]] == [16, 4, 0]
    assert len(code["first"]) == 16


def test_branches_point_to_the_label_s_instruction() -> None:
    targets = {
        i.address: i.target for i in sass.functions(LISTING)["first"] if i.target is not None
    }
    assert targets == {0xB0: 0x50, 0xC0: 0x30, 0xE0: 0xE0}  # BSSY does not branch


def test_hottest_loop_is_the_innermost() -> None:
    loop = hottest_loop(sass.functions(LISTING)["first"], ARCHS["sm_90"])
    assert loop.is_loop
    assert loop.instructions == 7
    assert loop.mix == {
        "tensor": 1, "global": 2, "special": 1, "fp32": 1, "integer": 1, "control": 1,
    }  # fmt: skip


def test_cycles_of_each_pipe() -> None:
    loop = hottest_loop(sass.functions(LISTING)["first"], ARCHS["sm_90"])
    share = ARCHS["sm_90"].datasheet.bytes_per_cycle
    assert loop.cycles == pytest.approx(
        {
            "DRAM": 32 * 6 / share,
            "special function": 2.0,
            "issue": 7 / 4,
            "L1 and shared memory": 32 * 6 / 128,
            "tensor core": 1.0,
            "integer": 0.5,
            "FP32": 0.25,
        }
    )
    assert loop.busiest == "DRAM"
    assert list(loop.cycles.values()) == sorted(loop.cycles.values(), reverse=True)


def test_a_kernel_without_a_loop_counts_whole() -> None:
    loop = hottest_loop(sass.functions(LISTING)["_Z6secondPf"], ARCHS["sm_80"])
    assert not loop.is_loop
    assert loop.mix == {"local": 2, "control": 1}


def test_a_loop_that_only_waits_is_not_hot() -> None:
    work = [f"/*{16 * i:04x}*/  LDG.E.128 R4, [R2.64] ;" for i in range(12)]
    wait = [".L_x_0:", "/*00c0*/  LDG.E.64 R4, [R2.64] ;", "/*00d0*/ @P0 BRA `(.L_x_0) ;"]
    text = "\n".join(['.section\t.text.k,"ax"', *work, *wait])
    loop = hottest_loop(sass.functions(text)["k"], ARCHS["sm_90"])
    assert not loop.is_loop
    assert loop.instructions == 14


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HGMMA.64x128x16.F32.BF16", "tensor"),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", "tensor"),
        ("IMMA.16832.S8.S8", "tensor"),
        ("UTCHMMA", "tensor"),
        ("DMMA.884", "tensor"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("UTMALDG.2D", "global"),
        ("ATOMG.E.ADD.STRONG.GPU", "global"),
        ("LDSM.16.M88.4", "shared"),
        ("ATOMS.ADD", "shared"),
        ("SHFL.BFLY", "shuffle"),
        ("MUFU.RCP", "special"),
        ("FFMA2", "fp32"),
        ("HFMA2.BF16_V2", "fp32"),
        ("IMAD.WIDE", "integer"),
        ("FSETP.GEU.AND", "integer"),
        ("ULOP3.LUT", "control"),
        ("WARPSYNC.ALL", "control"),
        ("DFMA", "fp64"),
        ("NOVELTY", "other"),
    ],
)
def test_kinds(opcode: str, kind: str) -> None:
    assert sass.kind(opcode) == kind


@pytest.mark.parametrize(
    ("opcode", "fmas"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("IMMA.16832.S8.S8", 16 * 8 * 32 // 2),
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4),
        ("UTCHMMA", 0),
        ("FFMA", 0),
    ],
)
def test_tensor_core_work(opcode: str, fmas: int) -> None:
    listing = f'.section\t.text.k,"ax"\n/*0000*/  {opcode} R1, R2 ;'
    (instruction,) = sass.functions(listing)["k"]
    assert instruction.fmas == fmas


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E.U8", 1), ("LDSM.16.M88.4", 16), ("LDSM.16.M88", 4), ("STS.128", 16), ("UTMALDG", 0)],
)
def test_bytes_a_lane_moves(opcode: str, size: int) -> None:
    listing = f'.section\t.text.k,"ax"\n/*0000*/  {opcode} R1, [R2] ;'
    (instruction,) = sass.functions(listing)["k"]
    assert instruction.bytes == size


def test_resource_usage() -> None:
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z4scanIfLb0EEvPKT_:
  REG:22 STACK:8 SHARED:2048 LOCAL:16 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function other:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert sass.usages(text) == {
        "_Z4scanIfLb0EEvPKT_": sass.Usage(registers=22, stack=8, shared=2048, local=16),
        "other": sass.Usage(registers=32, stack=0, shared=0, local=0),
    }
