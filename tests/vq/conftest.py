"""Every test draws the same numbers and chooses its launchers anew."""

from collections.abc import Iterator

import pytest
import torch

from kexue_kernels import _extension, launchers


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the extension was not built."""
    absent = _extension.Extension(None, "removed for a test", False)
    monkeypatch.setattr(_extension, "load", lambda: absent)
    launchers.launcher.cache_clear()


@pytest.fixture(autouse=True)
def fresh_launchers() -> Iterator[None]:
    """Choices are remembered; tests take backends away."""
    yield
    launchers.launcher.cache_clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
