"""Reading AMD machine code: a snippet in the form of LLVM's assembly text."""

import pytest

from kexue_kernels.offline import gcn
from kexue_kernels.offline.archs import ARCHS
from kexue_kernels.offline.instructions import hottest_loop

LISTING = """\
\t.text
\t.globl\tk                               ; -- Begin function k
k:                                      ; @k
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\t.loc\t1 0 19 is_stmt 0                ; c1.py:0:19
\ts_cbranch_scc0 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[4:7], v[6:7], off
\tds_read2_b64 v[8:11], v1
\tv_fmac_f32_e32 v6, v5, v7
\tv_exp_f32_e32 v7, v9
\tv_cndmask_b32_e64 v9, 0, v4, s[0:1]
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_execz .LBB0_1
\tglobal_store_short v[8:9], v6, off
\ts_branch .LBB0_1
.LBB0_3:
\ts_endpgm
\t.section\t.rodata,"a",@progbits
\t.amdhsa_kernel k
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     16
    .group_segment_fixed_size: 512
    .name:           k
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 1
    .vgpr_count:     10
    .vgpr_spill_count: 2
...
"""


def test_loop_and_mix() -> None:
    loop = hottest_loop(gcn.instructions(LISTING), ARCHS["gfx942"])
    assert loop.is_loop
    assert loop.instructions == 10
    assert loop.mix == {
        "tensor": 1, "global": 2, "shared": 1, "special": 1, "fp32": 1, "integer": 1, "control": 3,
    }  # fmt: skip
    del loop.cycles["DRAM"]  # type: ignore[attr-defined]
    assert loop.cycles == pytest.approx(
        {
            "L1": 64 * 18 / 64,
            "LDS": 64 * 16 / 128,
            "tensor core": 32 * 32 * 8 / 1024,
            "vector ALU": 4 + 1 + 1,
            "scalar ALU": 3,
        }
    )


def test_metadata() -> None:
    numbers = gcn.metadata(LISTING)
    assert numbers["vgpr_count"] == 10
    assert (numbers["vgpr_spill_count"], numbers["sgpr_spill_count"]) == (2, 1)
    assert numbers["group_segment_fixed_size"] == 512


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("buffer_load_dwordx2", "global"),
        ("scratch_store_dword", "local"),
        ("ds_bpermute_b32", "shuffle"),
        ("v_mov_b32_dpp", "shuffle"),
        ("v_pk_fma_f32", "fp32"),
        ("v_add_u32_e32", "integer"),
        ("s_barrier", "control"),
    ],
)
def test_kinds(opcode: str, kind: str) -> None:
    assert gcn.kind(opcode) == kind
