"""linear_scan's Triton kernel: in the interpreter with tiny tiles, and on a GPU at real sizes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.scan import blocked_linear_scan, triton_chained_scan, triton_linear_scan
from kexue_kernels.scan.triton_chained_scan import await_runs, last_row, new_chain, scan_runs
from kexue_kernels.scan.triton_linear_scan import Config, Problem, configure
from kexue_kernels.triton_common import pack
from tests.scan.cases import ALL, Case, check, error, packed

# Tiles of 4 steps, and spans of 2 groups of 2 chunks: 17 steps cross every kind of border.
SERIAL = Config(RUN=2, RUNS=2, BLOCK_D=4, num_warps=1, chained=False)
CHAINED = SERIAL._replace(chained=True, WINDOW=2)
FORCED = [
    Case(D=6),
    Case(D=6, dtype=torch.bfloat16, reverse=True),
    Case(D=3, dtype=torch.float16),
    Case(D=3, dtype=torch.complex64, reverse=True),
    Case(D=3, a="channel", initial=None),
    Case(B=1, D=4, dtype=torch.bfloat16, a="invariant", reverse=True),
    Case(D=3, dtype=torch.complex64, a="channel"),
    Case(D=2, a="step"),
    Case(D=4, a="batch", strided=True),
    Case(B=1, L=1, D=1),
    packed((3, 0, 9, 1, 0), D=3),
    packed((3, 0, 9, 1, 0), D=4, dtype=torch.bfloat16, a="channel", reverse=True),
    packed((0, 13, 4), D=2, dtype=torch.complex64, reverse=True),
    packed((0, 13, 4), D=2, dtype=torch.complex64, a="channel", initial=None),
]


def force(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(triton_linear_scan, "configure_interpreted", lambda *_: config)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_case(case: Case, poisoned: None) -> None:
    check(case, "triton")


@pytest.mark.parametrize("case", FORCED, ids=str)
@pytest.mark.parametrize("config", [SERIAL, CHAINED], ids=["serial", "chained"])
def test_tiny_tiles(
    case: Case, config: Config, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, config)
    check(case, "triton")


def test_a_chain_of_many_spans(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, CHAINED._replace(BLOCK_D=1))
    check(Case(B=1, L=100, D=1), "triton")


def test_a_nan_of_any_payload_passes_through_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits set is also what marks a word that has not been published."""
    force(monkeypatch, CHAINED)
    nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    b = torch.zeros(1, 17, 2)
    b[0, 0, 0] = nan
    h = kk.linear_scan(nan.expand(1, 17, 2), b, backend="triton")
    assert h.isnan().all()


@triton.jit
def _compose_kernel(chain_ptr, out_ptr, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    rows = tl.arange(0, ROWS)[:, None]
    a, b = await_runs(chain_ptr, rows, rows > 0, columns, D, False)
    a, b = scan_runs(a, b)
    out_ptrs = out_ptr + columns
    tl.store(out_ptrs, pack(last_row(a, ROWS, BLOCK_D), tl.float32), mask=columns < D)
    tl.store(out_ptrs + D, pack(last_row(b, ROWS, BLOCK_D), tl.float32), mask=columns < D)


def test_a_chunk_waits_for_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row more is published before each poll; row 0, not wanted, never is."""
    chain, out = new_chain(4, 3, 2, torch.device("cpu")), torch.full((2, 3), torch.nan)
    a, b = torch.rand(2, 4, 3)
    unpublished = [3, 1, 2]
    poll = triton_chained_scan._poll

    def publish_and_poll(*args: Any) -> Any:
        row = unpublished.pop(0)
        chain[1 + row] = torch.stack([a[row], b[row]], -1).view(torch.int64)[:, 0]
        return poll(*args)

    monkeypatch.setattr(triton_chained_scan, "_poll", publish_and_poll)
    _compose_kernel[(1,)](chain, out, 3, 4, 4)
    assert not unpublished
    torch.testing.assert_close(out[0], a[1:].prod(0))
    torch.testing.assert_close(out[1], (b[1] * a[2] + b[2]) * a[3] + b[3])


@pytest.mark.parametrize("window", [2, 8])
@pytest.mark.parametrize("chunks", [(1,), (0, 5, 64, 1, 0), (65, 64, 63), (3,) * 40])
def test_every_row_of_the_chain_has_one_owner(chunks: tuple[int, ...], window: int) -> None:
    """Packed sequences begin where their first step would lie in whole chunks, plus one row each;
    what ends a group or a span is told by its row."""
    size, start, owners = 10, 0, []
    rows = sum(chunks) + len(chunks)
    for n, count in enumerate(chunks):
        first = start // size + n
        last = range(first, first + max(count, 1))
        owners += [("chunk", row) for row in last]
        owners += [("group", row // window) for row in last[window - 1 :: window]]
        owners += [("span", row // window**2) for row in last[window**2 - 1 :: window**2]]
        start += count * size - n % 2 * (count > 1)
    assert len(set(owners)) == len(owners)
    room = {"chunk": rows, "group": rows // window + 1, "span": rows // window**2 + 1}
    assert all(row < room[level] for level, row in owners)
    assert new_chain(rows, 2, window, torch.device("cpu")).shape == (1 + sum(room.values()), 2)


def test_pairs_are_read_where_halves_are_whole_words() -> None:
    x = torch.zeros(2, 6, 8, dtype=torch.bfloat16)
    assert triton_linear_scan._pairs(x)
    assert triton_linear_scan._pairs(x[:, :, 2:6])
    assert triton_linear_scan._pairs(x[:1, :1].expand(2, 6, 8))
    assert not triton_linear_scan._pairs(x[:, :, 1:7])
    assert not triton_linear_scan._pairs(x[:, :, :7])
    assert not triton_linear_scan._pairs(x[:, :, ::2])
    assert not triton_linear_scan._pairs(x.mT)
    assert not triton_linear_scan._pairs(x.flatten()[1:25].view(2, 6, 2))


BF16, C64 = torch.bfloat16, torch.complex64


def rule(sequences: int, L: int, D: int, *, sms: int = 132, **options: Any) -> Config:
    return configure(Problem(sequences, L, D, **{"dtype": torch.float32, **options}), sms)


def test_the_rule_for_tiles() -> None:
    """Rows of 64 bytes, 128 threads with 16 bytes of each step."""
    assert rule(8, 16384, 1536)[:4] == (16, 32, 16, 4)
    assert rule(8, 16384, 1536, backward=True)[:4] == (8, 32, 16, 4)
    assert rule(8, 16384, 1536, dtype=BF16, paired=True)[:4] == (8, 32, 32, 4)
    assert rule(8, 16384, 1536, dtype=BF16)[:4] == (4, 32, 32, 4)
    assert rule(8, 16384, 1536, dtype=C64)[:4] == (8, 32, 8, 4)
    assert rule(8, 16384, 1536, dtype=C64, invariant=True).RUN == 16
    assert rule(1, 10**6, 1)[:3] == (16, 128, 1)
    assert rule(4, 1, 64).RUN == 1
    assert rule(4, 65, 64).RUN == 4
    assert rule(100, 6400, 64, packed=True).RUN == 2


def test_the_rule_for_chains() -> None:
    """Chained where whole sequences would leave the device idle, unless they are short."""
    assert rule(1, 1_048_576, 64).chained
    assert rule(8, 16384, 1536).chained
    assert not rule(8, 2048, 1536).chained
    assert not rule(64, 16384, 1536).chained
    assert rule(64, 16384, 1536, packed=True).chained
    assert not rule(8, 16384, 1536, sms=16).chained


def test_lengths_do_not_enter_the_compile_key() -> None:
    """Nor do the numbers of sequences: powers of two up to the longest run."""
    lengths = [1, 2, 40, 100, 129, 300, 1000, 4096, 4097, 10**5, 10**7]
    runs = {rule(n, L, 512)._replace(chained=False) for n in (1, 3, 64) for L in lengths}
    assert len(runs) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_case_on_a_gpu(case: Case) -> None:
    check(case, "triton", device="cuda")


@dataclass(frozen=True)
class Big:
    B: int
    L: int
    D: int
    dtype: torch.dtype
    reverse: bool = False
    invariant: bool = False
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        flags = {"reverse": self.reverse, "invariant": self.invariant, "packed": self.lengths}
        return "-".join([f"{self.B}x{self.L}x{self.D}", name, *(k for k, v in flags.items() if v)])


REAL_SIZES = [
    *(Big(8, 16384, 1536, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(Big(1, 1_048_576, 64, dtype) for dtype in (torch.float32, torch.bfloat16, C64)),
    Big(1, 1_048_577, 63, torch.bfloat16, reverse=True),
    Big(1, 1_048_576, 1, torch.float32, reverse=True),
    Big(64, 8192, 1024, C64, invariant=True),
    Big(8, 16384, 1536, torch.float32, reverse=True, invariant=True),
    Big(1, 500_000, 256, torch.float32, lengths=(0, 3, 400_000, 0, 77, 99_919, 1)),
    Big(1, 262_144, 512, torch.bfloat16, True, True, lengths=(64,) * 4096),
]


def big_inputs(case: Big) -> tuple[Tensor | None, list[Tensor]]:
    """cu_seqlens, and a, b, initial_state, grad_h, grad_final on the GPU."""
    wide = case.dtype if case.dtype.is_complex else torch.float32
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=g, dtype=wide, device="cuda").to(dtype)

    rows, cu_seqlens = case.B, None
    if case.lengths is not None:
        rows = len(case.lengths)
        cu_seqlens = torch.tensor((0, *case.lengths), device="cuda").cumsum(0)
    data, state = (case.B, case.L, case.D), (rows, case.D)
    phase = torch.sgn(draw(*((case.D,) if case.invariant else data), dtype=wide))
    a = (phase * torch.rand(phase.shape, generator=g, device="cuda") ** 0.1).to(case.dtype)
    states = [draw(*state, dtype=wide) for _ in range(2)]
    return cu_seqlens, [a, draw(*data), states[0], draw(*data), states[1]]


def by_blocks(
    case: Big, cu_seqlens: Tensor | None, inputs: list[Tensor], h: Tensor | None = None
) -> list[Tensor]:
    """h, final_state, grad_a, grad_b and grad_initial in blocked PyTorch. grad_a is of `h`."""
    a, b, initial, grad_h, grad_final = inputs
    a = a.expand(1, 1, -1) if case.invariant else a
    own, final = blocked_linear_scan.forward(a, b, initial, cu_seqlens, case.reverse, True)
    grad_a, grad_b, grad_initial = blocked_linear_scan.backward(
        a, own if h is None else h, initial, grad_h, grad_final, cu_seqlens, case.reverse
    )
    assert grad_a is not None
    return [own, final, grad_a.sum((0, 1)) if case.invariant else grad_a, grad_b, grad_initial]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: Big) -> None:
    """Against float64 in some channels: channels do not touch."""
    cu_seqlens, inputs = big_inputs(case)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    h, final = kk.linear_scan(
        *leaves, reverse=case.reverse, cu_seqlens=cu_seqlens, return_final_state=True,
        backend="triton",
    )  # fmt: skip
    found = [h, final, *torch.autograd.grad((h, final), leaves, inputs[3:])]
    some = torch.arange(case.D)[:: max(1, case.D // 15)].cuda()
    few = [x.detach()[..., some] for x in inputs]
    wide = torch.complex128 if case.dtype.is_complex else torch.float64
    true = by_blocks(case, cu_seqlens, [x.to(wide) for x in few])
    own = by_blocks(case, cu_seqlens, few)
    names = ("h", "final_state", "grad_a", "grad_b", "grad_initial")
    for name, x, y, exact in zip(names, found, own, true, strict=True):
        eps = torch.finfo(x.dtype).eps
        allowed = 2 * error(y, exact) + 4 * eps * exact.abs().max().item()
        assert error(x.detach()[..., some], exact) <= allowed, name


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Big(1, 1_048_576, 64, torch.float32), REAL_SIZES[-2]], ids=str)
def test_bitwise_the_same_again_and_again(case: Big) -> None:
    cu_seqlens, inputs = big_inputs(case)
    leaves = [x.requires_grad_() for x in inputs[:3]]

    def once() -> list[Tensor]:
        h, final = kk.linear_scan(
            *leaves, cu_seqlens=cu_seqlens, return_final_state=True, backend="triton"
        )
        return [h, final, *torch.autograd.grad((h, final), leaves, inputs[3:])]

    first = once()
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(first, once(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("invariant", [False, True])
def test_graph_capture_and_replay(invariant: bool) -> None:
    case = Big(2, 50_000, 96, torch.bfloat16, invariant=invariant)
    _, (a, b, initial, grad_h, grad_final) = big_inputs(case)
    a = a.expand(1, 1, -1) if invariant else a

    def both() -> list[Tensor]:
        h, final = triton_linear_scan.forward(a, b, initial, None, False, True)
        grads = triton_linear_scan.backward(a, h, initial, grad_h, grad_final, None, False)
        return [h, final, *(x for x in grads if x is not None)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(3):
        for x in (b, initial, grad_h, grad_final):
            x.normal_()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, both(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("invariant", [False, True])
def test_offsets_past_two_to_the_31(invariant: bool) -> None:
    """The last steps, and backward the first: what lies 100 steps off has faded to 2**-100."""
    L, D, near = 2**20 + 7, 2100, 164
    b = torch.randn(1, L, D, dtype=torch.bfloat16, device="cuda")
    a = torch.full((D,) if invariant else (1, L, D), 0.5, dtype=torch.bfloat16, device="cuda")
    assert b.numel() > 2**31
    a = a.expand(1, 1, -1) if invariant else a
    h, final = triton_linear_scan.forward(a, b, None, None, False, True)
    _, grad_b, _ = triton_linear_scan.backward(a, None, None, b, None, None, False)
    decay = a[:, :near].float().expand(1, near, D)
    last = kk.reference.linear_scan(decay, b[:, -near:].float())
    first = kk.reference.linear_scan(decay, b[:, :near].float(), reverse=True)
    torch.testing.assert_close(h[:, -64:].float(), last[:, -64:], rtol=0.01, atol=0.01)
    torch.testing.assert_close(final, last[:, -1])
    torch.testing.assert_close(grad_b[:, :64].float(), first[:, :64], rtol=0.01, atol=0.01)
