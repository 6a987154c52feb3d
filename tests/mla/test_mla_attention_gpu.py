"""mla_attention's Triton kernels on a GPU: real sizes, packed sequences, far offsets, graphs."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from tests.mla.attention_cases import CASES, NAMES, Case, attend, check, make, packed, run
from tests.mla.cases import error

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
REAL = {"dk": 128, "dr": 64, "dv": 128, "dc": 512}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case: Case) -> None:
    check(case, "triton", device="cuda")


@pytest.mark.parametrize(
    "case",
    [
        *(Case(1, 300, 4, **REAL, dtype=dtype) for dtype in (torch.float32, BF16, FP16)),
        Case(2, 257, 3, **REAL, dtype=BF16, causal=False),
        packed(200, 0, 1, 64, 130, 0, H=4, **REAL, dtype=BF16),
        packed(1, 127, 129, H=2, **REAL, dtype=FP16, causal=False),
        Case(1, 200, 2, 192, 64, 256, 128, dtype=BF16),
        Case(1, 200, 2, 40, 24, 72, 96, dtype=FP16, strided=True),
    ],
    ids=str,
)
def test_heads_of_real_width(case: Case) -> None:
    check(case, "triton", device="cuda")


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 8192, 16, **REAL, dtype=BF16),
        Case(1, 8192, 16, **REAL, dtype=BF16, causal=False),
        packed(4096, 100, 3000, 996, H=16, **REAL, dtype=BF16),
    ],
    ids=str,
)
def test_long_sequences(case: Case) -> None:
    """Against float32 by blocks of queries, head by head; twice the same."""
    inputs = make(case, "cuda")
    found, again = (run(case, inputs, "triton") for _ in range(2))
    exact = by_blocks(case, {name: x.float() for name, x in inputs.items()})
    own = by_blocks(case, inputs)
    for name, x in found.items():
        assert torch.equal(x, again[name]), name
        true = exact[name].double()
        scale = true.abs().max().item()
        allowed = 2 * error(own[name].double(), true) + 4 * torch.finfo(x.dtype).eps * scale
        assert error(x.double(), true) <= allowed, (name, error(x.double(), true), allowed)


def by_blocks(case: Case, inputs: dict[str, Tensor], block: int = 1024) -> dict[str, Tensor]:
    """The output and the six gradients, in plain PyTorch and the inputs' dtype."""
    data = [inputs[name].detach().requires_grad_() for name in NAMES]
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = data
    scale = (case.dk + case.dr) ** -0.5
    out = torch.zeros_like(inputs["grad"])
    cu_seqlens = case.cu_seqlens()
    bounds = [0, case.T] if cu_seqlens is None else cu_seqlens.tolist()
    for h in range(case.H):
        for start, stop in pairwise(bounds):
            for first in range(start, stop, block):
                last = min(first + block, stop)
                keys = slice(start, last if case.causal else stop)
                k = torch.cat([latent[0, keys] @ w_uk[h].T, k_rope[0, keys]], -1)
                q = torch.cat([q_nope[0, first:last, h], q_rope[0, first:last, h]], -1)
                scores = (q @ k.T).float() * scale
                if case.causal:
                    query = torch.arange(first, last, device=q.device)
                    hidden = torch.arange(start, last, device=q.device) > query[:, None]
                    scores = scores.masked_fill(hidden, -torch.inf)
                o = scores.softmax(-1).to(q.dtype) @ (latent[0, keys] @ w_uv[h].T)
                o.backward(inputs["grad"][0, first:last, h])
                out[0, first:last, h] = o.detach()
    return {
        "out": out,
        **{n: x.grad for n, x in zip(NAMES, data, strict=True) if x.grad is not None},
    }


def test_offsets_past_two_to_the_31() -> None:
    """The last of B sequences as it is on its own."""
    B, T, H = 130, 1024, 128
    q = torch.randn(1, T, H, 128, device="cuda").bfloat16().expand(B, -1, -1, -1).contiguous()
    assert q.numel() > 2**31
    case = Case(1, T, H, 128, 0, 128, 64, dtype=BF16)
    rest = make(case, "cuda")
    latent, k_rope = (rest[name].expand(B, -1, -1).contiguous() for name in ("kv_latent", "k_rope"))
    q_rope = q[..., :0]
    data = [q, q_rope, latent, k_rope, rest["w_uk"], rest["w_uv"]]
    out = kk.mla_attention(*data, backend="triton")
    alone = kk.mla_attention(
        q[:1], q_rope[:1], rest["kv_latent"], k_rope[:1], *data[4:], backend="triton"
    )
    assert torch.equal(out[-1], alone[0])
    assert torch.equal(out[B // 2], alone[0])


def test_gradients_of_far_strides() -> None:
    """Tokens and columns whose offsets in a tile would need 64 bits."""
    case = Case(1, 200, 2, 16, 16, 16, 32, dtype=BF16)
    inputs = make(case, "cuda")
    wide = torch.empty(200 * 2**24, dtype=BF16, device="cuda")
    far = wide.as_strided((1, 200, 2, 16), (0, 2**24, 16, 1)).copy_(inputs["q_nope"])
    near, moved = (run(case, each, "triton") for each in (inputs, inputs | {"q_nope": far}))
    assert all(torch.equal(x, moved[name]) for name, x in near.items())


def test_graph_replay_with_changed_contents() -> None:
    case = packed(300, 212, H=4, **REAL, dtype=BF16)
    inputs = make(case, "cuda")
    bounds = case.cu_seqlens("cuda")
    data = [inputs[name] for name in NAMES]

    def call() -> Tensor:
        return kk.mla_attention(*data, cu_seqlens=bounds, backend="triton")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for middle in (1, 512, 200):
        assert bounds is not None
        bounds[1] = middle
        inputs["q_nope"].normal_()
        graph.replay()
        assert torch.equal(captured, call())


def test_memory_of_a_group_alone() -> None:
    """Beyond inputs, output and gradients: less than keys and values of all heads."""
    case = Case(1, 8192, 128, **REAL, dtype=BF16)
    inputs = make(case, "cuda")
    data = tuple(inputs[name].requires_grad_() for name in NAMES)
    kept = sum(x.nbytes for x in data)
    out = attend(case, data, "triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out.backward(inputs["grad"])
    beyond = torch.cuda.max_memory_allocated() - before - kept
    assert beyond < case.T * case.H * (case.dk + case.dv) * 2
