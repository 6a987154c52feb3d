"""Which tokens Transformers' attention masks leave out, where they leave out nothing but tokens.

A mask is [B or 1, 1, Tq, Tk]: booleans, True where a query sees a key, or numbers that are added
to scores. It is causal, but for padding and for sequences that are packed one after another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

HIDDEN = -1e4  # what is added to a score at most, for its weight to be 0


class RefusedMaskError(ValueError):
    """A mask that says something else; its text says what."""


class Packing(NamedTuple):
    """The tokens that are attended to, one sequence after another."""

    tokens: Tensor  # int64 [N], of the B*T
    cu_seqlens: Tensor  # int32 [sequences + 1]


class Windows(NamedTuple):
    """Each sequence's tokens in a cache, the new ones included."""

    starts: tuple[int, ...]  # B of them
    lengths: Tensor  # int32 [B]


def packing(mask: Tensor, B: int, T: int) -> Packing | None:
    """How T tokens without a past see each other; None: all of them, causally.

    A token that none sees is padding. Of the others, each must see what lies between the first
    one that it sees and itself, and these must see the same first one.
    """
    seen = _seen(mask, T)
    if seen[..., T:].any():
        raise RefusedMaskError("a mask that shows tokens to come")
    seen = seen[..., :T]
    kept, first = seen.any(1), seen.to(torch.uint8).argmax(2)  # [B or 1, T]
    causal = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
    expected = causal & (first[:, :, None] == first[:, None, :]) & kept[:, None, :]
    if ((seen != expected) & kept[:, :, None]).any():
        raise RefusedMaskError("a mask other than causal with padding or packed sequences")
    if not (~kept | (first > 0)).any():
        return None
    tokens = kept.expand(B, T).flatten().nonzero().squeeze(1)
    rows = torch.arange(B, device=mask.device)[:, None] * T
    sequence = (first + rows).flatten()[tokens]
    if (sequence.diff() < 0).any():
        raise RefusedMaskError("a mask of sequences that are interleaved")
    counts = sequence.unique_consecutive(return_counts=True)[1]
    return Packing(tokens, F.pad(counts.cumsum(0), (1, 0)).int())


def windows(mask: Tensor, B: int, T: int, past: int) -> Windows | None:
    """Where each sequence begins in a cache, T tokens after `past` others; None: at 0."""
    end = past + T
    seen = _seen(mask, end)
    last = seen[:, -1]
    first = torch.where(last.any(1), last.to(torch.uint8).argmax(1), end)  # [B or 1]
    key = torch.arange(seen.shape[2], device=mask.device)
    query = torch.arange(past, end, device=mask.device)[:, None]
    if (seen != ((key >= first[:, None, None]) & (key <= query))).any():
        raise RefusedMaskError("a mask that leaves out tokens between others, or is not causal")
    starts = tuple(first.expand(B).tolist())
    return Windows(starts, (end - first).int().expand(B)) if any(starts) else None


def remembered(read: Callable[..., Any], mask: Tensor, *arguments: int) -> Any:
    """read(mask, *arguments), once for all the layers that are given this mask."""
    if mask.is_inference():
        return read(mask, *arguments)  # there is no version to go by
    key = read, mask._version, arguments
    kept = _READ.get(mask)
    if kept is None or kept[0] != key:
        kept = _READ[mask] = key, read(mask, *arguments)
    return kept[1]


_READ: Any = WeakTensorKeyDictionary()  # by mask: what was read how, and what came of it


def _seen(mask: Tensor, keys: int) -> Tensor:
    """bool [B or 1, Tq, Tk], for at least `keys` keys."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise RefusedMaskError(f"a mask {list(mask.shape)}, of other axes than [B, 1, Tq, Tk]")
    if mask.shape[3] < keys:
        raise RefusedMaskError(f"a mask for {mask.shape[3]} of {keys} tokens")
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not mask.is_floating_point() or not (seen | (mask <= HIDDEN)).all():
        raise RefusedMaskError("a mask that changes scores")
    return seen
