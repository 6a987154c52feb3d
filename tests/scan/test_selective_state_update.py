"""selective_state_update: against the scan, in every form, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kexue_kernels as kk
from tests.scan.cases import error
from tests.scan.selective_cases import Case, make

BACKENDS = ["reference", "cpu", "triton"]
NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
FORMS = {
    "plain": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "half_state": {"dtype": torch.bfloat16, "state": torch.bfloat16},
    "bare": {"left_out": ("D", "z", "dt_bias")},
    "heads": {"heads": 4, "groups": 2},
    "heads_one_group": {"heads": 3, "groups": 1, "dtype": torch.bfloat16},
    "tied": {"heads": 4, "groups": 4, "tied": True},
    "wide": {"d": 70, "n": 33},
    "narrow": {"d": 1, "n": 1, "batch": 1},
    "strided": {"strided": True},
    "strided_heads": {"heads": 2, "groups": 2, "strided": True, "state": torch.float16},
}


def build(form: dict, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    batch, d, n = form.get("batch", 3), form.get("d", 5), form.get("n", 16)
    dtype, heads = form.get("dtype", torch.float32), form.get("heads")
    inner = (heads, d) if heads else (d,)
    groups = (form["groups"],) if heads else ()

    def draw(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        if form.get("strided"):  # last axis slowest, every other number left out
            backwards = torch.randn((*reversed(shape), 2), generator=g).to(of)[..., 0]
            return backwards.permute(*reversed(range(len(shape))))
        return torch.randn(shape, generator=g).to(of)

    found = {
        "state": draw(batch, *inner, n, of=form.get("state", torch.float32)),
        "x": draw(batch, *inner, of=dtype),
        "dt": draw(batch, *inner, of=dtype),
        "A": -draw(*inner, n).abs() - 0.1,
        "B": draw(batch, *groups, n, of=dtype),
        "C": draw(batch, *groups, n, of=dtype),
        "D": draw(*inner),
        "z": draw(batch, *inner, of=dtype),
        "dt_bias": draw(*inner),
    }
    if form.get("tied"):  # one dt, A and D for a head, as in Mamba-2
        found["dt"] = found["dt"][..., :1].expand(-1, -1, d)
        found["A"] = found["A"][:, :1, :1].expand(-1, d, n)
        found["D"] = found["D"][:, :1].expand(-1, d)
        found["dt_bias"] = found["dt_bias"][:, :1].expand(-1, d)
    return {k: x for k, x in found.items() if k not in form.get("left_out", ())}


def definition(i: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """y and the next state, in double precision, a head at a time."""
    i = {k: x.double() for k, x in i.items()}
    if i["x"].ndim == 3:
        H = i["x"].shape[1]
        ys, states = [], []
        for h in range(H):
            own = {k: x[h] for k, x in i.items() if k in ("A", "D", "dt_bias")}
            own |= {k: x[:, h] for k, x in i.items() if k in ("state", "x", "dt", "z")}
            own |= {k: i[k][:, h // (H // i[k].shape[1])] for k in ("B", "C")}
            y, state = definition(own)
            ys.append(y)
            states.append(state)
        return torch.stack(ys, 1), torch.stack(states, 1)
    dt = F.softplus(i["dt"] + i.get("dt_bias", 0))[..., None]
    state = torch.exp(dt * i["A"]) * i["state"] + dt * i["B"][:, None] * i["x"][..., None]
    y = (state * i["C"][:, None]).sum(-1) + i.get("D", 0) * i["x"]
    return y * F.silu(i["z"]) if "z" in i else y, state


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_definition(form: dict, backend: str, poisoned: None) -> None:
    i = build(form)
    y_true, state_true = definition(i)
    own_state = i["state"].clone()
    own = kk.reference.selective_state_update(**{**i, "state": own_state}, dt_softplus=True)
    state = i["state"]
    address = state.data_ptr()
    y = kk.selective_state_update(**i, dt_softplus=True, backend=backend)
    assert state.data_ptr() == address
    assert y.shape == i["x"].shape
    assert y.dtype == i["x"].dtype
    for value, plain, true in ((y, own, y_true), (state, own_state, state_true)):
        scale = true.abs().max().item()
        allowed = 2 * error(plain, true) + 4 * torch.finfo(value.dtype).eps * scale
        assert allowed < 0.1 * max(1, scale)
        assert error(value, true) <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_the_scan(backend: str) -> None:
    i = make(Case(L=9)).tensors
    state = i["initial_state"].clone()
    whole, last = kk.selective_scan(**i, delta_softplus=True, return_final_state=True)
    for t in range(9):
        u, delta, B, C, z = (i[k][:, t] for k in ("u", "delta", "B", "C", "z"))
        rest = (i["D"], z, i["delta_bias"], True)
        y = kk.selective_state_update(state, u, delta, i["A"], B, C, *rest, backend=backend)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_choose_states(backend: str, heads: int | None, dtype: torch.dtype) -> None:
    form = {"heads": heads, "groups": 1}
    i = build(form)
    pool = build({**form, "batch": 6}, seed=1)["state"]
    before = pool.clone()
    indices = torch.tensor([4, -1, 0], dtype=dtype)
    y = kk.selective_state_update(
        **{**i, "state": pool}, state_batch_indices=indices, backend=backend
    )
    chosen = before[[4, 0]].clone()
    rows = {k: x[[0, 2]] if k in ("x", "dt", "B", "C", "z") else x for k, x in i.items()}
    alone = kk.reference.selective_state_update(**{**rows, "state": chosen})
    torch.testing.assert_close(y[[0, 2]], alone)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    torch.testing.assert_close(pool[[4, 0]], chosen)
    assert torch.equal(pool[[1, 2, 3, 5]], before[[1, 2, 3, 5]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_of_several_dtypes(backend: str) -> None:
    i = build({"dtype": torch.bfloat16})
    i["dt"] = i["dt"].float() + 1e-4
    y_true, state_true = definition(i)
    y = kk.selective_state_update(**i, dt_softplus=True, backend=backend)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(i["state"].double(), state_true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), y_true, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [{"batch": 0}, {"d": 0}, {"n": 0}], ids=str)
def test_zero_sizes(backend: str, form: dict) -> None:
    i = build(form)
    y = kk.selective_state_update(**i, backend=backend)
    assert y.shape == i["x"].shape
    if form == {"n": 0}:
        torch.testing.assert_close(y, i["D"] * i["x"] * F.silu(i["z"]))


def test_doubles_are_the_references() -> None:
    i = {k: x.double() for k, x in build({}).items()}
    y_true, state_true = definition(i)
    torch.testing.assert_close(kk.selective_state_update(**i, dt_softplus=True), y_true)
    torch.testing.assert_close(i["state"], state_true)


def test_a_gradient_is_refused() -> None:
    i = build({})
    i["A"].requires_grad_()
    before = i["state"].clone()
    with pytest.raises(RuntimeError, match="requires grad"):
        kk.selective_state_update(**i)
    assert torch.equal(i["state"], before)
    with torch.no_grad():
        kk.selective_state_update(**i)
    assert not torch.equal(i["state"], before)


def test_autocast() -> None:
    """Its arithmetic is float32 all the same."""
    results = []
    for enabled in (False, True):
        i = build({"dtype": torch.bfloat16})
        with torch.autocast("cpu", enabled=enabled):
            results.append((kk.selective_state_update(**i, dt_softplus=True), i["state"]))
    assert results[1][0].dtype == torch.bfloat16
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_an_axis_of_one_group(backend: str) -> None:
    i, grouped = build({}), build({})
    grouped |= {name: grouped[name][:, None] for name in ("B", "C")}
    y, same = (kk.selective_state_update(**given, backend=backend) for given in (i, grouped))
    assert torch.equal(y, same)
    assert torch.equal(i["state"], grouped["state"])


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_where_every_index_is_negative(backend: str) -> None:
    i = build({})
    before = i["state"].clone()
    indices = torch.full((3,), -1, dtype=torch.int32)
    y = kk.selective_state_update(**i, state_batch_indices=indices, backend=backend)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(i["state"], before)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_where_there_is_no_state(backend: str) -> None:
    i = build({})
    i["state"] = i["state"][:0]
    indices = torch.full((3,), -1)
    y = kk.selective_state_update(**i, state_batch_indices=indices, backend=backend)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_lazily_negated_tensors(backend: str) -> None:
    expected = build({})
    y = kk.selective_state_update(**expected, backend=backend)
    for name in expected:
        i = build({})
        i[name] = torch._neg_view(-i[name])
        assert i[name].is_neg()
        assert torch.equal(kk.selective_state_update(**i, backend=backend), y), name
        assert torch.equal(i["state"], expected["state"]), name


def test_a_tangent_is_refused() -> None:
    i = build({})
    x, before = i.pop("x"), i["state"].clone()
    with pytest.raises(RuntimeError, match="for inference"):
        torch.func.jvp(lambda x: kk.selective_state_update(x=x, **i), (x,), (x,))
    assert torch.equal(i["state"], before)


def test_autograd_sees_that_the_state_changed() -> None:
    i = build({})
    weight = torch.ones_like(i["state"], requires_grad=True)
    product = (weight * i["state"]).sum()
    kk.selective_state_update(**i)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


operator = torch.ops.kexue_kernels.selective_state_update.default


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_opcheck(backend: str) -> None:
    i = build({"heads": 2, "groups": 1})
    args = [i[name] for name in NAMES]
    torch.library.opcheck(operator, (*args, True, None, backend))
    torch.library.opcheck(operator, (*args, False, torch.tensor([2, -1, 0]), backend))


def test_compiles_whole() -> None:
    i, again = build({}), build({})

    def step(state: Tensor, rest: dict[str, Tensor]) -> Tensor:
        return kk.selective_state_update(state, **rest, dt_softplus=True) + state.sum()

    rest = {k: x for k, x in i.items() if k != "state"}
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(i["state"], rest), step(again["state"], rest))
        torch.testing.assert_close(i["state"], again["state"])


def test_zero_sizes_compile() -> None:
    def step(state: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return kk.selective_state_update(state, x, x, A, B, B)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, n in ((2, 3), (0, 3), (2, 0)):
        inputs = torch.randn(batch, 4), -torch.rand(4, n), torch.randn(batch, n)
        state, again = torch.ones(batch, 4, n), torch.ones(batch, 4, n)
        torch.testing.assert_close(compiled(state, *inputs), step(again, *inputs))
        torch.testing.assert_close(state, again)


def test_vmap_is_refused() -> None:
    i = build({})
    stacked = {k: torch.stack([x, x]) for k, x in i.items()}
    with pytest.raises(RuntimeError, match="in place"):
        torch.func.vmap(lambda m: kk.selective_state_update(**m))(stacked)


x, A = torch.randn(2, 4), -torch.rand(4, 3)
B, S = torch.randn(2, 3), torch.randn(2, 4, 3)
I = torch.tensor([0, 1])
BAD = [
    ({"state": None}, TypeError, "state: expected a torch.Tensor, got NoneType"),
    ({"x": x[0]}, ValueError, r"x: expected shape \[batch, d\] or \[batch, H, P\], got \[4\]"),
    ({"x": x.long()}, ValueError, "x: expected dtype .* got int64"),
    ({"dt": x[:, :2]}, ValueError, r"dt: .* \[batch, d\] = \[2, 4\], got \[2, 2\]"),
    ({"dt": x.to("meta")}, ValueError, r"dt: expected device cpu \(x's\)"),
    ({"A": A[:2]}, ValueError, r"A: expected shape \[d, n\] = \[4, 3\], got \[2, 3\]"),
    ({"A": A[None]}, ValueError, r"A: expected shape \[d, n\]"),
    ({"B": B[:, :2]}, ValueError, r"B: .* \[batch, n\] = \[2, 3\], got \[2, 2\]"),
    ({"C": B[:, None].expand(2, 2, 3)}, ValueError, "C: .* groups that divides H = 1, got 2"),
    ({"D": x}, ValueError, r"D: .* \[d\] = \[4\], got \[2, 4\]"),
    ({"z": x[:1]}, ValueError, r"z: .* got \[1, 4\]"),
    ({"dt_bias": 1.0}, TypeError, "dt_bias: expected a torch.Tensor, got float"),
    ({"state": S[:1]}, ValueError, r"state: .* \[batch, d, n\] = \[2, 4, 3\], got \[1, 4, 3\]"),
    ({"state": S[0]}, ValueError, r"state: expected shape \[batch, d, n\]"),
    ({"state": S.cfloat()}, ValueError, "state: expected dtype"),
    ({"state": S[:1].expand(2, 4, 3)}, ValueError, "state: expected memory of its own"),
    ({"dt_softplus": 1}, TypeError, "dt_softplus: expected a bool, got int"),
    ({"state_batch_indices": [0, 1]}, TypeError, "state_batch_indices: expected a torch.Tensor"),
    ({"state_batch_indices": I.float()}, ValueError, "state_batch_indices: expected dtype int32"),
    ({"state_batch_indices": I[:1]}, ValueError, r"state_batch_indices: .* \[batch\] = \[2\]"),
    ({"state_batch_indices": I + 1}, ValueError, "state_batch_indices: .* below 2 .* got 2"),
]


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("change", "error_", "words"), BAD, ids=lambda v: v[:40] if isinstance(v, str) else None
)
def test_bad_input(change, error_, words, backend: str) -> None:
    state = S.clone()
    good = {"state": state, "x": x, "dt": x, "A": A, "B": B, "C": B, "backend": backend}
    with pytest.raises(error_, match=words):
        kk.selective_state_update(**{**good, **change})
    assert torch.equal(state, S)
