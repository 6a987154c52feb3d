"""Who gets monarch_matmul's Hopper kernels and what they are called with, without a GPU."""

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import kexue_kernels as kk
from kexue_kernels import _extension, dispatch, launchers
from kexue_kernels.cli import app
from kexue_kernels.monarch import cuda_monarch_matmul
from tests.monarch.cases import Case, check_near, make

BF16, F16 = torch.bfloat16, torch.float16
SERVED = Case(k=16, q=16, p=32, l=16, s=8, N=5, dtype=BF16)


class Recorder(SimpleNamespace):
    """An extension that notes what its kernel is called with."""

    def cpu_isa(self) -> str:
        return "none"

    def monarch_matmul_cuda(self, **call: Any) -> None:
        self.calls.append(call)


@contextlib.contextmanager
def no_stream(_: torch.device) -> Iterator[int]:
    yield 7


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """backend="cuda" serves CPU tensors, by a recorder on a Hopper GPU."""
    module: Any = Recorder(calls=[], build_info={"archs": "sm_80 sm_90a"})
    monkeypatch.setattr(_extension, "load", lambda: _extension.Extension(module, "", True))
    monkeypatch.setattr(cuda_monarch_matmul, "_stream", no_stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setitem(dispatch._STATUS, "cuda", lambda: dispatch.BackendStatus(True, ""))
    monkeypatch.setattr(dispatch, "_served_devices", lambda _: ("cpu",))
    launchers.launcher.cache_clear()
    return module


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    yield
    launchers.launcher.cache_clear()


def multiply(inputs: dict[str, Tensor]) -> Tensor:
    return kk.monarch_matmul(**inputs, backend="cuda")


def test_what_the_kernel_is_called_with(recorder: Recorder) -> None:
    inputs, _ = make(SERVED)
    y = multiply(inputs)
    assert y.shape == (5, 16 * 8)
    assert recorder.calls == [
        {
            "sizes": (5, 16, 16, 32, 16, 8, 16),
            "cluster": 2,
            "dtype": 1,
            "x": (inputs["x"].data_ptr(), 16 * 32),
            "w1": inputs["w1"].data_ptr(),
            "w2": inputs["w2"].data_ptr(),
            "bias": inputs["bias"].data_ptr(),
            "y": y.data_ptr(),
            "stream": 7,
        }
    ]
    half = Case(k=64, q=64, p=64, l=64, s=64, N=1, dtype=F16, bias=False)
    multiply(make(half)[0])
    call = recorder.calls[1]
    assert (call["cluster"], call["dtype"], call["bias"]) == (8, 2, 0)


def test_rows_apart_are_taken_as_they_are(recorder: Recorder) -> None:
    inputs, _ = make(SERVED)
    apart = torch.zeros(5, 16 * 32 + 8, dtype=BF16)[:, : 16 * 32]
    multiply(inputs | {"x": apart})
    assert recorder.calls[0]["x"] == (apart.data_ptr(), 16 * 32 + 8)


@pytest.mark.parametrize("name", ["x", "w1", "w2", "bias"])
@pytest.mark.parametrize("how", ["one element on", "strided"])
def test_what_is_not_aligned_is_copied(recorder: Recorder, name: str, how: str) -> None:
    inputs, _ = make(SERVED)
    x = inputs[name]
    if how == "strided":
        other = torch.stack([x, x], -1)[..., 0]
    else:
        other = torch.zeros(x.numel() + 1, dtype=BF16)[1:].view(x.shape)
    multiply(inputs | {name: other})
    found = recorder.calls[0][name]
    address = found[0] if name == "x" else found
    assert address % 16 == 0
    assert address != other.data_ptr()


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_are_one_are_copied(recorder: Recorder, rows: int) -> None:
    inputs, _ = make(SERVED)
    multiply(inputs | {"x": inputs["x"][:1].as_strided((rows, 16 * 32), (0, 1))})
    assert recorder.calls[0]["x"][1] == 16 * 32


def test_no_rows_need_no_kernel(recorder: Recorder) -> None:
    inputs, _ = make(SERVED)
    assert multiply(inputs | {"x": inputs["x"][:0]}).shape == (0, 128)
    assert recorder.calls == []


@pytest.mark.usefixtures("recorder")
def test_reasons_against_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(**changes: Any) -> str:
        case = Case(**(vars(SERVED) | changes))
        x, w1, w2, _ = make(case)[0].values()
        return "; ".join(cuda_monarch_matmul.reasons(x, w1, w2))

    assert refusal() == ""
    assert "bfloat16 and float16, got torch.float32" in refusal(dtype=torch.float32)
    ragged = refusal(p=30)
    assert "a cluster of up to 16 thread blocks" in ragged
    assert "got k=16, q=16, p=30, l=16, s=8, r=16" in ragged
    assert "l dividing q" in refusal(q=8, s=16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert "needs compute capability (9, 0), this GPU has (10, 0)" in refusal()


def test_a_call_that_is_not_served_says_why(recorder: Recorder) -> None:
    inputs, _ = make(Case(dtype=BF16))
    with pytest.raises(kk.BackendUnavailableError, match="l dividing q"):
        multiply(inputs)
    recorder.build_info = {"archs": "sm_90"}
    with pytest.raises(kk.BackendUnavailableError, match="built without sm_90a"):
        multiply(make(SERVED)[0])
    assert recorder.calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is served here")
def test_without_a_gpu_it_says_so() -> None:
    reason = kk.backends()["cuda"].reason
    with pytest.raises(kk.BackendUnavailableError) as error:
        multiply(make(SERVED)[0])
    assert reason
    assert f"monarch_matmul: backend 'cuda' can't serve this call: {reason}" in str(error.value)


@pytest.mark.usefixtures("recorder")
def test_gradients_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dispatch.BackendStatus(False, "Triton is not installed")
    monkeypatch.setitem(dispatch._STATUS, "triton", lambda: missing)
    inputs, grad = make(SERVED)
    x = inputs["x"].requires_grad_()
    y = multiply(inputs)
    with pytest.raises(kk.BackendUnavailableError, match="Triton is not installed"):
        torch.autograd.grad(y, x, grad)


@pytest.mark.usefixtures("recorder")
def test_gradients_are_tritons() -> None:
    pytest.importorskip("triton")
    if not dispatch.interpreting():
        pytest.skip("the interpreter is off")
    inputs, grad = make(SERVED)
    x = inputs["x"].requires_grad_()
    found = torch.autograd.grad(multiply(inputs), x, grad)[0]
    expected = torch.autograd.grad(kk.reference.monarch_matmul(**inputs), x, grad)[0]
    check_near(found, expected)


@pytest.mark.usefixtures("recorder")
def test_auto_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("cuda",))
    device = torch.device("cpu")

    def chosen(backend: str) -> object:
        return launchers.launcher("monarch", "monarch_matmul", backend, device, BF16)

    assert chosen("cuda") is cuda_monarch_matmul
    assert chosen("auto") is not cuda_monarch_matmul
    monkeypatch.setattr(launchers, "OFF_BY_DEFAULT", frozenset())
    launchers.launcher.cache_clear()
    assert chosen("auto") is cuda_monarch_matmul


def test_info_says_that_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    lines = CliRunner().invoke(app, ["info"]).stdout.splitlines()
    found = [line for line in lines if "monarch_matmul " in line and "cuda" in line]
    assert len(found) == 1
    assert "off by default" in found[0]


def test_selfcheck_skips_it() -> None:
    selfcheck = importlib.import_module("kexue_kernels.cli.selfcheck")  # a command's name too
    skipped = selfcheck._without_kernels(["monarch"], ["cuda"])
    (found,) = [each for each in skipped if each[1] == "monarch_matmul"]
    assert "off by default" in found[2]
