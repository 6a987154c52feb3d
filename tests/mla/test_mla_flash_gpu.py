"""FlashMLA's grids of dense decoding at their own sizes, on a GPU."""

from itertools import product

import pytest

from tests.mla.flash_cases import FlashCase, check

pytestmark = pytest.mark.gpu

FLAGS = tuple(product((False, True), (False, True)))  # whether lengths vary, and causal


@pytest.mark.parametrize("H", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [4096, 8192])
def test_the_first_grid(tokens: int, H: int) -> None:
    """Of the release in which FlashMLA appeared."""
    for Tq, flags in product((1, 2), FLAGS):
        check(FlashCase(128, Tq, tokens, H, *flags), "triton", "cuda")


@pytest.mark.parametrize("H", [1, 3, 9, 63, 64, 126, 128])
@pytest.mark.parametrize("B", [1, 2, 6, 64])
def test_the_grid_of_heads(B: int, H: int) -> None:
    for tokens, Tq, flags in product((20, 140, 4096), (1, 2, 4), FLAGS):
        check(FlashCase(B, Tq, tokens, H, *flags), "triton", "cuda")


@pytest.mark.parametrize("H", [1, 3, 9, 63, 64, 126, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_sequences_without_tokens(causal: bool, H: int) -> None:
    check(FlashCase(128, 2, 4096, H, True, causal, some_empty=True), "triton", "cuda")
