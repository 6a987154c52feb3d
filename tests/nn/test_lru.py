"""kk.nn.LRU against the paper's equations, written out as a loop."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import kexue_kernels as kk

DIM, STATE = 5, 7


def make(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> kk.nn.LRU:
    torch.manual_seed(seed)
    return kk.nn.LRU(DIM, STATE, dtype=dtype, **options)


def naive(lru: kk.nn.LRU, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Orvieto et al., equations 3 and 7, one step at a time, in the dtype of the parameters."""
    decay = torch.exp(torch.complex(-torch.exp(lru.nu_log), torch.exp(lru.theta_log)))
    gamma = torch.exp(lru.gamma_log)
    B, C = torch.complex(lru.B_re, lru.B_im), torch.complex(lru.C_re, lru.C_im)
    h = torch.zeros(x.shape[0], STATE, dtype=B.dtype) if state is None else state
    ys = []
    for x_t in x.unbind(1):
        h = decay * h + gamma * (x_t.to(B.dtype) @ B.T)
        ys.append((h @ C.T).real + lru.D * x_t)
    return torch.stack(ys, 1), h


def gradients(out: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """Of a fixed random projection of the outputs."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for y in out:
        real = torch.view_as_real(y) if y.is_complex() else y
        weight = torch.randn(real.shape, generator=generator, dtype=torch.float64)
        total = total + (real.double() * weight).sum()
    return list(torch.autograd.grad(total, inputs))


def random_state(rows: int, dtype: torch.dtype = torch.complex64) -> Tensor:
    return torch.randn(rows, STATE, dtype=dtype)


def test_float64_is_the_papers_equations():
    lru = make(torch.float64)
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    state = random_state(2, torch.complex128).requires_grad_()
    got, expected = lru(x, state, return_state=True), naive(lru, x, state)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, state, *lru.parameters()]
    assert_close(gradients(got, inputs), gradients(expected, inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("L", [1, 2, 33, 200])
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_float32_is_as_near_as_the_plain_loop(L: int, backend: str):
    lru = make(backend=backend)
    double = make(torch.float64)
    double.load_state_dict(lru.state_dict())
    x, state = torch.randn(3, L, DIM), random_state(3)

    def run(model, function, dtype):
        inputs = [x.to(dtype).requires_grad_(), state.to(dtype.to_complex()).requires_grad_()]
        out = function(model, *inputs)
        return [*out, *gradients(out, [*inputs, *model.parameters()])]

    exact = run(double, naive, torch.float64)
    plain = run(lru, naive, torch.float32)
    ours = run(lru, lambda model, *args: model(*args, return_state=True), torch.float32)
    for e, p, o in zip(exact, plain, ours, strict=True):
        allowed = 2 * (p - e).abs().max() + 1e-6 * e.abs().max()
        assert o.dtype == p.dtype
        assert (o - e).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_module(dtype: torch.dtype):
    """Half parameters, complex64 recurrence: nearer to float64 than a few half roundings."""
    lru = make().to(dtype)
    double = copy.deepcopy(lru).double()
    x = torch.randn(2, 64, DIM).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, final = lru(x, return_state=True)
    exact, exact_final = naive(double, wide)
    assert y.dtype == dtype
    assert final.dtype == torch.complex64
    unit = torch.finfo(dtype).eps
    assert (y - exact).abs().max() <= 4 * unit * exact.abs().max()
    assert (final - exact_final).abs().max() <= 4 * unit * exact_final.abs().max()
    first, _ = lru.step(x[:, 0], lru.initial_state(2))
    assert first.dtype == dtype
    assert (first - exact[:, 0]).abs().max() <= 4 * unit * exact.abs().max()
    got = gradients((y,), [x, *lru.parameters()])
    expected = gradients((exact,), [wide, *double.parameters()])
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        assert (g - e).abs().max() <= 8 * unit * e.abs().max()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype: torch.dtype):
    lru = make()
    x, state = torch.randn(2, 40, DIM).to(x_dtype).requires_grad_(), random_state(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = lru(x, state, return_state=True)
        stepped, next_state = lru.step(x[:, 0], state)
    assert (y.dtype, final.dtype) == (x_dtype, torch.complex64)
    assert (stepped.dtype, next_state.dtype) == (x_dtype, torch.complex64)
    exact, exact_final = naive(lru, x.float(), state)
    assert (y - exact).abs().max() <= 4 * 2**-7 * exact.abs().max()
    assert (final - exact_final).abs().max() <= 4 * 2**-7 * exact_final.abs().max()
    assert (stepped - exact[:, 0]).abs().max() <= 4 * 2**-7 * exact.abs().max()
    for grad in gradients((y, final), [x, *lru.parameters()]):
        assert grad.isfinite().all()
        assert grad.abs().max() > 0


def test_autocast_leaves_a_float64_module_alone():
    lru, x = make(torch.float64), torch.randn(2, 6, DIM, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(lru(x), naive(lru, x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stepping_is_forward(dtype: torch.dtype):
    lru, x = make(dtype), torch.randn(3, 20, DIM, dtype=dtype)
    expected, expected_state = lru(x, return_state=True)
    state, ys = lru.initial_state(3), []
    assert_close(state, torch.zeros_like(expected_state), rtol=0, atol=0)
    for x_t in x.unbind(1):
        y, state = lru.step(x_t, state)
        ys.append(y)
    assert_close(torch.stack(ys, 1), expected)
    assert_close(state, expected_state)


def test_step_has_gradients():
    lru = make(torch.float64)
    x = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    state = random_state(2, torch.complex128).requires_grad_()
    inputs = [x, state, *lru.parameters()]
    y, final = naive(lru, x[:, None], state)
    expected = gradients((y[:, 0], final), inputs)
    assert_close(gradients(lru.step(x, state), inputs), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_with_a_carried_state_are_the_whole(reverse: bool):
    lru, x = make(), torch.randn(2, 50, DIM)
    whole, whole_state = lru(x, reverse=reverse, return_state=True)
    chunks = list(x.split([13, 1, 30, 6], dim=1))
    state, ys = lru.initial_state(2), []
    for chunk in reversed(chunks) if reverse else chunks:
        y, state = lru(chunk, state, reverse=reverse, return_state=True)
        ys.append(y)
    assert_close(torch.cat(ys[::-1] if reverse else ys, 1), whole)
    assert_close(state, whole_state)


def test_reverse_is_forward_on_the_flipped_sequence():
    lru, x = make(), torch.randn(2, 31, DIM)
    assert_close(lru(x, reverse=True), lru(x.flip(1)).flip(1))


def test_packed_sequences_are_separate():
    lru, x, states = make(), torch.randn(1, 24, DIM), random_state(4)
    bounds = [0, 10, 10, 11, 24]
    packed, final = lru(x, states, cu_seqlens=torch.tensor(bounds), return_state=True)
    for n, (start, end) in enumerate(pairwise(bounds)):
        alone, alone_state = lru(x[:, start:end], states[n : n + 1], return_state=True)
        assert_close(packed[:, start:end], alone)
        assert_close(final[n : n + 1], alone_state)


@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0), (0, 0)])
def test_zero_size(B: int, L: int):
    lru = make()
    x, state = torch.randn(B, L, DIM, requires_grad=True), random_state(B).requires_grad_()
    y, final = lru(x, state, return_state=True)
    assert y.shape == (B, L, DIM)
    assert_close(final, state)  # no step, or no row
    grads = gradients((y, final), [x, state, *lru.parameters()])
    assert [g.shape for g in grads[:2]] == [x.shape, state.shape]
    assert all(not g.any() for g in grads[2:])
    assert lru.step(torch.randn(0, DIM), lru.initial_state(0))[0].shape == (0, DIM)


def test_any_strides():
    lru = make()
    dense = torch.randn(3, 8, DIM)
    expected = lru(dense)
    wide = torch.randn(8, 3, 2 * DIM)
    wide[..., ::2] = dense.transpose(0, 1)
    assert_close(lru(wide[..., ::2].transpose(0, 1)), expected)
    assert_close(lru(dense[:1].expand(3, -1, -1)), expected[:1].expand(3, -1, -1))


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 1.0), (0.4, 0.8), (0.9, 0.999), (1.0, 1.0)])
def test_initialisation_fills_the_ring(r_min: float, r_max: float):
    torch.manual_seed(0)
    lru = kk.nn.LRU(8, 4096, r_min=r_min, r_max=r_max, max_phase=1.5, dtype=torch.float64)
    decay = lru.eigenvalues()
    squared, phase = decay.abs() ** 2, decay.angle()
    assert squared.min() >= min(r_min**2, 1 - 1e-6) - 1e-9  # 1 itself would not be stable
    assert squared.max() <= min(r_max**2, 1 - 1e-6) + 1e-9
    assert phase.min() >= 0
    assert phase.max() <= 1.5
    uniform = torch.linspace(0, 1, 4096, dtype=torch.float64)
    width = r_max**2 - r_min**2
    expected = (r_min**2 + width * uniform).clamp(max=1 - 1e-6)
    assert_close(squared.sort()[0], expected, rtol=0, atol=0.03 * width + 1e-9)
    assert_close(phase.sort()[0], 1.5 * uniform, rtol=0, atol=0.03 * 1.5)
    assert_close(lru.gamma_log.exp(), (1 - squared).sqrt())


def test_initialisation_scales_the_projections():
    torch.manual_seed(0)
    lru = kk.nn.LRU(128, 512)
    for weight, std in ((lru.B_re, 256**-0.5), (lru.B_im, 256**-0.5), (lru.C_re, 512**-0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert lru.C_im.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert lru.D.std().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("nu_log", [-60000.0, -100.0, -20.0, 0.0, 20.0, 200.0, 60000.0])
def test_stable_whatever_the_parameters(nu_log: float, dtype: torch.dtype):
    lru = make(dtype)
    with torch.no_grad():
        lru.nu_log.fill_(nu_log)
        lru.theta_log.copy_(torch.linspace(-50, 3, STATE))
    decay = lru.eigenvalues()
    assert (decay.to(torch.complex128).abs() < 1).all()
    y = lru(torch.ones(1, 100, DIM, dtype=dtype))
    grads = gradients((y,), list(lru.parameters()))
    assert all(value.isfinite().all() for value in (y, *grads))


def test_state_dict_round_trip():
    source, target = make(seed=0), make(seed=1)
    assert set(source.state_dict()) == {
        "nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D",
    }  # fmt: skip
    assert not any(value.is_complex() for value in source.state_dict().values())
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 12, DIM)
    assert_close(target(x), source(x), rtol=0, atol=0)


def test_the_same_seed_gives_the_same_module():
    for mine, yours in zip(make().parameters(), make().parameters(), strict=True):
        assert_close(mine, yours, rtol=0, atol=0)


def test_built_on_the_meta_device_then_materialised():
    lru = make(device="meta").to_empty(device="cpu")
    lru.reset_parameters()
    assert lru(torch.randn(1, 3, DIM)).isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_compiles_whole(backend: str):
    lru = make(backend=backend)
    x = torch.randn(2, 30, DIM, requires_grad=True)
    state = random_state(2).requires_grad_()
    compiled = torch.compile(lru, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x, state, return_state=True), lru(x, state, return_state=True)
    assert_close(got, expected)
    inputs = [x, state, *lru.parameters()]
    assert_close(gradients(got, inputs), gradients(expected, inputs))
    step = torch.compile(lru.step, fullgraph=True, backend="aot_eager")
    assert_close(step(x[:, 0], state), lru.step(x[:, 0], state))


def test_compiles_with_inductor():
    lru, x = make(), torch.randn(2, 30, DIM)
    compiled = torch.compile(lru, fullgraph=True)
    assert_close(compiled(x), lru(x))
    gradient = torch.autograd.grad(compiled(x).square().sum(), lru.nu_log)
    assert_close(gradient, torch.autograd.grad(lru(x).square().sum(), lru.nu_log))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu(dtype: torch.dtype):
    """On the GPU as near to float64 as on the CPU, gradients too; steps go on from forward."""
    lru = make().to(dtype)
    double = copy.deepcopy(lru).double()
    x, state = torch.randn(3, 300, DIM).to(dtype), random_state(3)

    def run(model, x, state):
        inputs = [x.detach().clone().requires_grad_(), state.detach().clone().requires_grad_()]
        out = model(*inputs, return_state=True)
        grads = torch.autograd.grad(out[0].float().sin().sum() + out[1].abs().sum(), [
            *inputs, *model.parameters(),
        ])  # fmt: skip
        return [value.cpu() for value in (*out, *grads)]

    exact = run(double, x.double(), state.to(torch.complex128))
    plain = run(lru, x, state)
    ours = run(copy.deepcopy(lru).cuda(), x.cuda(), state.cuda())
    unit = torch.finfo(dtype).eps
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert o.dtype == p.dtype
        assert (o - e).abs().max() <= 2 * (p - e).abs().max() + max(unit, 1e-6) * e.abs().max()
    lru = lru.cuda()
    y, final = lru(x[:, :-1].cuda(), return_state=True)
    whole, end = lru(x.cuda(), return_state=True)
    y, stepped = lru.step(x[:, -1].cuda(), final)
    for got, expected in ((y, whole[:, -1]), (stepped, end)):
        assert (got - expected).abs().max() <= 16 * unit * expected.abs().max()


def test_shows_its_sizes():
    assert repr(make()) == "LRU(5, 7)"
    assert repr(make(backend="reference")) == "LRU(5, 7, backend='reference')"


def test_a_forced_backend_never_falls_back():
    lru = make(torch.float64, backend="cpu")
    with pytest.raises(kk.BackendUnavailableError, match="complex128 is served by the ref"):
        lru(torch.randn(1, 3, DIM, dtype=torch.float64))


X = torch.zeros(2, 4, DIM)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: kk.nn.LRU(0, STATE), ValueError, "dim: expected at least 1, got 0"),
        (lambda: kk.nn.LRU(DIM, -1), ValueError, "state_dim: expected at least 1, got -1"),
        (lambda: kk.nn.LRU(2.0, STATE), TypeError, "dim: expected an int, got float"),
        (lambda: kk.nn.LRU(True, STATE), TypeError, "dim: expected an int, got bool"),
        (lambda: make(r_min=-0.1), ValueError, "r_min: expected a radius"),
        (lambda: make(r_min=0.9, r_max=0.8), ValueError, "r_max: expected a radius"),
        (lambda: make(r_max=1.1), ValueError, "r_max: expected a radius"),
        (lambda: make(r_max=math.nan), ValueError, "r_max: expected a radius"),
        (lambda: make(r_min="0"), TypeError, "r_min: expected a number, got str"),
        (lambda: make(max_phase=0), ValueError, "max_phase: expected an angle"),
        (lambda: make(max_phase=7), ValueError, "max_phase: expected an angle"),
        (lambda: make(dtype=torch.complex64), ValueError, "dtype: expected a real"),
        (lambda: make(dtype=torch.int32), ValueError, "dtype: expected a real"),
        (lambda: make(dtype="float32"), TypeError, "dtype: expected a torch.dtype, got str"),
        (lambda: make(backend="gpu"), ValueError, "backend: expected one of"),
        (lambda: make(backend=None), TypeError, "backend: expected a str"),
        (lambda: make()([1.0]), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda: make()(X[0]), ValueError, r"x: expected shape \[B, L, dim\], got \[4, 5\]"),
        (lambda: make()(X[..., :3]), ValueError, r"x: expected shape .*, got \[2, 4, 3\]"),
        (lambda: make()(X.double()), ValueError, "x: expected dtype float32, got float64"),
        (lambda: make()(X.long()), ValueError, "x: expected dtype float32, got int64"),
        (lambda: make()(X.to("meta")), ValueError, "x: expected device cpu"),
        (lambda: make()(X, torch.zeros(2, STATE)), ValueError, "state: expected dtype complex64"),
        (lambda: make()(X, random_state(3)), ValueError, "state: expected shape"),
        (lambda: make()(X, 0.0), TypeError, "state: expected a torch.Tensor"),
        (lambda: make()(X, reverse=1), TypeError, "reverse: expected a bool"),
        (lambda: make()(X, return_state=1), TypeError, "return_state: expected a bool"),
        (lambda: make()(X, cu_seqlens=torch.tensor([0, 4])), ValueError, "cu_seqlens: .* of 1"),
        (lambda: make()(X[:1], cu_seqlens=torch.tensor([1, 4])), ValueError, "cu_seqlens: .* be 0"),
        (lambda: make()(X[:1], cu_seqlens=[0, 4]), TypeError, "cu_seqlens: .* torch.Tensor"),
        (lambda: make().step(X, random_state(2)), ValueError, r"x: expected shape \[B, dim\]"),
        (lambda: make().step(X[:, 0], random_state(3)), ValueError, "state: expected shape"),
        (lambda: make().step(X[:, 0], None), TypeError, "state: expected a torch.Tensor"),
        (lambda: make().initial_state(-1), ValueError, "batch: expected at least 0"),
        (lambda: make().initial_state(2.0), TypeError, "batch: expected an int"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
