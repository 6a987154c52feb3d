"""What masks are read as; and the cache's layer, by itself."""

import pytest
import torch
from torch import Tensor

from kexue_kernels.integrations.attention_masks import (
    RefusedMaskError,
    packing,
    remembered,
    windows,
)

CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()


def with_padding(*masks: str) -> Tensor:
    """Causal, of sequences in which 0 marks padding: what Transformers makes of 2-D masks."""
    kept = torch.tensor([[c == "1" for c in mask] for mask in masks])
    return CAUSAL & kept[:, None, None]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [lambda mask: mask, additive], ids=["bool", "float"])
def test_packing(form):
    assert packing(form(with_padding("11111")), 1, 5) is None
    assert packing(form(with_padding("11111")), 3, 5) is None
    for masks, kept, cu_seqlens in (
        (("00111", "11111"), [2, 3, 4, 5, 6, 7, 8, 9], [0, 3, 8]),
        (("11100", "01110"), [0, 1, 2, 6, 7, 8], [0, 3, 6]),
        (("10110", "00000", "11111"), [0, 2, 3, 10, 11, 12, 13, 14], [0, 3, 8]),
    ):
        found = packing(form(with_padding(*masks)), len(masks), 5)
        assert found.tokens.tolist() == kept
        assert found.cu_seqlens.tolist() == cu_seqlens
        assert found.cu_seqlens.dtype == torch.int32
    wider = torch.cat([with_padding("00111"), torch.zeros(1, 1, 5, 3, dtype=torch.bool)], 3)
    found = packing(form(wider), 2, 5)  # a static cache's; one mask for both
    assert found.tokens.tolist() == [2, 3, 4, 7, 8, 9]
    assert found.cu_seqlens.tolist() == [0, 3, 6]


def test_packed_sequences():
    sequence = torch.tensor([0, 0, 1, 2, 2])
    mask = (CAUSAL & (sequence[:, None] == sequence))[None, None]
    found = packing(mask, 1, 5)
    assert found.tokens.tolist() == [0, 1, 2, 3, 4]
    assert found.cu_seqlens.tolist() == [0, 2, 3, 5]
    nothing = packing(torch.zeros(1, 1, 5, 5, dtype=torch.bool), 1, 5)
    assert (nothing.tokens.tolist(), nothing.cu_seqlens.tolist()) == ([], [0])


def changed(*places: tuple[int, int]) -> Tensor:
    mask = CAUSAL.clone()
    for place in places:
        mask[place] = ~mask[place]
    return mask[None, None]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (changed((0, 1)), "other than causal"),
        (changed((3, 1)), "other than causal"),
        (changed((2, 2)), "other than causal"),
        (changed((3, 0), (4, 0)), "other than causal"),
        (CAUSAL.tril(-1)[None, None], "other than causal"),
        ((CAUSAL & ~CAUSAL.tril(-2))[None, None], "other than causal"),
        (CAUSAL & (torch.arange(5)[:, None] % 2 == torch.arange(5) % 2), "axes"),
        (torch.ones(1, 1, 5, 7, dtype=torch.bool).tril(2), "tokens to come"),
        (with_padding("11111")[..., :4], "4 of 5 tokens"),
        (with_padding("11111").expand(1, 2, 5, 5), "other axes"),
        (with_padding("11111").long(), "changes scores"),
        (torch.zeros(1, 1, 5, 5).masked_fill(~CAUSAL, -5.0), "changes scores"),
    ],
)
def test_refused_masks(mask: Tensor, words: str):
    with pytest.raises(RefusedMaskError, match=words):
        packing(mask, 1, 5)


def test_interleaved_sequences_are_refused():
    sequence = torch.tensor([0, 1, 0, 1, 0])
    with pytest.raises(RefusedMaskError, match="interleaved"):
        packing((CAUSAL & (sequence[:, None] == sequence))[None, None], 1, 5)


def test_windows():
    """Rows of causal masks: two new tokens after three others."""
    assert windows(with_padding("11111")[:, :, 3:], 2, 2, 3) is None
    found = windows(with_padding("00111", "11111", "00001")[:, :, 3:], 3, 2, 3)
    assert found.starts == (2, 0, 4)
    assert found.lengths.tolist() == [3, 5, 1]
    assert found.lengths.dtype == torch.int32
    found = windows(with_padding("01111")[:, :, 4:], 3, 1, 4)  # one mask for all
    assert (found.starts, found.lengths.tolist()) == ((1, 1, 1), [4, 4, 4])
    found = windows(with_padding("00000")[:, :, 4:], 1, 1, 4)
    assert (found.starts, found.lengths.tolist()) == ((5,), [0])
    static = torch.cat([with_padding("01111")[:, :, 4:], torch.zeros(1, 1, 1, 3).bool()], 3)
    assert windows(static, 1, 1, 4).starts == (1,)
    for mask in ("10111", "11110"):
        with pytest.raises(RefusedMaskError, match="between others"):
            windows(with_padding(mask)[:, :, 4:], 1, 1, 4)
    with pytest.raises(RefusedMaskError, match="not causal"):
        windows(torch.ones(1, 1, 2, 5, dtype=torch.bool), 1, 2, 3)


def test_a_mask_is_read_once_until_it_changes():
    mask, calls = with_padding("11111"), []

    def read(mask: Tensor, B: int) -> int:
        calls.append(B)
        return len(calls)

    assert [remembered(read, mask, 1), remembered(read, mask, 1)] == [1, 1]
    assert remembered(read, mask, 2) == 2
    mask[0, 0, 0, 0] = False
    assert [remembered(read, mask, 2), remembered(read, mask, 2)] == [3, 3]
    with torch.inference_mode():
        inferred = mask.clone()
        assert [remembered(read, inferred, 2), remembered(read, inferred, 2)] == [4, 5]
