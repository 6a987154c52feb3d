"""Few rows by the C++ extension, which reads each code once and packs none."""

import pytest
import torch
from torch import Tensor

from kexue_kernels.vq import cpu_nearest_codebook
from tests import cpu
from tests.vq.cases import DTYPES, METRICS, Data, nearest

cpu.extension()

pytestmark = pytest.mark.usefixtures("isa")
KINDS = ("random", "clustered", "offset", "duplicated", "bisector", "integers", "broken", "huge")


def search(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """x [N, d], codebook [K, d] -> [N]."""
    return cpu_nearest_codebook.search(x[None], codebook[None], metric, "exact")[0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows(kind: str, metric: str) -> None:
    """As one row alone, as a group of rows, and packed; the definition's choice each time."""
    x, codebook = Data(kind, N=12, K=90, d=21).make()
    expected = nearest(x, codebook, metric)
    for rows in range(1, 13):
        assert torch.equal(search(x[:rows], codebook, metric), expected[:rows])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 7, 8, 9, 255, 256, 257, 300, 520])
def test_every_number_of_channels(d: int, metric: str) -> None:
    for dtype in DTYPES:
        x, codebook = Data("random", N=6, K=33, d=d, dtype=dtype).make()
        assert torch.equal(search(x, codebook, metric), nearest(x, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_any_number_of_threads(metric: str, keep_threads: None) -> None:
    """Equal codes in the parts of several threads: the first of them wins."""
    x, codebook = Data("duplicated", N=5, K=6000, d=32).make()
    expected = nearest(x, codebook, metric)
    for number in (1, 3):
        torch.set_num_threads(number)
        assert torch.equal(search(x, codebook, metric), expected)


def test_strides() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 14, generator=g)[::2, ::5].T  # [3, 15]
    codebook = torch.randn(15, 40, generator=g).T
    assert torch.equal(search(x, codebook, "l2"), nearest(x, codebook, "l2"))


@pytest.mark.parametrize("metric", METRICS)
def test_no_code_or_no_row_is_finite(metric: str) -> None:
    x, codebook = Data("random", N=4, K=10, d=5).make()
    nowhere = torch.full((4,), -1)
    assert torch.equal(search(x, codebook * torch.nan, metric), nowhere)
    assert torch.equal(search(x * torch.inf, codebook, metric), nowhere)
