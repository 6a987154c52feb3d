"""linear_scan's C++ kernels: every instruction set, threads and their shares, strides, halves."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels import _extension
from kexue_kernels.scan import blocked_linear_scan, cpu_linear_scan
from tests import cpu
from tests.scan.cases import ALL, DTYPES, Case, Inputs, check, error, make, packed, widened

_C = cpu.extension()

ISAS = _C.cpu_isas()
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_reference(case: Case, isa: str, poisoned: None) -> None:
    check(case, "cpu")


# Each has work for three threads: in channel ranges, in chunks of L that begin sequences or fall
# amid them, in both at once.
SHARED = [
    Case(B=1, L=800, D=67),
    Case(B=1, L=6300, D=8),
    Case(B=1, L=3200, D=16, dtype=torch.complex64, reverse=True),
    Case(B=4, L=1600, D=9, a="channel"),
    Case(B=3, L=2200, D=8, a="step", dtype=torch.bfloat16, reverse=True),
    Case(B=1, L=6300, D=8, a="invariant", strided=True, initial=None),
    packed((0, 2100, 5, 64, 1900, 0, 128, 2000, 0), D=8, dtype=torch.float16),
    packed((3000, 3300), D=8, a="channel", reverse=True),
]


def run_launcher(launcher: ModuleType, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients: too many steps here for the reference's loop."""
    a = inputs.a.view((1,) * (3 - inputs.a.ndim) + inputs.a.shape)
    initial = inputs.initial_state
    options = inputs.cu_seqlens, case.reverse
    h, final = launcher.forward(a, inputs.b, initial, *options, True)
    grads = launcher.backward(a, h, initial, inputs.grad_h, inputs.grad_final, *options)
    grad_a, grad_b, grad_initial = grads
    found = {
        "h": h,
        "final": final,
        "grad_a": grad_a.sum_to_size(a.shape).to(a.dtype),
        "grad_b": grad_b,
    }
    return found if initial is None else {**found, "grad_initial": grad_initial}


def check_long(case: Case, threads: int) -> None:
    """As `check`; what PyTorch makes of it comes from the blocked launcher."""
    inputs = make(case)
    exact = run_launcher(blocked_linear_scan, case, widened(inputs))
    torch_own = run_launcher(blocked_linear_scan, case, inputs)
    torch.set_num_threads(threads)
    for name, value in run_launcher(cpu_linear_scan, case, inputs).items():
        rounding = torch.finfo(value.dtype).eps * exact[name].abs().max().item()
        allowed = 2 * error(torch_own[name], exact[name]) + 4 * rounding
        assert value.dtype == torch_own[name].dtype, name
        assert error(value, exact[name]) <= allowed, name


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_threads_and_their_shares(
    case: Case, count: int, keep_threads: None, poisoned: None
) -> None:
    check_long(case, count)


# At least 8 MiB: such outputs are written past the caches where their rows are cache lines.
LARGE = [
    Case(B=1, L=130, D=16384),
    Case(B=1, L=70, D=16384, dtype=torch.complex64, reverse=True),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_outputs(case: Case, isa: str, keep_threads: None, poisoned: None) -> None:
    check_long(case, 2)


@pytest.mark.parametrize("shape", [(1, 900, 70), (1, 40000, 3), (5, 700, 20)], ids=str)
def test_bitwise_reproducible(shape: tuple[int, ...], keep_threads: None) -> None:
    a, b = torch.rand(shape), torch.randn(shape)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first = kk.linear_scan(a, b, backend="cpu")
        assert all(torch.equal(first, kk.linear_scan(a, b, backend="cpu")) for _ in range(5))


def test_channel_ranges_and_whole_sequences_do_not_change_a_bit(keep_threads: None) -> None:
    for shape in ((1, 500, 160), (6, 500, 33)):
        a, b = torch.rand(shape), torch.randn(shape)
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kk.linear_scan(a, b, backend="cpu"))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_zero_state_does_not_meet_an_overflowed_product(
    dtype: torch.dtype, keep_threads: None
) -> None:
    torch.set_num_threads(3)
    a, b = torch.full((1, 9000, 8), 2, dtype=dtype), torch.zeros(1, 9000, 8, dtype=dtype)
    b[:, -3:] = 1
    h = kk.linear_scan(a, b, backend="cpu")
    assert h[0, -1].tolist() == [7] * 8
    assert not h[0, :-3].any()


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [2**16, 4, 1])
def test_every_half_is_read_and_written_as_it_is(dtype: torch.dtype, width: int, isa: str) -> None:
    b = every_half(dtype).view(-1, 1, width)
    h, final = kk.linear_scan(torch.zeros_like(b), b, return_final_state=True, backend="cpu")
    torch.testing.assert_close(h, b, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(final, b[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [2**12, 4, 1])
def test_halves_are_rounded_to_nearest_even(dtype: torch.dtype, width: int, isa: str) -> None:
    """Of float32 near every half: midway to the next, one bit to either side, and any bits."""
    half = every_half(dtype).float().view(torch.int32)
    step = half.roll(-1) - half
    midway = (half + step // 2)[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)
    anything = torch.randint(-(2**31), 2**31, (2**16,)).to(torch.int32)
    values = torch.cat([midway.flatten(), anything]).view(torch.float32).view(-1, width)
    ones = torch.ones(width, dtype=dtype)
    zeros = torch.zeros(values.shape[0], 1, width, dtype=dtype)
    h = kk.linear_scan(ones, zeros, values, backend="cpu")
    torch.testing.assert_close(h[:, 0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


def relaid(x: Tensor, layout: str) -> Tensor:
    """The same values [B, L, D] in another place, NaN around them where there is a gap."""
    if layout == "channels first":
        return x.mT.contiguous().mT
    if layout == "time first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    B, L, D = x.shape
    if layout == "window":
        wide = x.new_full((B + 1, L + 2, D + 3), torch.nan)
        wide[1:, 1:-1, 2:-1] = x
        return wide[1:, 1:-1, 2:-1]
    wide = x.new_full((B, L, D, 4999), torch.nan)  # "far channels"
    wide[..., 7] = x
    return wide[..., 7]


LAYOUTS = ("channels first", "time first", "window", "far channels")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_layouts_do_not_change_a_bit(layout: str, dtype: torch.dtype, reverse: bool) -> None:
    shape = (2, 3, 5) if layout == "far channels" else (2, 150, 131)
    wide = dtype if dtype.is_complex else torch.float32
    a, b, grad = torch.randn(3, *shape, dtype=wide).to(dtype)
    a = a / 2

    def outputs(*inputs: Tensor) -> list[Tensor]:
        a, b, grad = (x.detach() for x in inputs)
        leaves = a.requires_grad_(), b.requires_grad_()
        h = kk.linear_scan(*leaves, reverse=reverse, backend="cpu")
        return [h, *torch.autograd.grad(h, leaves, grad)]

    plain = outputs(a, b, grad)
    for found in (
        outputs(relaid(a, layout), relaid(b, layout), relaid(grad, layout)),
        outputs(a, relaid(b, layout), grad),
        outputs(relaid(a, layout), b, grad),
    ):
        assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


def test_offsets_past_2_to_the_31(tmp_path: Path) -> None:
    """In a file with holes: only what is touched exists."""
    step = 2**31 + 8
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * step + 64)
    b = storage.as_strided((1, 3, 17), (0, step, 1))
    values = torch.randn(1, 3, 17)
    b.copy_(values)
    channel_far = storage.as_strided((1, 17, 3), (0, 1, step))
    for a, x in ((torch.full((17,), 0.5), b), (torch.full((3,), 0.5), channel_far)):
        expected = kk.linear_scan(a, x.contiguous(), backend="reference")
        torch.testing.assert_close(kk.linear_scan(a, x, backend="cpu"), expected)


def status_with_isa(name: str) -> str:
    code = "import kexue_kernels as kk; print(kk.backends()['cpu'].reason)"
    environment = {**os.environ, "KEXUE_CPU_ISA": name}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_the_environment_chooses_the_instruction_set() -> None:
    assert status_with_isa("baseline") == "C++ extension (baseline)\n"
    refused = status_with_isa("mmx")
    assert "KEXUE_CPU_ISA: expected one of baseline" in refused
    assert "got mmx" in refused


def test_the_instruction_set_is_checked() -> None:
    with pytest.raises(ValueError, match="name: expected one of baseline"):
        _C.set_cpu_isa("mmx")
    assert _C.cpu_isa() == ISAS[-1]


def test_the_build_says_what_it_found() -> None:
    assert _C.interface == _extension.INTERFACE
    assert _C.build_info.keys() == {"compiler", "openmp", "cuda", "archs"}
    assert _C.has_cuda == bool(_C.build_info["cuda"]) == bool(_C.build_info["archs"])
