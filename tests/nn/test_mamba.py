"""kk.nn.MambaMixer against Mamba's definition, written out with PyTorch's own layers."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import kexue_kernels as kk
from tests.nn.parts import check_as_near, gradients

DIM = 6
TIGHT = {"rtol": 1e-10, "atol": 1e-11}
OPTIONS = [{}, {"conv_kernel": 1}, {"conv_bias": False, "bias": True, "expand": 1, "dt_rank": 3}]


def make(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> kk.nn.MambaMixer:
    torch.manual_seed(seed)
    mixer = kk.nn.MambaMixer(DIM, state_dim=4, dtype=dtype, **options)
    with torch.no_grad():
        mixer.A_log += 0.3 * torch.randn_like(mixer.A_log)
        mixer.D.normal_()
        mixer.dt_proj.bias += 2  # steps long enough to matter
    return mixer


def random_state(mixer: kk.nn.MambaMixer, rows: int) -> kk.nn.MambaState:
    return kk.nn.MambaState(*(torch.randn_like(part) for part in mixer.initial_state(rows)))


def naive(m: kk.nn.MambaMixer, x: Tensor, state=None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the window and the ssm state; conv1d is PyTorch's, the scan a loop."""
    window, h = m.initial_state(len(x)) if state is None else state
    u, z = m.in_proj(x).chunk(2, dim=-1)
    behind = torch.cat((window, u), dim=1)
    u = F.conv1d(behind.mT, m.conv1d.weight, m.conv1d.bias, groups=m.inner).mT
    u = F.silu(u)
    dt, B, C = m.x_proj(u).split([m.dt_rank, m.state_dim, m.state_dim], dim=-1)
    delta, A = F.softplus(m.dt_proj(dt)), -torch.exp(m.A_log)
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + delta[:, t, :, None] * B[:, t, None] * u[:, t, :, None]
        ys.append((h * C[:, t, None]).sum(-1) + m.D * u[:, t])
    return m.out_proj(torch.stack(ys, 1) * F.silu(z)), behind[:, x.shape[1] :], h


@pytest.mark.parametrize("options", OPTIONS)
def test_float64_is_the_definition(options: dict[str, object]):
    mixer = make(torch.float64, **options)
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    state = [part.requires_grad_() for part in random_state(mixer, 2)]
    y, after = mixer(x, kk.nn.MambaState(*state), return_state=True)
    expected = naive(mixer, x, state)
    assert_close((y, *after), expected, **TIGHT)
    inputs = [x, *state, *mixer.parameters()]
    slopes = gradients((y, *after), inputs)
    assert_close(slopes, gradients(expected, inputs), **TIGHT)
    assert_close(mixer(x), naive(mixer, x)[0], **TIGHT)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_float32_is_as_near_as_the_plain_loop(backend: str):
    mixer = make(backend=backend)
    x = torch.randn(2, 70, DIM)

    def run(model, function, dtype):
        wide = x.to(dtype).requires_grad_()
        y, *state = function(model, wide)
        return [y, *state, *gradients((y, *state), [wide, *model.parameters()])]

    def ours(model, x):
        y, state = model(x, return_state=True)
        return y, *state

    exact = run(copy.deepcopy(mixer).double(), naive, torch.float64)
    plain = run(mixer, naive, torch.float32)
    check_as_near(run(mixer, ours, torch.float32), plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_module(dtype: torch.dtype):
    mixer = make().to(dtype)
    double = copy.deepcopy(mixer).double()
    x = torch.randn(2, 40, DIM).to(dtype)
    exact = naive(double, x.double())
    y, state = mixer(x, return_state=True)
    assert (y.dtype, state.window.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    with torch.no_grad():
        first, after = mixer.step(x[:, 0], mixer.initial_state(2))
    assert (first.dtype, after.ssm.dtype) == (dtype, torch.float32)
    unit = torch.finfo(dtype).eps
    for got, expected in ((y, exact[0]), (state.ssm, exact[2]), (first, exact[0][:, 0])):
        assert (got - expected).abs().max() <= 8 * unit * exact[0].abs().max()
    assert all(g.isfinite().all() for g in gradients((y,), list(mixer.parameters())))


def test_autocast():
    mixer, x = make(), torch.randn(2, 40, DIM)
    exact = naive(mixer, x)[0]
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = mixer(given, return_state=True)
            with torch.no_grad():
                stepped, after = mixer.step(given[:, 0], mixer.initial_state(2))
        assert y.dtype == stepped.dtype == given.dtype
        dtypes = {part.dtype for part in (*state, *after)}
        assert dtypes == {torch.float32}
        assert (y - exact).abs().max() <= 8 * 2**-7 * exact.abs().max()
        assert (stepped - exact[:, 0]).abs().max() <= 8 * 2**-7 * exact.abs().max()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_stepping_is_forward(options: dict[str, object], grad: bool):
    mixer, x = make(**options), torch.randn(3, 20, DIM)
    with torch.set_grad_enabled(grad):
        expected, expected_state = mixer(x, return_state=True)
        state, ys = mixer.initial_state(3), []
        for x_t in x.unbind(1):
            y, state = mixer.step(x_t, state)
            ys.append(y)
    assert_close(torch.stack(ys, 1), expected)
    assert_close(tuple(state), tuple(expected_state))


@pytest.mark.parametrize("grad", [False, True])
def test_a_step_leaves_its_state_alone(grad: bool):
    mixer = make()
    state = random_state(mixer, 2)
    before = [part.clone() for part in state]
    with torch.set_grad_enabled(grad):
        mixer.step(torch.randn(2, DIM), state)
    assert_close(list(state), before, rtol=0, atol=0)


def test_step_has_gradients():
    mixer = make(torch.float64)
    x = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    state = [part.requires_grad_() for part in random_state(mixer, 2)]
    inputs = [x, *state, *mixer.parameters()]
    y, *after = naive(mixer, x[:, None], state)
    expected = gradients((y[:, 0], *after), inputs)
    y, after = mixer.step(x, kk.nn.MambaState(*state))
    assert_close(gradients((y, *after), inputs), expected, **TIGHT)


@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_with_a_carried_state_are_the_whole(options: dict[str, object]):
    mixer, x = make(**options), torch.randn(2, 50, DIM)
    whole, whole_state = mixer(x, return_state=True)
    state, ys = None, []
    for chunk in x.split([13, 1, 2, 28, 6], dim=1):
        y, state = mixer(chunk, state, return_state=True)
        ys.append(y)
    assert_close(torch.cat(ys, 1), whole)
    assert_close(tuple(state), tuple(whole_state))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("options", OPTIONS)
def test_packed_sequences_are_separate(options: dict[str, object], index: torch.dtype):
    mixer, x = make(torch.float64, **options), torch.randn(1, 24, DIM, dtype=torch.float64)
    bounds = [0, 10, 10, 11, 24, 24]
    cu_seqlens = torch.tensor(bounds, dtype=index)
    states = random_state(mixer, 5)
    x.requires_grad_()
    packed, final = mixer(x, states, cu_seqlens=cu_seqlens, return_state=True)
    found = []
    for n, (start, end) in enumerate(pairwise(bounds)):
        one = kk.nn.MambaState(*(part[n : n + 1] for part in states))
        found.append(mixer(x[:, start:end], one, return_state=True))
    expected = torch.cat([y for y, _ in found], 1)
    assert_close(packed, expected, **TIGHT)
    for part in ("window", "ssm"):
        alone = torch.cat([getattr(state, part) for _, state in found])
        assert_close(getattr(final, part), alone, **TIGHT)
    inputs = [x, *mixer.parameters()]
    assert_close(gradients((packed,), inputs), gradients((expected,), inputs), **TIGHT)
    fresh = torch.cat([mixer(x[:, i:j]) for i, j in pairwise(bounds)], 1)
    assert_close(mixer(x, cu_seqlens=cu_seqlens), fresh, **TIGHT)


@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0), (0, 0)])
def test_zero_size(B: int, L: int):
    mixer = make()
    x, state = torch.randn(B, L, DIM), random_state(mixer, B)
    y, after = mixer(x, state, return_state=True)
    assert y.shape == (B, L, DIM)
    assert_close(tuple(after), tuple(state))  # no step, or no row
    with torch.no_grad():
        assert mixer.step(torch.randn(0, DIM), mixer.initial_state(0))[0].shape == (0, DIM)


def test_initialisation():
    torch.manual_seed(0)
    mixer = kk.nn.MambaMixer(512, state_dim=3, dt_min=0.01, dt_max=0.5)
    assert (mixer.inner, mixer.dt_rank) == (1024, 32)
    assert_close(mixer.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(1024, -1))
    assert_close(mixer.D, torch.ones(1024))
    log_dt = F.softplus(mixer.dt_proj.bias).log().sort()[0]
    expected = torch.linspace(torch.tensor(0.01).log(), torch.tensor(0.5).log(), 1024)
    assert_close(log_dt, expected, rtol=0, atol=0.25)
    assert mixer.dt_proj.weight.abs().max() <= 32**-0.5
    assert mixer.dt_proj.weight.std().item() == pytest.approx(32**-0.5 / 3**0.5, rel=0.05)


def test_weights_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(hidden_size=DIM, state_size=4, num_hidden_layers=1)
    theirs, ours = MambaMixer(config, layer_idx=0), make()
    assert set(theirs.state_dict()) == set(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 15, DIM)
    with torch.no_grad():
        assert_close(ours(x), theirs(x))


def test_state_dict_round_trip():
    source, target = make(seed=0), make(seed=1)
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 12, DIM)
    assert_close(target(x), source(x), rtol=0, atol=0)


def test_built_on_the_meta_device_then_materialised():
    mixer = make(device="meta").to_empty(device="cpu")
    mixer.reset_parameters()
    assert mixer(torch.randn(1, 3, DIM)).isfinite().all()


def test_compiles_whole():
    mixer, x = make(), torch.randn(2, 30, DIM, requires_grad=True)
    state = random_state(mixer, 2)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    (y, after), expected = compiled(x, state, return_state=True), mixer(x, state, return_state=True)
    assert_close((y, *after), (expected[0], *expected[1]))
    inputs = [x, *mixer.parameters()]
    assert_close(gradients((y,), inputs), gradients(expected[:1], inputs))
    step = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, expected = step(x[:, 0], state), mixer.step(x[:, 0], state)
    assert_close((got[0], *got[1]), (expected[0], *expected[1]))


def test_a_forced_backend_never_falls_back():
    mixer = make(torch.float64, backend="cpu")
    with pytest.raises(kk.BackendUnavailableError, match="served by the reference"):
        mixer(torch.randn(1, 3, DIM, dtype=torch.float64))


X = torch.zeros(2, 4, DIM)
WINDOW, SSM = torch.zeros(2, 3, 2 * DIM), torch.zeros(2, 2 * DIM, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: kk.nn.MambaMixer(0), ValueError, "dim: expected at least 1, got 0"),
        (lambda: kk.nn.MambaMixer(4, 2.0), TypeError, "state_dim: expected an int, got float"),
        (lambda: make(conv_kernel=0), ValueError, "conv_kernel: expected at least 1"),
        (lambda: make(expand=0.5), TypeError, "expand: expected an int"),
        (lambda: make(dt_rank="full"), ValueError, "dt_rank: expected one of auto"),
        (lambda: make(dt_rank=0), ValueError, "dt_rank: expected at least 1"),
        (lambda: make(dt_min=-1), ValueError, "dt_min: expected a positive number"),
        (lambda: make(bias=1), TypeError, "bias: expected a bool"),
        (lambda: make(conv_bias=None), TypeError, "conv_bias: expected a bool"),
        (lambda: make(dtype=torch.int32), ValueError, "dtype: expected a real"),
        (lambda: make(backend="gpu"), ValueError, "backend: expected one of"),
        (lambda: make()(X[0]), ValueError, r"x: expected shape \[B, L, dim\], got \[4, 6\]"),
        (lambda: make()(X.double()), ValueError, "x: expected dtype float32, got float64"),
        (lambda: make()(X, SSM), TypeError, "state: expected a MambaState, got Tensor"),
        (lambda: make()(X, (WINDOW, SSM[:1])), ValueError, "state.ssm: expected shape"),
        (lambda: make()(X, (WINDOW[:, 1:], SSM)), ValueError, "state.window: expected shape"),
        (lambda: make()(X, (WINDOW, SSM.double())), ValueError, "state.ssm: expected dtype"),
        (lambda: make()(X, (WINDOW, None)), TypeError, "state.ssm: expected a torch.Tensor"),
        (lambda: make()(X, return_state=1), TypeError, "return_state: expected a bool"),
        (lambda: make()(X, cu_seqlens=torch.tensor([0, 4])), ValueError, "cu_seqlens: .* of 1"),
        (lambda: make()(X[:1], cu_seqlens=torch.tensor([1, 4])), ValueError, "cu_seqlens: .* be 0"),
        (lambda: make()(X[:1], cu_seqlens=torch.tensor([0, 5])), ValueError, "be L = 4, got 5"),
        (lambda: make().step(X, (WINDOW, SSM)), ValueError, r"x: .* \[B, dim\]"),
        (lambda: make().step(X[:, 0], None), TypeError, "state: expected a MambaState"),
        (lambda: make().initial_state(-1), ValueError, "batch: expected at least 0"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
