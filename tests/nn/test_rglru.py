"""kk.nn.RGLRU against Griffin's equations 1 to 4, written out as a loop."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import kexue_kernels as kk
from tests.nn.parts import check_as_near, gradients

DIM = 6
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def make(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> kk.nn.RGLRU:
    torch.manual_seed(seed)
    rglru = kk.nn.RGLRU(DIM, dtype=dtype, **options)
    with torch.no_grad():
        rglru.recurrent_gate_bias.normal_()
        rglru.input_gate_bias.normal_()
    return rglru


def naive(rglru: kk.nn.RGLRU, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    W_a = torch.block_diag(*rglru.recurrent_gate_weight)  # [in, out]
    W_x = torch.block_diag(*rglru.input_gate_weight)
    b_a, b_x = rglru.recurrent_gate_bias.flatten(), rglru.input_gate_bias.flatten()
    h = torch.zeros(len(x), DIM, dtype=x.dtype) if state is None else state
    ys = []
    for x_t in x.unbind(1):
        r, i = torch.sigmoid(x_t @ W_a + b_a), torch.sigmoid(x_t @ W_x + b_x)
        a = torch.sigmoid(rglru.Lambda) ** (8 * r)
        h = a * h + torch.sqrt(1 - a**2) * (i * x_t)
        ys.append(h)
    return torch.stack(ys, 1), h


@pytest.mark.parametrize("num_blocks", [1, 2, 6])
def test_float64_is_the_papers_equations(num_blocks: int):
    rglru = make(torch.float64, num_blocks=num_blocks)
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    got, expected = rglru(x, state, return_state=True), naive(rglru, x, state)
    assert_close(got, expected, **TIGHT)
    inputs = [x, state, *rglru.parameters()]
    assert_close(gradients(got, inputs), gradients(expected, inputs), **TIGHT)


def test_float32_is_as_near_as_the_plain_loop():
    rglru = make(num_blocks=2)
    x = torch.randn(2, 200, DIM)

    def run(model, function, dtype):
        wide = x.to(dtype).requires_grad_()
        out = function(model, wide)
        return [*out, *gradients(out, [wide, *model.parameters()])]

    exact = run(copy.deepcopy(rglru).double(), naive, torch.float64)
    plain = run(rglru, naive, torch.float32)
    check_as_near(run(rglru, lambda m, x: m(x, return_state=True), torch.float32), plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_module(dtype: torch.dtype):
    """Decays of 0.999 survive: the recurrence is in float32."""
    rglru = make(num_blocks=2).to(dtype)
    x = torch.randn(2, 64, DIM).to(dtype)
    exact, exact_state = naive(copy.deepcopy(rglru).double(), x.double())
    y, state = rglru(x, return_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    unit = torch.finfo(dtype).eps
    assert (y - exact).abs().max() <= 4 * unit * exact.abs().max()
    assert (state - exact_state).abs().max() <= 4 * unit * exact_state.abs().max()
    first, _ = rglru.step(x[:, 0], rglru.initial_state(2))
    assert (first - exact[:, 0]).abs().max() <= 4 * unit * exact.abs().max()
    assert all(g.isfinite().all() for g in gradients((y,), list(rglru.parameters())))


def test_autocast():
    rglru, x = make(), torch.randn(2, 40, DIM)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = rglru(given, return_state=True)
        exact = naive(rglru, given.float())[0]
        assert (y.dtype, state.dtype) == (given.dtype, torch.float32)
        assert (y - exact).abs().max() <= 4 * 2**-7 * exact.abs().max()


def test_stepping_is_forward():
    rglru, x = make(num_blocks=3), torch.randn(3, 20, DIM)
    expected, expected_state = rglru(x, return_state=True)
    state, ys = rglru.initial_state(3), []
    assert_close(state, torch.zeros_like(expected_state), rtol=0, atol=0)
    for x_t in x.unbind(1):
        y, state = rglru.step(x_t, state)
        ys.append(y)
    assert_close(torch.stack(ys, 1), expected)
    assert_close(state, expected_state)


def test_step_has_gradients():
    rglru = make(torch.float64)
    x = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    inputs = [x, state, *rglru.parameters()]
    y, final = naive(rglru, x[:, None], state)
    expected = gradients((y[:, 0], final), inputs)
    assert_close(gradients(rglru.step(x, state), inputs), expected, **TIGHT)


def test_chunks_with_a_carried_state_are_the_whole():
    rglru, x = make(), torch.randn(2, 50, DIM)
    whole, whole_state = rglru(x, return_state=True)
    state, ys = None, []
    for chunk in x.split([13, 1, 30, 6], dim=1):
        y, state = rglru(chunk, state, return_state=True)
        ys.append(y)
    assert_close(torch.cat(ys, 1), whole)
    assert_close(state, whole_state)


def test_packed_sequences_are_separate():
    rglru, x, states = make(), torch.randn(1, 24, DIM), torch.randn(4, DIM)
    bounds = [0, 10, 10, 11, 24]
    packed, final = rglru(x, states, cu_seqlens=torch.tensor(bounds), return_state=True)
    for n, (start, end) in enumerate(pairwise(bounds)):
        alone, alone_state = rglru(x[:, start:end], states[n : n + 1], return_state=True)
        assert_close(packed[:, start:end], alone)
        assert_close(final[n : n + 1], alone_state)


@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0), (0, 0)])
def test_zero_size(B: int, L: int):
    rglru = make()
    x = torch.randn(B, L, DIM, requires_grad=True)
    state = torch.randn(B, DIM, requires_grad=True)
    y, final = rglru(x, state, return_state=True)
    assert y.shape == (B, L, DIM)
    assert_close(final, state)  # no step, or no row
    grads = gradients((y, final), [x, state, *rglru.parameters()])
    assert all(not g.any() for g in grads[2:])


@pytest.mark.parametrize("gate", [-10.0, -40.0, -80.0, -88.5, -120.0, -1000.0])
def test_gradients_where_the_decay_rounds_to_one(gate: float):
    """r_t goes to 0, where sqrt(1 - a^2) has an infinite slope: its product with dr_t is finite."""
    rglru = make()
    double = copy.deepcopy(rglru).double()
    x = torch.randn(2, 5, DIM)
    found = []
    for model in (rglru, double):
        with torch.no_grad():
            model.recurrent_gate_weight.zero_()
            model.recurrent_gate_bias.fill_(gate)
        y = model(x.to(model.Lambda.dtype))
        found.append([y, *gradients((y,), list(model.parameters()))])
    for single, exact in zip(*found, strict=True):
        assert single.isfinite().all()
        assert_close(single.double(), exact, rtol=1e-4, atol=1e-18)


def test_initial_decays_fill_their_range():
    torch.manual_seed(0)
    rglru = kk.nn.RGLRU(4096, num_blocks=4096, a_min=0.5, a_max=0.9999)
    smallest = torch.sigmoid(rglru.Lambda.double()) ** 8
    assert_close(smallest.sort()[0], torch.linspace(0.5, 0.9999, 4096).double(), rtol=0, atol=0.02)
    assert smallest.min() >= 0.5 - 1e-5
    assert smallest.max() <= 0.9999 + 1e-5


def test_state_dict_round_trip():
    source, target = make(seed=0, num_blocks=2), make(seed=1, num_blocks=2)
    shapes = {name: list(value.shape) for name, value in source.state_dict().items()}
    assert shapes == {
        "Lambda": [6],
        "recurrent_gate_weight": [2, 3, 3],
        "recurrent_gate_bias": [2, 3],
        "input_gate_weight": [2, 3, 3],
        "input_gate_bias": [2, 3],
    }
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 12, DIM)
    assert_close(target(x), source(x), rtol=0, atol=0)


def test_weights_of_recurrent_gemma():
    """The layer of Transformers, with its Lambda of the other sign."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    config = transformers.RecurrentGemmaConfig(lru_width=DIM, num_attention_heads=2)
    theirs, ours = RecurrentGemmaRglru(config), make(num_blocks=2)
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if name != "Lambda":
                getattr(theirs, name).copy_(value)
        theirs.recurrent_param.copy_(-ours.Lambda)
        x, later = torch.randn(2, 20, DIM), torch.arange(1, 21).expand(2, -1)  # it resets at 0
        assert_close(ours(x), theirs(x, later))


def test_built_on_the_meta_device_then_materialised():
    rglru = make(device="meta").to_empty(device="cpu")
    rglru.reset_parameters()
    assert rglru(torch.randn(1, 3, DIM)).isfinite().all()


def test_compiles_whole():
    rglru, x = make(num_blocks=2), torch.randn(2, 30, DIM, requires_grad=True)
    state = torch.randn(2, DIM)
    compiled = torch.compile(rglru, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x, state, return_state=True), rglru(x, state, return_state=True)
    assert_close(got, expected)
    inputs = [x, *rglru.parameters()]
    assert_close(gradients(got, inputs), gradients(expected, inputs))


def test_a_forced_backend_never_falls_back():
    rglru = make(torch.float64, backend="cpu")
    with pytest.raises(kk.BackendUnavailableError, match="served by the reference"):
        rglru(torch.randn(1, 3, DIM, dtype=torch.float64))


def test_shows_its_sizes():
    assert repr(make()) == "RGLRU(6)"
    assert repr(make(num_blocks=2, backend="cpu")) == "RGLRU(6, num_blocks=2, backend='cpu')"


X = torch.zeros(2, 4, DIM)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: kk.nn.RGLRU(0), ValueError, "dim: expected at least 1, got 0"),
        (lambda: kk.nn.RGLRU(2.0), TypeError, "dim: expected an int, got float"),
        (lambda: make(num_blocks=4), ValueError, "num_blocks: expected a divisor of dim = 6"),
        (lambda: make(c=0), ValueError, "c: expected a positive number"),
        (lambda: make(a_min=0), ValueError, "a_min: expected a decay between"),
        (lambda: make(a_min=0.9, a_max=0.8), ValueError, "a_max: expected a decay from a_min"),
        (lambda: make(a_max=1.0), ValueError, "a_max: expected a decay"),
        (lambda: make(a_max=None), TypeError, "a_max: expected a number"),
        (lambda: make(dtype=torch.complex64), ValueError, "dtype: expected a real"),
        (lambda: make(backend="gpu"), ValueError, "backend: expected one of"),
        (lambda: make()(X[0]), ValueError, r"x: expected shape \[B, L, dim\], got \[4, 6\]"),
        (lambda: make()(X.double()), ValueError, "x: expected dtype float32, got float64"),
        (lambda: make()(X, X[:, 0].double()), ValueError, "state: expected dtype float32"),
        (lambda: make()(X, torch.zeros(3, DIM)), ValueError, "state: expected shape"),
        (lambda: make()(X, return_state=1), TypeError, "return_state: expected a bool"),
        (lambda: make()(X, cu_seqlens=torch.tensor([0, 4])), ValueError, "cu_seqlens: .* of 1"),
        (lambda: make().step(X, X[:, 0]), ValueError, r"x: .* \[B, dim\]"),
        (lambda: make().step(X[:, 0], None), TypeError, "state: expected a torch.Tensor"),
        (lambda: make().initial_state(-1), ValueError, "batch: expected at least 0"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
