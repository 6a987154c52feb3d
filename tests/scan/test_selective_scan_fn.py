"""selective_scan_fn: mamba-ssm's layout and semantics, written out here once more."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kexue_kernels as kk
from tests.scan.cases import error

CASES = [
    {},
    {"L": 1},
    {"L": 67, "dtype": torch.bfloat16},
    {"L": 129, "dtype": torch.float16},
    {"D": False, "z": False, "bias": False, "softplus": False},
    {"groups": 2},
    {"variable": False},
    {"complex": True},
    {"complex": True, "groups": 2, "dtype": torch.bfloat16},
    {"complex": True, "variable": False, "z": False},
]


def make(options: dict) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    L, dtype = options.get("L", 20), options.get("dtype", torch.float32)
    batch, d, n = 2, 4, 8
    complex_, groups = options.get("complex", False), options.get("groups")

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        wide = of if of.is_complex else torch.float32
        return torch.randn(shape, generator=g, dtype=wide).to(of)

    A = -0.5 * torch.rand((d, n), generator=g)
    weight = torch.complex64 if complex_ else torch.float32
    A = torch.complex(A, torch.rand((d, n), generator=g)) if complex_ else A
    steps = (batch, *((groups,) if groups else ()), n, L * (2 if complex_ else 1))
    variable = options.get("variable", True)
    inputs = {
        "u": draw(batch, d, L),
        "delta": (0.5 * torch.rand((batch, d, L), generator=g)).to(dtype),
        "A": A,
        "B": draw(*steps) if variable else draw(d, n, of=weight),
        "C": draw(*steps) if variable else draw(d, n, of=weight),
    }
    if options.get("D", True):
        inputs["D"] = draw(d, of=torch.float32)
    if options.get("z", True):
        inputs["z"] = draw(batch, d, L)
    if options.get("bias", True):
        inputs["delta_bias"] = 0.5 * torch.rand(d, generator=g)
    return inputs


def expected(i: dict[str, Tensor], softplus: bool) -> tuple[Tensor, Tensor]:
    """mamba-ssm's semantics, in double precision, one step at a time."""
    u, A = i["u"], i["A"]
    delta = i["delta"] + (i["delta_bias"][:, None] if "delta_bias" in i else 0)
    delta = F.softplus(delta) if softplus else delta
    batch, d, L = u.shape

    def at(m: Tensor, t: int) -> Tensor:
        """[batch or 1, d, n]"""
        if m.ndim == 2:
            return m[None]
        m = m if m.ndim == 4 else m[:, None]
        m = torch.complex(m[..., 2 * t], m[..., 2 * t + 1]) if A.is_complex() else m[..., t]
        return m.repeat_interleave(d // m.shape[1], 1)

    x, ys = A.new_zeros(batch, *A.shape), []
    for t in range(L):
        dt = delta[:, :, t, None]
        x = torch.exp(dt * A) * x + dt * at(i["B"], t) * u[:, :, t, None]
        y = (x * at(i["C"], t)).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    out = torch.stack(ys, -1)
    out = out + u * i["D"][:, None] if "D" in i else out
    return (out * F.silu(i["z"]) if "z" in i else out), x


def double(x: Tensor) -> Tensor:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def results(function, i: dict[str, Tensor], softplus: bool) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in i.items()}
    out, last = function(leaves, softplus)
    g = torch.Generator().manual_seed(1)
    grad_out = torch.randint(-8, 9, out.shape, generator=g) / 8  # exact in every dtype
    grad_last = torch.randn(last.shape, generator=g, dtype=torch.complex64)
    grad_last = grad_last if last.is_complex() else grad_last.real
    grads = torch.autograd.grad(
        (out, last), leaves.values(), (grad_out.to(out.dtype), grad_last.to(last.dtype))
    )
    return {"out": out.detach(), "last": last.detach(), **dict(zip(leaves, grads, strict=True))}


def call(backend: str):
    return lambda i, softplus: kk.selective_scan_fn(
        **i, delta_softplus=softplus, return_last_state=True, backend=backend
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_same_as_mamba(options: dict, backend: str) -> None:
    i, softplus = make(options), options.get("softplus", True)
    true = results(expected, {k: double(x) for k, x in i.items()}, softplus)
    own = results(call("reference"), i, softplus)
    for name, value in results(call(backend), i, softplus).items():
        assert value.shape == true[name].shape
        scale = true[name].abs().max().item()
        allowed = 2 * error(own[name], true[name]) + 4 * torch.finfo(value.dtype).eps * scale
        if value.dtype == torch.float32:
            assert allowed <= 1e-4 * max(1, scale), name
        assert error(value, true[name]) <= allowed, name


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_reference_is_this_definition(options: dict) -> None:
    i = {k: double(x) for k, x in make(options).items()}
    softplus = options.get("softplus", True)
    true = results(expected, i, softplus)
    for name, value in results(call("reference"), i, softplus).items():
        torch.testing.assert_close(value, true[name])


u = torch.randn(2, 4, 6)
A, B = -torch.rand(4, 3), torch.randn(2, 3, 6)
BAD = [
    ((u[0], u, A, B, B), ValueError, r"u: expected shape \[B, D, L\], got \[4, 6\]"),
    ((u, u[..., :2], A, B, B), ValueError, r"delta: expected shape \[B, D, L\]"),
    ((u, u, A, B[..., :4], B), ValueError, r"B: expected a last axis of L = 6"),
    ((u, u, A.cfloat(), B, B), ValueError, r"B: expected a last axis of 2L, .* = 12"),
    ((u, u, A, B, B[None, None]), ValueError, r"C: expected shape \[D, N\]"),
    ((u, u, A, None, B), TypeError, "B: expected a torch.Tensor, got NoneType"),
    ((u, u, A[:, :2], B, B), ValueError, r"B: expected shape"),
]


@pytest.mark.parametrize(
    ("args", "error_", "words"), BAD, ids=lambda v: v[:30] if isinstance(v, str) else None
)
def test_bad_input(args, error_, words) -> None:
    with pytest.raises(error_, match=words):
        kk.selective_scan_fn(*args)


@pytest.mark.parametrize("options", [{}, {"complex": True, "groups": 2}], ids=str)
def test_compiles_whole(options: dict) -> None:
    def loss(**tensors: Tensor) -> Tensor:
        out, last = kk.selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
        return out.square().sum() + last.abs().square().sum()

    leaves = {name: x.requires_grad_() for name, x in make(options).items()}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected_ = compiled(**leaves), loss(**leaves)
    torch.testing.assert_close(found, expected_)
    given = tuple(leaves.values())
    for x, y in zip(
        torch.autograd.grad(found, given), torch.autograd.grad(expected_, given), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_the_last_state_is_asked_for() -> None:
    i = make({"dtype": torch.bfloat16})
    out, last = kk.selective_scan_fn(**i, return_last_state=True)
    assert (out.dtype, out.shape, last.dtype) == (torch.bfloat16, i["u"].shape, torch.float32)
    assert last.shape == (2, *i["A"].shape)
    alone = kk.selective_scan_fn(**i)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, out)
