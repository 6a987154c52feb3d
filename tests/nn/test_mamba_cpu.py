"""A Mamba mixer's operators on CPU: the step in one call, and the convolution."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import kexue_kernels as kk
from kexue_kernels import _extension
from kexue_kernels.nn.scan import mixing
from kexue_kernels.scan import mamba_operators
from tests.scan.cases import error

_C = _extension.load().module
if _C is None:
    pytest.skip(_extension.load().reason, allow_module_level=True)
from kexue_kernels.scan import cpu_mamba  # noqa: E402

HALVES_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step in one call."""
    made: list[int] = []
    real = cpu_mamba.step

    def counted(x: Tensor, *rest: object) -> None:
        made.append(x.shape[0])
        real(x, *rest)

    monkeypatch.setattr(cpu_mamba, "step", counted)
    return made


def make(dim: int = 37, dtype: torch.dtype = torch.float32, **options) -> kk.nn.MambaMixer:
    torch.manual_seed(0)
    mixer = kk.nn.MambaMixer(dim, state_dim=5, **options)
    with torch.no_grad():
        mixer.D.normal_()
        mixer.dt_proj.bias += 2
        for parameter in mixer.parameters():
            parameter.copy_(parameter.to(dtype))
    return mixer.to(dtype)


Step = tuple[Tensor, Tensor, Tensor]


def step(mixer: nn.Module, x: Tensor, window: Tensor, state: Tensor, eps: float | None) -> Step:
    """y, and the window and state after it."""
    window, state = window.clone(), state.clone()
    normalise = None if eps is None else mixing.RMSNormalise(eps)
    with torch.no_grad():
        y = mixing.mix_step(mixer, x[:, None], window, state, normalise=normalise)
    return y[:, 0], window, state


@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE)
@pytest.mark.parametrize(
    ("options", "kept", "eps"),
    [
        ({}, 3, None),
        ({"bias": True, "dt_rank": 4}, 4, 1e-5),
        ({"conv_kernel": 1, "conv_bias": False}, 0, None),
        ({"conv_kernel": 2, "expand": 1}, 2, 1e-2),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_in_one_call(
    options: dict[str, object],
    kept: int,
    eps: float | None,
    batch: int,
    dtype: torch.dtype,
    isa: str,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As near to float64 as PyTorch's calls are, twice, and some roundings."""
    mixer = make(dtype=dtype, **options)
    x = torch.randn(batch, mixer.dim).to(dtype)
    window = torch.randn(batch, mixer.inner, kept).to(dtype).mT  # as Transformers keeps it
    state = torch.randn(batch, mixer.inner, mixer.state_dim)
    found = step(mixer, x, window, state, eps)
    assert calls == [batch]
    monkeypatch.setattr(mamba_operators, "step_serves", lambda *_: False)
    plain = step(mixer, x, window, state, eps)
    double = [part.double() for part in (x, window, state)]
    exact = step(copy.deepcopy(mixer).double(), *double, eps)
    assert calls == [batch]
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if true.numel():
            rounding = torch.finfo(dtype).eps * true.abs().max().item()
            assert error(ours, true) <= 2 * error(theirs, true) + 4 * rounding


def test_threads_change_nothing() -> None:
    mixer, before = make(448, dt_rank=300), torch.get_num_threads()  # every stage is shared
    x, state = torch.randn(2, 448), mixer.initial_state(2)
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        with torch.no_grad():
            y, after = mixer.step(x, state)
        found.append((y, *after))
    torch.set_num_threads(before)
    assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "obstacle", ["rows", "double", "hook", "pre-hook", "forward", "act", "autocast", "subclass"]
)
def test_what_is_not_one_call(obstacle: str, calls: list[int]) -> None:
    """Nobody who listens to a part, or replaced it, is passed over."""
    mixer, seen = make(6), []
    x = torch.randn(2, 6)
    if obstacle == "rows":
        x = torch.randn(mamba_operators.LARGEST_BATCH + 1, 6)
    elif obstacle == "double":
        mixer, x = mixer.double(), x.double()
    elif obstacle == "hook":
        mixer.x_proj.register_forward_hook(lambda *_: seen.append(1))
    elif obstacle == "pre-hook":
        mixer.in_proj.register_forward_pre_hook(lambda *_: seen.append(1))
    elif obstacle == "forward":
        mixer.out_proj.forward = lambda y: (seen.append(1), F.linear(y, mixer.out_proj.weight))[1]
    elif obstacle == "act":
        mixer.act = F.gelu
    elif obstacle == "subclass":
        mixer.dt_proj = type("Own", (nn.Linear,), {})(1, 12)
    with torch.no_grad(), torch.autocast("cpu", enabled=obstacle == "autocast"):
        y, _ = mixer.step(x, mixer.initial_state(len(x)))
        expected = mixer(x[:, None])[:, 0]
    assert calls == []
    assert len(seen) == (2 if "hook" in obstacle or obstacle == "forward" else 0)
    unit = 2**-7 if obstacle == "autocast" else 1e-6
    assert (y - expected).abs().max() <= 8 * unit * expected.abs().max()


def test_without_the_extension(calls: list[int], without_extension: None) -> None:
    mixer, x = make(6), torch.randn(2, 9, 6)
    with torch.no_grad():
        expected, state = mixer(x), mixer.initial_state(2)
        for t in range(9):
            y, state = mixer.step(x[:, t], state)
            assert_close(y, expected[:, t])
    assert calls == []


def test_state_strides_and_dtypes() -> None:
    mixer = make(6)
    x, window = torch.randn(2, 6), torch.randn(2, 3, 12)
    state = torch.randn(2, 5, 12).bfloat16()
    expected = step(mixer, x, window, state.mT.float(), None)
    own = state.clone().mT
    with torch.no_grad():
        y = mixing.mix_step(mixer, x[:, None], window, own)
    assert_close(y[:, 0], expected[0])
    assert_close(own, expected[2].bfloat16())
    assert_close(window, expected[1])


# ---- the convolution


def plain_conv(x: Tensor, window: Tensor | None, taps: Tensor, bias: Tensor | None) -> Tensor:
    behind = x.new_zeros(x.shape[0], len(taps) - 1, x.shape[2]) if window is None else window
    inputs = torch.cat((behind, x), 1).mT
    weight = taps.T[:, None].to(x.dtype)
    own = None if bias is None else bias.to(x.dtype)
    return F.silu(F.conv1d(inputs, weight, own, groups=x.shape[2]).mT)


@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE)
@pytest.mark.parametrize("K", [1, 2, 4, 7])
@pytest.mark.parametrize("L", [1, 3, 40])
@pytest.mark.parametrize("layout", ["split", "channels first"])
def test_convolution(L: int, K: int, layout: str, dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(0)
    B, d = 2, 37
    if layout == "split":
        x = torch.randn(B, L, 2 * d).to(dtype)[..., d:]
    else:
        x = torch.randn(B, d, L).to(dtype).mT
    window = torch.randn(B, d, K - 1).to(dtype).mT if L != 3 else None
    taps = torch.randn(K, d).to(dtype).float()
    bias = None if K == 2 else torch.randn(d).to(dtype).float()
    y = mamba_operators.causal_conv(x, window, taps, bias, True)
    double = [None if part is None else part.double() for part in (x, window, taps, bias)]
    exact, plain = plain_conv(*double), plain_conv(x, window, taps, bias)
    rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert error(y, exact) <= 2 * error(plain, exact) + rounding


def test_convolution_alone_and_on_threads() -> None:
    torch.manual_seed(0)
    before, x, taps = torch.get_num_threads(), torch.randn(3, 90, 200), torch.randn(4, 200)
    found = []
    for count in (1, 4):
        torch.set_num_threads(count)
        found.append(mamba_operators.causal_conv(x, None, taps, None, False))
    torch.set_num_threads(before)
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert_close(F.silu(found[0]), plain_conv(x, None, taps, None))


# ---- the operators


def test_opcheck() -> None:
    mixer = make(6, bias=True)
    own = mixing.constants(mixer)
    weights = mixer.in_proj.weight, mixer.in_proj.bias, own.taps, own.conv_bias
    weights += mixer.x_proj.weight, mixer.dt_proj.weight, own.dt_bias, own.A, own.D
    weights += mixer.out_proj.weight, mixer.out_proj.bias
    plain = [part.detach() for part in weights]
    inputs = torch.randn(2, 6), torch.randn(2, 3, 12), torch.randn(2, 12, 5)
    torch.library.opcheck(torch.ops.kexue_kernels.mamba_step.default, (*inputs, *plain, 1e-5))
    x, window = torch.randn(2, 9, 12), torch.randn(2, 3, 12)
    arguments = x, window, own.taps, own.conv_bias, True
    torch.library.opcheck(torch.ops.kexue_kernels.causal_conv.default, arguments)


def test_a_step_in_place_is_seen_by_autograd() -> None:
    mixer, state = make(6), torch.randn(1, 12, 5)
    before = state._version
    with torch.no_grad():
        mixing.mix_step(mixer, torch.randn(1, 1, 6), torch.zeros(1, 3, 12), state)
    assert state._version > before


def test_gradients_are_refused() -> None:
    x = torch.randn(1, 3, 4, requires_grad=True)
    y = mamba_operators.causal_conv(x, None, torch.randn(2, 4), None, True)
    with pytest.raises(RuntimeError, match="causal_conv can't be differentiated"):
        y.sum().backward()
