"""Kinds of attention side by side: what they cache, that each is right, and the plot."""

from functools import partial

import pytest
import torch

from kexue_kernels.benchmarks import attention_kinds, check, plots
from kexue_kernels.benchmarks.case import Bound
from tests.benchmarks.toy import CPU

SMALL, F32 = (2, 128, 16), torch.float32
KINDS = [partial(attention_kinds.heads, G) for G in (16, 8, 4, 1)]
KINDS.append(partial(attention_kinds.latent, "cpu"))


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_each_kind_is_right(number: int) -> None:
    case = KINDS[number](SMALL, F32)
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    results = Bound(case.contestants[0], "forward", inputs, grad).results()
    assert results["output"].shape == case.output_shape
    assert check.judge(results, check.expect(case, inputs, grad))[1] == ""


def test_bytes_a_token() -> None:
    cached = [kind(SMALL, torch.bfloat16).bytes // (2 * 128) for kind in KINDS]
    assert cached == [8192, 4096, 2048, 512, 1152]


def test_one_curve_each() -> None:
    cases = attention_kinds.cases(CPU)
    assert len({case.name for case in cases}) == len(cases) == 15
    assert len({case.contestants[0].name for case in cases}) == 5
    assert len({case.sweep.title for case in cases if case.sweep}) == 1


def test_curves_show_tokens_a_second() -> None:
    sweep = {"title": "t", "axis": "L", "value": 1, "made": "tokens", "per_call": 4}
    case = {"sweep": sweep}
    rate, unit, limit, _ = plots._scale({}, [case])
    assert (rate(case, {"seconds": 0.5}), unit, limit) == (8.0, "tokens/s", None)
