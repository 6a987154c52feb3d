"""selective_scan and its one step on CPU: every instruction set, threads and their shares,
strides, extremes; and the blocked PyTorch that serves without the extension."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.scan import blocked_selective_scan, reference
from kexue_kernels.scan.chunks import SelectiveInputs, chunk_length
from tests import cpu
from tests.scan.cases import error
from tests.scan.selective_cases import ALL, NAMES, Case, Inputs, check, make, packed, run, widened

_C = cpu.extension()
from kexue_kernels.scan import cpu_selective_scan  # noqa: E402

ISAS = _C.cpu_isas()


MORE = [
    Case(batch=1, L=35, d=40, n=5, B="group"),
    Case(batch=1, L=34, d=18, n=3, complex=True, B="group"),
    Case(batch=2, L=33, d=33, n=2, dtype=torch.bfloat16, strided=True),
    packed((31, 2, 64, 0, 7), d=18, B="invariant", C="invariant"),
]


@pytest.mark.parametrize("case", ALL + MORE, ids=str)
def test_against_the_reference(case: Case, isa: str, poisoned: None) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("case", ALL + MORE, ids=str)
def test_without_the_extension(case: Case, without_extension: None, poisoned: None) -> None:
    check(case, "cpu")


# Each has work for three threads: in channel ranges, in chunks of L that begin sequences or fall
# amid them, in both at once.
SHARED = [
    Case(batch=1, L=800, d=67, n=3),
    Case(batch=1, L=6300, d=8, n=1),
    Case(batch=1, L=3200, d=16, n=1, complex=True, B="group"),
    Case(batch=4, L=1600, d=9, n=2, C="invariant"),
    Case(batch=1, L=6300, d=8, n=1, B="invariant", strided=True, dtype=torch.bfloat16),
    packed((0, 2100, 5, 64, 1900, 0, 128, 2000, 0), d=8, n=1),
    packed((3000, 3300), d=8, n=1, complex=True, C="invariant", initial=False),
]


def run_launcher(launcher: ModuleType, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients: too many steps here for the reference's loop."""
    given = [inputs.tensors.get(name) for name in NAMES]
    for i in (3, 4):  # B and C
        if given[i].ndim == 3:
            given[i] = given[i].unsqueeze(2)
    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.long()
    normal = SelectiveInputs(*given, cu_seqlens, case.softplus)
    out = normal.u.new_empty(normal.u.shape)
    final = torch.empty_like(inputs.grad_final)
    chunks = -(-case.L // chunk_length(case.n))
    checkpoints = normal.A.new_empty(case.batch, chunks, case.n, case.d)
    launcher.forward(normal, out, final, checkpoints)
    grads = launcher.backward(inputs.grad_out, inputs.grad_final, normal, checkpoints)
    named = {name: g for name, g in grads._asdict().items() if g is not None}
    return {"out": out, "final": final, "checkpoints": checkpoints, **named}


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_threads_and_their_shares(case: Case, keep_threads: None, poisoned: None) -> None:
    """As `check`, with the blocked launcher for PyTorch; and the same each time."""
    inputs = make(case)
    exact = run_launcher(blocked_selective_scan, case, widened(inputs))
    torch_own = run_launcher(blocked_selective_scan, case, inputs)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found = run_launcher(cpu_selective_scan, case, inputs)
        assert found.keys() == torch_own.keys()
        for name, value in found.items():
            rounding = torch.finfo(value.dtype).eps * exact[name].abs().max().item()
            allowed = 2 * error(torch_own[name], exact[name]) + 4 * rounding
            assert value.dtype == torch_own[name].dtype, name
            assert error(value, exact[name]) <= allowed, (name, count)
        again = run_launcher(cpu_selective_scan, case, inputs)
        assert all(torch.equal(found[name], x) for name, x in again.items()), count


def test_channel_ranges_do_not_change_a_bit_of_what_belongs_to_a_channel(
    keep_threads: None,
) -> None:
    case = Case(batch=1, L=500, d=160, n=3)
    inputs, found = make(case), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run_launcher(cpu_selective_scan, case, inputs))
    for name in found[0].keys() - {"B", "C"}:
        assert torch.equal(found[0][name], found[1][name]), name
        assert torch.equal(found[0][name], found[2][name]), name


def relaid(x: Tensor, layout: str) -> Tensor:
    """The same values in another place, NaN around them where there is a gap."""
    if layout == "channels first":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "time first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = x.new_full([2 * size + 1 for size in x.shape], torch.nan)  # "window"
    window = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    window.copy_(x)
    return window


@pytest.mark.parametrize("layout", ["channels first", "time first", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_do_not_change_a_bit(layout: str, dtype: torch.dtype, isa: str) -> None:
    case = Case(batch=2, L=70, d=38, n=3, dtype=dtype, B="group", C="group")
    inputs = make(case)
    steps = {name: inputs.tensors[name] for name in ("u", "delta", "B", "C", "z")}
    moved = {name: relaid(x, layout) for name, x in steps.items()}
    other = replace(
        inputs, tensors=inputs.tensors | moved, grad_out=relaid(inputs.grad_out, layout)
    )
    plain = run(case, inputs, "cpu")
    for name, value in run(case, other, "cpu").items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("shift", [-60.0, -20.0, 19.5, 90.0, 1000.0])
def test_extreme_steps(shift: float, isa: str) -> None:
    """dt near nothing and beyond where exp overflows: the same finite numbers as PyTorch's."""
    case = Case(batch=1, L=40, d=5, n=4, bias=False)
    inputs = make(case)
    inputs.tensors["delta"] = inputs.tensors["delta"] + shift
    exact, own = run(case, widened(inputs), "reference"), run(case, inputs, "reference")
    for name, value in run(case, inputs, "cpu").items():
        rounding = torch.finfo(value.dtype).eps * exact[name].abs().max().item()
        assert error(value, exact[name]) <= 2 * error(own[name], exact[name]) + 4 * rounding, name


def one_step(delta: float, A: complex | float) -> Tensor:
    """exp(delta A), as the state's factor in a step."""
    state = torch.ones(1, 1, 1, dtype=torch.complex64 if isinstance(A, complex) else None)
    rate = torch.full((1, 1), A, dtype=state.dtype)
    _, final = kk.selective_scan(
        torch.zeros(1, 1, 1),
        torch.full((1, 1, 1), delta),
        rate,
        torch.zeros_like(rate),
        torch.zeros_like(rate),
        initial_state=state,
        return_final_state=True,
        backend="cpu",
    )
    return final[0, 0, 0]


def test_decays_from_nothing_to_infinity(isa: str) -> None:
    for delta, A in ((1.0, -1000.0), (3e38, -1.0), (3e38, -3e38)):
        assert one_step(delta, A) == 0
    for delta, A in ((1.0, 1000.0), (3e38, 1.0), (3e38, 3e38)):
        assert one_step(delta, A) == torch.inf
    assert one_step(torch.nan, -1.0).isnan()
    assert one_step(1.0, torch.nan).isnan()
    assert one_step(0.0, -5.0) == 1
    for exponent in (-86.5, -1e-6, 0.3, 88.5):
        true = torch.tensor(exponent, dtype=torch.float64).exp()
        assert abs(one_step(1.0, exponent) / true - 1) < 2e-5  # of an exponent of 90, in float32


@pytest.mark.parametrize("angle", [0.1, 3.0, 100.0, 12345.678])
@pytest.mark.parametrize("delta", [1.0, -0.3, 0.7])
def test_turns_are_as_exact_as_their_angle(angle: float, delta: float, isa: str) -> None:
    angle32, delta32 = torch.tensor(angle).double(), torch.tensor(delta).double()
    true = torch.polar(torch.ones((), dtype=torch.float64), angle32 * delta32)
    assert abs(one_step(delta, complex(0.0, angle)) - true) < 3e-7


# ---- one step


def update_inputs(
    batch: int, H: int, P: int, n: int, G: int, dtype: torch.dtype, state: torch.dtype, tied: bool
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    per_head = -torch.rand(H, generator=g) - 0.1
    A = per_head[:, None, None].expand(H, P, n) if tied else -torch.rand((H, P, n), generator=g)
    dt = draw(batch, H)[:, :, None].expand(batch, H, P) if tied else draw(batch, H, P)
    return {
        "state": torch.randn((batch + 2, H, P, n), generator=g).to(state),
        "x": draw(batch, H, P),
        "dt": dt,
        "A": A,
        "B": draw(batch, G, n),
        "C": draw(batch, G, n),
        "D": draw(H, P).float(),
        "z": draw(batch, H, P),
        "dt_bias": draw(H).float()[:, None].expand(H, P),
    }


SIZES = [(2, 1, 5, 16, 1), (1, 3, 17, 4, 1), (3, 4, 2, 33, 2), (2, 2, 20, 1, 2), (1, 4, 16, 128, 4)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALVES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F16), (F32, F16)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtypes", HALVES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_one_step(
    sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], tied: bool, isa: str, poisoned: None
) -> None:
    inputs = update_inputs(*sizes, *dtypes, tied)  # type: ignore[arg-type]
    check_update(inputs)
    check_update({name: x for name, x in inputs.items() if name not in ("D", "z", "dt_bias")})
    strided = {name: relaid(x, "window") for name, x in inputs.items() if name != "A"}
    check_update({**inputs, **strided})
    check_update({**inputs, "state": inputs["state"].mT.contiguous().mT})


def test_one_step_without_the_extension(without_extension: None, poisoned: None) -> None:
    for sizes in SIZES:
        for dtypes in HALVES:
            check_update(update_inputs(*sizes, *dtypes, True))  # type: ignore[arg-type]


def check_update(inputs: dict[str, Tensor]) -> None:
    """With indices, one of them negative: error at most twice PyTorch's, plus rounding."""
    batch, rows = inputs["x"].shape[0], inputs["state"].shape[0]
    indices = torch.arange(rows)[-batch:].flip(0)
    if batch > 1:
        indices[1] = -1

    def result(backend: str, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        given = {name: x.to(dtype or x.dtype) for name, x in inputs.items()}
        given["state"] = inputs["state"].to(dtype or inputs["state"].dtype, copy=True)
        if backend == "reference":
            out = reference.selective_state_update(
                **given, dt_softplus=True, state_batch_indices=indices
            )
        else:
            if dtype is None:  # where it lies matters
                given["state"] = torch.empty_strided(
                    inputs["state"].shape, inputs["state"].stride(), dtype=given["state"].dtype
                ).copy_(inputs["state"])
            out = kk.selective_state_update(
                **given, dt_softplus=True, state_batch_indices=indices, backend=backend
            )
        return out, given["state"]

    exact, own, found = (
        result("reference", torch.float64),
        result("reference", None),
        result("cpu", None),
    )
    for value, plain, true in zip(found, own, exact, strict=True):
        rounding = torch.finfo(value.dtype).eps * true.abs().max().item()
        assert value.dtype == plain.dtype
        assert error(value, true) <= 2 * error(plain, true) + 4 * rounding
    untouched = [row for row in range(rows) if row not in indices.tolist()]
    assert torch.equal(found[1][untouched], inputs["state"][untouched])


def test_one_step_on_several_threads(keep_threads: None) -> None:
    inputs = update_inputs(7, 3, 130, 64, 1, F32, F32, False)
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        given = {**inputs, "state": inputs["state"][:7].clone()}
        out = kk.selective_state_update(**given, backend="cpu")
        results.append((out, given["state"]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
