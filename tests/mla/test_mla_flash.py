"""FlashMLA's cases of dense decoding at lengths that a CPU, and Triton's interpreter, can do."""

from itertools import product

import pytest

from tests.mla.flash_cases import FlashCase, check

FLAGS = tuple(product((False, True), (False, True)))  # whether lengths vary, and causal
CASES = [
    *(FlashCase(4, Tq, 200, H, *flags) for Tq, H, flags in product((1, 2), (16, 64, 128), FLAGS)),
    *(FlashCase(2, 4, tokens, H, True, True) for tokens, H in ((20, 63), (140, 9), (140, 126))),
    FlashCase(1, 1, 20, 1, False, False),
    FlashCase(6, 2, 100, 3, True, True, some_empty=True),
]
INTERPRETED = [
    FlashCase(2, 1, 150, 16, True, False),
    FlashCase(3, 2, 130, 32, True, True),
    FlashCase(2, 1, 100, 64, False, True),
    FlashCase(2, 1, 70, 128, True, False),
    FlashCase(4, 2, 60, 3, True, True, some_empty=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: FlashCase) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_triton(case: FlashCase) -> None:
    check(case, "triton")
