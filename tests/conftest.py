"""Triton kernels run in the interpreter, on CPU, unless the GPU tests are asked for (`-m gpu`)."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from kexue_kernels import _extension, launchers
from tests.cpu import isas

# The same examples every time: limits on rounding errors are close, and luck is not to decide.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr == "gpu" and torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and `-m gpu`"))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what torch.empty gives with NaN (integers: their largest), so that a gap shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the extension was not built."""
    absent = _extension.Extension(None, "removed for a test", False)
    monkeypatch.setattr(_extension, "load", lambda: absent)
    launchers.launcher.cache_clear()


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that the C++ extension and this machine both have."""
    module = _extension.load().module
    before = module.cpu_isa()
    module.set_cpu_isa(request.param)
    yield request.param
    module.set_cpu_isa(before)


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """For tests that set a number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    """Each test chooses its backends anew: tests take backends away."""
    yield
    launchers.launcher.cache_clear()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each test compiles anew: recompilations do not add up to torch.compile's limit."""
    yield
    torch._dynamo.reset()
