"""Other packages' decoding: stand-ins with their signatures must find the right arguments."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kexue_kernels.benchmarks import check, mla_decode, mla_packages
from kexue_kernels.benchmarks.case import Bound, Case, Contestant
from kexue_kernels.benchmarks.mla_peers import by_bmm
from tests.benchmarks.toy import CPU


def flash_mla(
    q: Tensor, block_table: Tensor, blocked_k: Tensor, max_seqlen_pad: int, block_size: int,
    b: int, s_q: int, cache_seqlens: Tensor, h_q: int, h_kv: int, d: int, dv: int, causal: bool,
) -> Tensor:  # fmt: skip
    assert (b, s_q, h_q, d) == tuple(q.shape)
    assert blocked_k.shape[1:] == (block_size, h_kv, d)
    assert max_seqlen_pad == int(cache_seqlens.max())
    assert (dv, causal) == (512, True)
    own_scale = d**-0.5 / mla_packages.SCALE  # what by_bmm takes beyond it
    return by_bmm(q * own_scale, blocked_k.squeeze(2), block_table, cache_seqlens)


class Wrapper:
    """flashinfer's BatchMLAPagedAttentionWrapper, as far as it is used."""

    def __init__(self, workspace: Tensor) -> None:
        assert workspace.numel() >= 128 * 2**20

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor,
        num_heads: int, head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool,
        sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert (head_dim_ckv, head_dim_kpe, page_size, causal) == (512, 64, 64, True)
        assert sm_scale == mla_packages.SCALE
        assert q_data_type == kv_data_type == torch.float32
        self.heads, self.lengths = num_heads, kv_len_arr
        self.table = kv_indices.view(len(kv_len_arr), -1)
        assert kv_indptr.diff().eq(self.table.shape[1]).all()
        self.queries = int(qo_indptr[1])

    def run(self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor) -> Tensor:
        q = torch.cat([q_nope, q_pe], -1)
        assert q.shape[1] == self.heads
        cache = torch.cat([ckv_cache, kpe_cache], -1)
        out = by_bmm(q.unflatten(0, (-1, self.queries)), cache, self.table, self.lengths)
        return out.flatten(0, 1)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, dict[str, Any]] = {
        "flag_gems.fused.flash_mla": {"flash_mla": flash_mla},
        "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": Wrapper},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def wrong(case: Case, contestant: Contestant) -> str:
    inputs, grad = case.make(CPU), torch.zeros(())
    results = Bound(contestant, "forward", inputs, grad).results()
    return check.judge(results, check.expect(case, inputs, grad))[1]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("make", "Tq"),
    [(mla_packages.flag_gems, 1), (mla_packages.flashinfer, 1), (mla_packages.flashinfer, 3)],
)
def test_they_decode(make: Any, Tq: int) -> None:
    case = mla_decode.case((2, 128, 16), torch.float32, CPU, Tq=Tq)
    assert wrong(case, make(Tq)) == ""


def test_where_they_take_part() -> None:
    gpu = torch.device("cuda")
    names = {
        H: {each.name for each in mla_decode.case((2, 128, H), torch.bfloat16, gpu).contestants}
        for H in (16, 128)
    }
    assert {mla_packages.FLAG_GEMS, mla_packages.FLASHINFER} <= names[16] & names[128]
    assert "kexue cuda" in names[128] - names[16]
    assert mla_packages.flag_gems(2).unfit
