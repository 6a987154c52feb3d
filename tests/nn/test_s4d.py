"""kk.nn.S4D against the paper's definitions, written out as a loop."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import kexue_kernels as kk
from tests.nn.parts import check_as_near, gradients

DIM, STATE = 3, 8
KINDS = [(init, how) for init in ("lin", "inv", "real") for how in ("zoh", "bilinear")]
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def make(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> kk.nn.S4D:
    torch.manual_seed(seed)
    return kk.nn.S4D(DIM, STATE, dtype=dtype, **options)


def naive(s4d: kk.nn.S4D, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One step at a time, in the dtype of the parameters; the conjugate modes by 2 Re."""
    A, C = -torch.exp(s4d.A_real_log), s4d.C_re
    if s4d.init != "real":
        A, C = torch.complex(A, s4d.A_imag), torch.complex(C, s4d.C_im)
    z = s4d.log_dt.exp()[:, None] * A
    if s4d.discretization == "zoh":
        dA, dB = torch.exp(z), (torch.exp(z) - 1) / A
    else:
        dA, dB = (1 + z / 2) / (1 - z / 2), s4d.log_dt.exp()[:, None] / (1 - z / 2)
    h = torch.zeros(len(x), *A.shape, dtype=A.dtype) if state is None else state
    ys = []
    for x_t in x.unbind(1):
        h = dA * h + dB * x_t[..., None]
        y = (C * h).sum(-1)
        ys.append((2 * y.real if y.is_complex() else y) + s4d.D * x_t)
    return torch.stack(ys, 1), h


def random_state(s4d: kk.nn.S4D, rows: int) -> Tensor:
    return torch.randn_like(s4d.initial_state(rows))


@pytest.mark.parametrize(("init", "how"), KINDS)
def test_float64_is_the_definition(init: str, how: str):
    s4d = make(torch.float64, init=init, discretization=how)
    x = torch.randn(2, 150, DIM, dtype=torch.float64, requires_grad=True)  # more than one run
    expected, _ = naive(s4d, x)
    inputs = [x, *s4d.parameters()]
    slopes = gradients((expected,), inputs)
    for mode in ("convolution", "recurrence"):
        s4d.mode = mode
        got = s4d(x)
        assert_close(got, expected, **TIGHT)
        assert_close(gradients((got,), inputs), slopes, **TIGHT)


@pytest.mark.parametrize(("init", "how"), KINDS)
def test_states_go_in_and_out(init: str, how: str):
    s4d = make(torch.float64, init=init, discretization=how)
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    state = random_state(s4d, 2).requires_grad_()
    got, expected = s4d(x, state, return_state=True), naive(s4d, x, state)
    assert_close(got, expected, **TIGHT)
    inputs = [x, state, *s4d.parameters()]
    assert_close(gradients(got, inputs), gradients(expected, inputs), **TIGHT)


@pytest.mark.parametrize(("init", "how"), KINDS)
@pytest.mark.parametrize("mode", ["convolution", "recurrence"])
def test_float32_is_as_near_as_the_plain_loop(init: str, how: str, mode: str):
    s4d = make(init=init, discretization=how, mode=mode)
    x = torch.randn(2, 200, DIM)

    def run(model, function, dtype):
        wide = x.to(dtype).requires_grad_()
        out = function(model, wide)
        return [out, *gradients((out,), [wide, *model.parameters()])]

    exact = run(copy.deepcopy(s4d).double(), lambda m, x: naive(m, x)[0], torch.float64)
    plain = run(s4d, lambda m, x: naive(m, x)[0], torch.float32)
    check_as_near(run(s4d, lambda m, x: m(x), torch.float32), plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_module(dtype: torch.dtype):
    s4d = make().to(dtype)
    double = copy.deepcopy(s4d).double()
    x = torch.randn(2, 40, DIM).to(dtype)
    exact, exact_state = naive(double, x.double())
    unit = torch.finfo(dtype).eps
    y, state = s4d(x, return_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.complex64)
    assert_close(state, exact_state.to(torch.complex64))
    first, _ = s4d.step(x[:, 0], s4d.initial_state(2))
    for got, expected in ((y, exact), (s4d(x), exact), (first, exact[:, 0])):
        assert got.dtype == dtype
        assert (got - expected).abs().max() <= 2 * unit * exact.abs().max()
    assert all(g.isfinite().all() for g in gradients((s4d(x),), list(s4d.parameters())))


def test_autocast():
    s4d, x = make(), torch.randn(2, 40, DIM)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            whole, (carried, _) = s4d(given), s4d(given, return_state=True)
        exact = naive(s4d, given.float())[0]
        for y in (whole, carried):
            assert y.dtype == given.dtype
            assert (y - exact).abs().max() <= 2 * 2**-7 * exact.abs().max()


@pytest.mark.parametrize(("init", "how"), KINDS)
def test_stepping_is_forward(init: str, how: str):
    s4d, x = make(init=init, discretization=how), torch.randn(3, 20, DIM)
    expected, expected_state = s4d(x), s4d(x, return_state=True)[1]
    state, ys = s4d.initial_state(3), []
    for x_t in x.unbind(1):
        y, state = s4d.step(x_t, state)
        ys.append(y)
    assert_close(torch.stack(ys, 1), expected)
    assert_close(state, expected_state)


def test_step_has_gradients():
    s4d = make(torch.float64)
    x = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    state = random_state(s4d, 2).requires_grad_()
    inputs = [x, state, *s4d.parameters()]
    y, final = naive(s4d, x[:, None], state)
    expected = gradients((y[:, 0], final), inputs)
    assert_close(gradients(s4d.step(x, state), inputs), expected, **TIGHT)


def test_chunks_with_a_carried_state_are_the_whole():
    s4d, x = make(), torch.randn(2, 50, DIM)
    state, ys = s4d.initial_state(2), []
    for chunk in x.split([13, 1, 30, 6], dim=1):
        y, state = s4d(chunk, state, return_state=True)
        ys.append(y)
    assert_close(torch.cat(ys, 1), s4d(x))


@pytest.mark.parametrize("how", ["zoh", "bilinear"])
def test_packed_sequences_are_separate(how: str):
    s4d, x = make(discretization=how), torch.randn(1, 24, DIM)
    states, bounds = random_state(s4d, 4), [0, 10, 10, 11, 24]
    packed, final = s4d(x, states, cu_seqlens=torch.tensor(bounds), return_state=True)
    for n, (start, end) in enumerate(pairwise(bounds)):
        alone, alone_state = s4d(x[:, start:end], states[n : n + 1], return_state=True)
        assert_close(packed[:, start:end], alone)
        assert_close(final[n : n + 1], alone_state)


@pytest.mark.parametrize("how", ["zoh", "bilinear"])
@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0), (0, 0)])
def test_zero_size(B: int, L: int, how: str):
    s4d = make(discretization=how)
    x, state = torch.randn(B, L, DIM, requires_grad=True), random_state(s4d, B).requires_grad_()
    y, final = s4d(x, state, return_state=True)
    assert s4d(x).shape == y.shape == (B, L, DIM)
    assert_close(final, state)  # no step, or no row
    inputs = [x, state, *s4d.parameters()]
    grads = torch.autograd.grad(y.sum() + final.abs().sum(), inputs, allow_unused=True)
    assert all(g is None or not g.any() for g in grads[2:])


@pytest.mark.parametrize("length", [0, 1, 5, 128, 129, 300])
def test_kernel_is_the_response_to_an_impulse(length: int):
    s4d = make(torch.float64)
    impulse = torch.zeros(1, max(length, 1), DIM, dtype=torch.float64)
    impulse[:, 0] = 1
    expected = naive(s4d, impulse)[0] - s4d.D * impulse
    assert_close(s4d.kernel(length), expected[0, :length].T, **TIGHT)


def test_initialisations():
    n = torch.arange(STATE // 2, dtype=torch.float64)
    lin, inv, real = (make(torch.float64, init=init) for init in ("lin", "inv", "real"))
    for s4d in (lin, inv):
        assert_close(-s4d.A_real_log.exp(), torch.full((DIM, STATE // 2), -0.5).double())
    assert_close(lin.A_imag, (math.pi * n).expand(DIM, -1))
    assert_close(inv.A_imag, (STATE / math.pi * (STATE / (2 * n + 1) - 1)).expand(DIM, -1))
    assert_close(-real.A_real_log.exp(), -(torch.arange(STATE) + 1.0).double().expand(DIM, -1))
    torch.manual_seed(0)
    log_dt = kk.nn.S4D(4096, 2, dt_min=0.01, dt_max=0.5).log_dt.sort()[0]
    uniform = torch.linspace(math.log(0.01), math.log(0.5), 4096)
    assert_close(log_dt, uniform, rtol=0, atol=0.15)
    assert log_dt.min() >= math.log(0.01) - 1e-6
    assert log_dt.max() <= math.log(0.5) + 1e-6


@pytest.mark.parametrize("mode", ["convolution", "recurrence"])
def test_a_decay_of_zero_has_a_gradient(mode: str):
    """The bilinear dA vanishes at dt A = -2."""
    s4d = make(torch.float64, init="real", discretization="bilinear", mode=mode)
    with torch.no_grad():
        s4d.log_dt.zero_()  # A = -2 is among those of "real"
    assert (s4d._discretized()[0] == 0).any()
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    inputs = list(s4d.parameters())
    expected = gradients((naive(s4d, x)[0],), inputs)
    assert_close(gradients((s4d(x),), inputs), expected, **TIGHT)


@pytest.mark.parametrize("A_real_log", [-1000.0, -30.0, 30.0, 1000.0])
@pytest.mark.parametrize("how", ["zoh", "bilinear"])
def test_stable_whatever_the_decay(A_real_log: float, how: str):
    for init in ("lin", "real"):
        s4d = make(init=init, discretization=how)
        with torch.no_grad():
            s4d.A_real_log.fill_(A_real_log)
        y = s4d(torch.ones(1, 500, DIM))
        assert all(v.isfinite().all() for v in (y, *gradients((y,), list(s4d.parameters()))))


def test_state_dict_round_trip():
    source, target = make(seed=0), make(seed=1)
    keys = {"log_dt", "D", "A_real_log", "A_imag", "C_re", "C_im"}
    assert set(source.state_dict()) == keys
    assert set(make(init="real").state_dict()) == keys - {"A_imag", "C_im"}
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 12, DIM)
    assert_close(target(x), source(x), rtol=0, atol=0)


def test_built_on_the_meta_device_then_materialised():
    s4d = make(device="meta").to_empty(device="cpu")
    s4d.reset_parameters()
    assert s4d(torch.randn(1, 3, DIM)).isfinite().all()


def test_compiles_whole():
    s4d, x = make(), torch.randn(2, 30, DIM, requires_grad=True)
    state = random_state(s4d, 2)
    compiled = torch.compile(s4d, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), s4d(x))
    got, expected = compiled(x, state, return_state=True), s4d(x, state, return_state=True)
    assert_close(got, expected)
    inputs = [x, *s4d.parameters()]
    assert_close(gradients(got, inputs), gradients(expected, inputs))


def test_a_forced_backend_never_falls_back():
    s4d = make(torch.float64, backend="cpu", mode="recurrence")
    with pytest.raises(kk.BackendUnavailableError, match="served by the reference"):
        s4d(torch.randn(1, 3, DIM, dtype=torch.float64))


def test_shows_its_sizes():
    assert repr(make()) == "S4D(3, 8)"
    text = "S4D(3, 8, init='inv', discretization='bilinear', mode='convolution')"
    assert repr(make(init="inv", discretization="bilinear", mode="convolution")) == text


X = torch.zeros(2, 4, DIM)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: kk.nn.S4D(0, STATE), ValueError, "dim: expected at least 1, got 0"),
        (lambda: kk.nn.S4D(DIM, 2.0), TypeError, "state_dim: expected an int, got float"),
        (lambda: kk.nn.S4D(DIM, 7), ValueError, "state_dim: expected an even number for 'lin'"),
        (lambda: make(init="legs"), ValueError, "init: expected one of lin, inv, real"),
        (lambda: make(init=None), TypeError, "init: expected a str"),
        (lambda: make(discretization="euler"), ValueError, "discretization: expected one of"),
        (lambda: make(mode="fft"), ValueError, "mode: expected one of"),
        (lambda: make(dt_min=0), ValueError, "dt_min: expected a positive number"),
        (lambda: make(dt_min=1.0, dt_max=0.5), ValueError, "dt_max: expected a number from"),
        (lambda: make(dt_max="1"), TypeError, "dt_max: expected a number, got str"),
        (lambda: make(dtype=torch.int32), ValueError, "dtype: expected a real"),
        (lambda: make(backend="gpu"), ValueError, "backend: expected one of"),
        (lambda: make()(X[0]), ValueError, r"x: expected shape \[B, L, dim\], got \[4, 3\]"),
        (lambda: make()(X.double()), ValueError, "x: expected dtype float32, got float64"),
        (lambda: make()(X, X), ValueError, "state: expected dtype complex64"),
        (lambda: make()(X, make().initial_state(3)), ValueError, "state: expected shape"),
        (lambda: make(mode="convolution")(X, make().initial_state(2)), ValueError, "mode: expec"),
        (lambda: make(mode="convolution")(X, return_state=True), ValueError, "mode: expected"),
        (lambda: make()(X, return_state=1), TypeError, "return_state: expected a bool"),
        (lambda: make()(X, cu_seqlens=torch.tensor([0, 4])), ValueError, "cu_seqlens: .* of 1"),
        (lambda: make().step(X, make().initial_state(2)), ValueError, r"x: .* \[B, dim\]"),
        (lambda: make().step(X[:, 0], None), TypeError, "state: expected a torch.Tensor"),
        (lambda: make().initial_state(-1), ValueError, "batch: expected at least 0"),
        (lambda: make().kernel(-1), ValueError, "length: expected at least 0"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
