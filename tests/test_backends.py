"""Which backend serves a call, and what is said when one can't."""

import logging
import sys
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import kexue_kernels as kk
from kexue_kernels import _extension, dispatch, launchers
from kexue_kernels.scan import blocked_linear_scan

x = torch.randn(1, 5, 2)


def test_every_backend_has_a_status() -> None:
    found = kk.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    for status in found.values():
        assert isinstance(status.available, bool)
        assert isinstance(status.reason, str)
        assert status.available or status.reason
    assert found["reference"].available
    assert found["cpu"].available


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_forced_backend_never_falls_back_and_lists_every_reason() -> None:
    with pytest.raises(kk.BackendUnavailableError) as caught:
        kk.linear_scan(x.double(), x.double(), backend="cuda")
    assert isinstance(caught.value, RuntimeError)
    message = str(caught.value)
    assert kk.backends()["cuda"].reason in message
    assert "the inputs are on 'cpu'" in message
    assert "float64 is served by the reference alone" in message


def test_triton_without_the_interpreter_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(kk.BackendUnavailableError, match="inputs are on 'cpu'"):
        kk.linear_scan(x, x, backend="triton")


def test_triton_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kk.backends()["triton"] == (False, "Triton is not installed")
    with pytest.raises(kk.BackendUnavailableError, match="Triton is not installed"):
        kk.linear_scan(x, x, backend="triton")
    assert kk.linear_scan(x, x).shape == x.shape


def test_use_backend_is_what_auto_means() -> None:
    calls: list[str] = []

    def spy(family: str, op: str, backend: str, *rest: object) -> object:
        calls.append(backend)
        return blocked_linear_scan

    original, launchers.launcher = launchers.launcher, spy
    try:
        with kk.use_backend("triton"):
            kk.linear_scan(x, x)
            kk.linear_scan(x, x, backend="cpu")
            with kk.use_backend("cpu"):
                kk.linear_scan(x, x)
            thread = threading.Thread(target=lambda: kk.linear_scan(x, x))
            thread.start()
            thread.join()
        kk.linear_scan(x, x)
    finally:
        launchers.launcher = original
    assert calls == ["triton", "cpu", "cpu", "auto", "auto"]


def test_use_backend_reference_is_differentiable_pytorch() -> None:
    leaf = x.clone().requires_grad_()
    with kk.use_backend("reference"):
        h = kk.linear_scan(x, leaf)
    assert "Generated" not in type(h.grad_fn).__name__
    assert torch.equal(h, kk.reference.linear_scan(x, leaf))


@pytest.mark.parametrize(("name", "error"), [("gpu", ValueError), (None, TypeError)])
def test_use_backend_checks_its_name(name, error) -> None:
    with pytest.raises(error, match="backend: expected"), kk.use_backend(name):
        pass
    with pytest.raises(RuntimeError, match="stop"), kk.use_backend("cpu"):
        raise RuntimeError("stop")
    assert dispatch.resolve("auto") == "auto"


def test_auto_says_once_why_it_passed_a_backend_over(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.note_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="kexue_kernels"):
        for _ in range(3):
            dispatch.choose("an_op", "auto", x.device, {"cpu": lambda: ["it is Sunday"]})
    assert [r.getMessage() for r in caplog.records] == [
        "an_op: passing over backend 'cpu': it is Sunday"
    ]


def test_auto_ends_at_the_reference() -> None:
    assert dispatch.choose("an_op", "auto", torch.device("cpu"), {}) == "reference"
    with pytest.raises(kk.BackendUnavailableError, match="an_op has no cpu implementation"):
        dispatch.choose("an_op", "cpu", torch.device("cpu"), {})


def test_without_the_extension(without_extension: None) -> None:
    status = kk.backends()
    assert status["cpu"].available
    assert "removed for a test" in status["cpu"].reason
    assert status["cuda"] == (False, "removed for a test")
    torch.testing.assert_close(kk.linear_scan(x, x), kk.linear_scan(x, x, backend="reference"))


def test_a_stale_extension_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = type(sys)("kexue_kernels._C")
    stale.interface = -1
    monkeypatch.setitem(sys.modules, "kexue_kernels._C", stale)
    monkeypatch.setattr(kk, "_C", stale, raising=False)
    _extension.load.cache_clear()
    try:
        assert "stale (interface -1" in kk.backends()["cuda"].reason
        assert kk.linear_scan(x, x).shape == x.shape
    finally:
        _extension.load.cache_clear()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (None, "is not built (`pip install .` in a checkout builds it)"),
        (f"_C{EXTENSION_SUFFIXES[0]}", "does not load ("),
        ("_C.py", "does not load (No module named 'needed_by_it')"),
    ],
)
def test_an_extension_not_built_is_told_from_one_that_does_not_load(
    file: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if file is not None:
        (tmp_path / file).write_text("import needed_by_it")  # as a library: not one at all
    monkeypatch.delitem(sys.modules, _extension.NAME, raising=False)
    monkeypatch.setattr(kk, "__path__", [str(tmp_path)])
    # without an editable install's finder, which knows where the checkout's is
    finders = [finder for finder in sys.meta_path if finder.__module__.startswith("_frozen")]
    monkeypatch.setattr(sys, "meta_path", finders)
    _extension.load.cache_clear()
    try:
        reason = kk.backends()["cuda"].reason
        assert f"the C++ extension {words}" in reason
        assert kk.backends()["cpu"] == (True, f"blocked PyTorch, slower: {reason}")
    finally:
        _extension.load.cache_clear()
