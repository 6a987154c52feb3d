"""selective_scan's and selective_state_update's Triton kernels, in the interpreter and on a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.scan import triton_selective_scan
from kexue_kernels.scan.triton_selective_maths import cos_sin, softplus
from kexue_kernels.scan.triton_selective_scan import (
    Config,
    Tile,
    borders,
    configure,
    configure_tile,
)
from kexue_kernels.scan.triton_selective_state_update import configure as configure_update
from tests.scan.selective_cases import ALL, NOTHING, Case, check, packed

BF16, FP16 = torch.bfloat16, torch.float16

# Chunks, and in the interpreter splits, are of 32 steps (33 states and more: 64).
INTERPRETED = [
    Case(batch=1, L=37, d=3, n=2),
    Case(batch=1, L=5, d=3, n=3, dtype=BF16, C="invariant", z=False),
    Case(batch=1, L=5, d=4, n=1, dtype=FP16, B="group", softplus=False),
    Case(batch=1, L=34, d=2, n=2, complex=True, B="invariant", C="step"),
    Case(batch=1, L=5, d=2, n=3, dtype=BF16, complex=True, B="group", **NOTHING),
    Case(batch=2, L=3, d=5, n=2, **NOTHING),
    Case(batch=1, L=1, d=1, n=1),
    Case(batch=1, L=4, d=2, n=16, B="invariant", C="invariant"),
    Case(batch=1, L=5, d=1, n=33, bias=False, initial=False),
    Case(batch=1, L=65, d=1, n=2, C="invariant"),
    Case(batch=2, L=4, d=3, n=3, strided=True, B="step", C="step"),
    packed((3, 0, 37, 1, 0), d=2, n=2),
    packed((0, 32, 3), d=2, n=1, dtype=BF16, B="group", initial=False),
    packed((40, 2), d=1, n=2, complex=True, C="invariant", D=False),
]


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_cases(case: Case, poisoned: None) -> None:
    check(case, "triton")


def test_one_split_and_a_tile_that_is_not_full(
    poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = triton_selective_scan.configure_interpreted
    tile = triton_selective_scan.configure_tile_interpreted
    whole = lambda *a: rule(*a)._replace(split_length=1 << 20, RUN=8)  # noqa: E731
    finer = lambda *a: tile(*a)._replace(RUN=16, RUNS=4, BLOCK_D=1)  # noqa: E731
    monkeypatch.setattr(triton_selective_scan, "configure_interpreted", whole)
    monkeypatch.setattr(triton_selective_scan, "configure_tile_interpreted", finer)
    check(Case(batch=1, L=40, d=3, n=2), "triton")


@pytest.mark.parametrize("d", [4, 6])
def test_groups_of_b_and_c_may_differ(d: int) -> None:
    g = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 1, 3, d, generator=g)
    A = -torch.rand(d, 2, generator=g)
    B, C = torch.randn(1, 3, 2, 2, generator=g), torch.randn(1, 3, d // 2, 2, generator=g)
    leaves = [x.requires_grad_() for x in (u, delta, A, B, C)]
    grad = torch.randn(u.shape, generator=g)
    found, true = (
        [out, *torch.autograd.grad(out, leaves, grad)]
        for out in (kk.selective_scan(*leaves, backend=b) for b in ("triton", "reference"))
    )
    for x, y in zip(found, true, strict=True):
        torch.testing.assert_close(x, y)


@triton.jit
def _functions_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    cos, sin = cos_sin(x)
    tl.store(out_ptr + at, cos)
    tl.store(out_ptr + SIZE + at, sin)
    tl.store(out_ptr + 2 * SIZE + at, softplus(x))


def test_the_functions_of_a_step() -> None:
    """Angles up to thousands; softplus at both ends and around zero."""
    large = torch.logspace(-6, 3.7, 128)
    x = torch.cat([large, -large])
    out = torch.empty(3, 256)
    _functions_kernel[(1,)](x, out, 256)
    wide = x.double()
    assert (out[0] - wide.cos()).abs().max() < 2e-7
    assert (out[1] - wide.sin()).abs().max() < 2e-7
    near = x > -80
    true = torch.nn.functional.softplus(wide, threshold=100)
    assert ((out[2] - true).abs() / true)[near].max() < 4e-6
    assert ((out[2] - true).abs() / true)[x > -1].max() < 3e-7


def test_borders_of_packed_sequences() -> None:
    assert borders(torch.tensor([0, 0, 2, 2, 3, 6, 6]), 6).tolist() == [6, 5, 15, 18, 16, 17]


# ---- configurations


def rule(rows: int, L: int, d: int, n: int = 16, **options: Any) -> Config:
    return configure(rows, L, d, n, options.get("parts", 1), options.get("groups", 1), 132)


def test_the_rule_for_programs() -> None:
    assert rule(8, 2048, 2048)[:4] == (16, 32, 8, 1)
    assert rule(8, 2048, 2048, parts=2)[:4] == (16, 8, 4, 1)
    assert rule(8, 2048, 2048, n=5)[:3] == (8, 32, 8)
    assert rule(8, 2048, 2048, n=64)[:4] == (64, 8, 2, 1)
    assert rule(8, 2048, 2048, n=256)[:4] == (256, 8, 1, 4)


def test_the_rule_for_splits() -> None:
    """Only where the device would be mostly idle, in whole chunks, four at least."""
    assert rule(8, 2048, 2048).split_length >= 2048
    assert rule(4096, 16, 256).split_length >= 16
    assert rule(1, 65536, 256).split_length == 512
    assert rule(1, 100, 1).split_length == 128
    assert rule(1, 10**6, 1, n=40).split_length % 64 == 0


def test_the_rule_for_tiles() -> None:
    """A chunk is a tile."""
    assert configure_tile(2048, 16, 1, False) == Tile(4, 8, 16, 2)
    assert configure_tile(2048, 16, 1, True) == Tile(4, 8, 16, 4)
    assert configure_tile(2048, 16, 2, False) == Tile(4, 8, 8, 2)
    assert configure_tile(2048, 40, 1, False) == Tile(4, 16, 8, 2)
    assert configure_tile(2048, 65, 1, False).RUNS == 32
    assert configure_tile(2048, 256, 1, False) == Tile(4, 64, 8, 8)
    assert configure_tile(16, 16, 1, False) == Tile(4, 4, 32, 2)
    assert configure_tile(1, 16, 1, False) == Tile(1, 1, 32, 1)


# ---- selective_state_update


def update_inputs(
    batch: int, H: int, P: int, n: int, groups: int, dtype: torch.dtype, state: torch.dtype
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    return {
        "state": draw(batch + 3, H, n, P).to(state).mT,
        "x": draw(batch, P, H).to(dtype).mT,
        "dt": draw(batch, H, 1).to(dtype).expand(batch, H, P),
        "A": -draw(H, 1, 1).abs().expand(H, P, n),
        "B": draw(batch, groups, n).to(dtype),
        "C": draw(batch, groups, n).to(dtype),
        "D": draw(H, 1).expand(H, P),
        "z": draw(batch, H, P).to(dtype),
        "dt_bias": draw(H, P),
    }


@pytest.mark.parametrize("n", [1, 5, 16])
@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.float32, torch.float32), (BF16, torch.float32), (FP16, FP16), (BF16, BF16)],
)
@pytest.mark.parametrize("options", [True, False])
def test_update(
    n: int, dtype: torch.dtype, state: torch.dtype, options: bool, poisoned: None
) -> None:
    inputs = update_inputs(3, 4, 5, n, 2, dtype, state)
    indices = torch.tensor([4, -1, 1]) if options else None
    if not options:
        inputs = {k: x for k, x in inputs.items() if k not in ("D", "z", "dt_bias")}
        inputs["state"] = inputs["state"][:3]
        inputs["dt"] = inputs["dt"].abs()
    results = {}
    for backend in ("triton", "reference", "float64"):
        copies = {k: x.double() if backend == "float64" else x for k, x in inputs.items()}
        copies["state"] = copies["state"].clone(memory_format=torch.preserve_format)
        out = kk.selective_state_update(
            **copies,
            dt_softplus=options,
            state_batch_indices=indices,
            backend="reference" if backend == "float64" else backend,
        )
        results[backend] = out, copies["state"]
    for found, own, true in zip(*results.values(), strict=True):
        assert found.dtype == own.dtype
        allowed = 2 * (own - true).abs().max() + 4 * torch.finfo(own.dtype).eps * true.abs().max()
        assert (found - true).abs().max() <= allowed
    if options:
        assert results["triton"][0][1].eq(0).all()
        assert results["triton"][1][[0, 2, 3, 5]].equal(inputs["state"][[0, 2, 3, 5]])


def test_many_blocks_of_a_head(poisoned: None) -> None:
    inputs = update_inputs(1, 1, 70, 33, 1, torch.float32, torch.float32)
    state = inputs.pop("state")[:1]
    states = state.clone(), state.clone()
    outs = [
        kk.selective_state_update(own, **inputs, backend=backend)
        for own, backend in zip(states, ("triton", "reference"), strict=True)
    ]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*states)


def test_the_rule_for_updates() -> None:
    assert configure_update(64, 128) == (128, 8, 4)
    assert configure_update(1536, 16) == (16, 64, 4)
    assert configure_update(3, 5) == (8, 4, 1)
    assert configure_update(64, 2048) == (2048, 1, 4)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_case_on_a_gpu(case: Case) -> None:
    check(case, "triton", device="cuda")


REAL_SIZES = [
    Case(batch=2, L=2048, d=1536, n=16, dtype=BF16),
    Case(batch=1, L=20_001, d=256, n=16),
    Case(batch=1, L=5000, d=64, n=16, complex=True),
    Case(batch=2, L=700, d=96, n=128, dtype=BF16, B="group", C="group"),
    Case(batch=2, L=700, d=30, n=256, strided=True),
    packed((0, 3, 4000, 0, 77, 919, 1), d=256, n=16, dtype=BF16),
    packed((16,) * 512, d=256, n=16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: Case) -> None:
    check(case, "triton", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("indices", [None, [3, -1, 1, 1_000_000]])
def test_updates_on_a_gpu(indices: list[int] | None) -> None:
    inputs = update_inputs(4, 24, 64, 128, 1, BF16, torch.float32)
    if indices is None:
        inputs["state"] = inputs["state"][:4]
    rows = None if indices is None else torch.tensor(indices)
    on_gpu = {k: x.cuda() for k, x in inputs.items()}
    out = kk.selective_state_update(
        **on_gpu,
        dt_softplus=True,
        state_batch_indices=None if rows is None else rows.cuda(),
        backend="triton",
    )
    # on CPU, one past the end raises
    rows = None if rows is None else rows.where(rows < len(inputs["state"]), -1)
    true = kk.selective_state_update(
        **inputs, dt_softplus=True, state_batch_indices=rows, backend="reference"
    )
    torch.testing.assert_close(out.cpu(), true)
    torch.testing.assert_close(on_gpu["state"].cpu(), inputs["state"])


@pytest.mark.gpu
def test_bitwise_the_same_again_and_again() -> None:
    from tests.scan.selective_cases import make, run

    case = replace(REAL_SIZES[1], L=8001)
    inputs = make(case, "cuda")
    first = run(case, inputs, "triton")
    for _ in range(5):
        again = run(case, inputs, "triton")
        assert all(torch.equal(x, again[name]) for name, x in first.items())
