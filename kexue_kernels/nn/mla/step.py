"""Where new tokens of a batch go in a cache, and what they see: tensors on its device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kexue_kernels.mla import operators
from kexue_kernels.nn import arguments
from kexue_kernels.nn.mla.cache import PagedLatentCache, SelectedSequences


class Step(NamedTuple):
    """The T next tokens of B sequences."""

    kv_cache: Tensor
    slots: Tensor  # int64 [B * T]
    block_table: Tensor  # int32 [B, max_blocks]
    cache_seqlens: Tensor  # int32 [B], the new tokens counted

    @classmethod
    def take(
        cls, sequences: SelectedSequences, tokens: int, backend: str = "auto"
    ) -> tuple[int, "Step"]:
        """The longest past, and room for the tokens.

        CacheFullError where there is none, BackendUnavailableError where `backend` could not
        write to it or read it; then nothing changes.
        """
        cache = sequences.cache
        past = max(map(cache.length, sequences.seq_ids), default=0)
        operators.check_backend(backend, cache.kv_cache)
        slots = cache.reserve(sequences.seq_ids, tokens)
        tables = sequences.block_table(), sequences.cache_seqlens()
        return past, cls(cache.kv_cache, slots, *tables)


def taking() -> Callable[[SelectedSequences, int, str], tuple[int, Step]]:
    """Step.take; where torch.compile traces the caller, the one that it leaves to Python."""
    if torch.compiler.is_dynamo_compiling():
        from kexue_kernels.nn.mla import untraced  # imports Dynamo, which takes seconds

        return untraced.take
    return Step.take


class DecodeStep:
    """Steps of a batch in tensors that stay where they are: what a CUDA graph needs.

    Args:
        sequences: `PagedLatentCache.select(seq_ids)`.
        tokens: T, new tokens of each sequence in a step.
        max_blocks: width of the block table: the pages of the longest sequence there will be; all
            pages of the cache if None.

    A module's `forward(x, cache=step)` does nothing on the host, so it can be captured:

        step = DecodeStep(cache.select(seq_ids))
        ...                     # a call to warm up, then torch.cuda.graph around another
        while True:
            step.advance()      # takes room on the host, writes where into the tensors
            graph.replay()

    Each `advance()` is for one call: until the next one, calls write to the same places again,
    before the first one to none.
    """

    def __init__(
        self, sequences: SelectedSequences, tokens: int = 1, max_blocks: int | None = None
    ) -> None:
        if not isinstance(sequences, SelectedSequences):
            raise TypeError(
                f"sequences: expected PagedLatentCache.select(...), got {type(sequences).__name__}"
            )
        arguments.size("tokens", tokens)
        cache = sequences.cache
        max_blocks = cache.kv_cache.shape[0] if max_blocks is None else max_blocks
        arguments.size("max_blocks", max_blocks)
        self.sequences, self.tokens = sequences, tokens
        B, table = len(sequences.seq_ids), sequences.block_table()
        self.tensors = Step(
            cache.kv_cache,
            table.new_full((B * tokens,), -1).long(),
            table.new_zeros(B, max_blocks),
            table.new_zeros(B),
        )

    @property
    def cache(self) -> PagedLatentCache:
        return self.sequences.cache

    def advance(self) -> None:
        """Room for the next step's tokens.

        Raises CacheFullError, and changes nothing, where the free pages are too few; ValueError
        where a sequence outgrows the block table.
        """
        width = self.tensors.block_table.shape[1]
        longest = max(map(self.cache.length, self.sequences.seq_ids), default=0) + self.tokens
        if longest > width * self.cache.block_size:
            raise ValueError(
                f"max_blocks: expected pages for {longest} tokens, got {width} of "
                f"{self.cache.block_size}"
            )
        _, (_, slots, table, seqlens) = Step.take(self.sequences, self.tokens)
        self.tensors.slots.copy_(slots, non_blocking=True)
        self.tensors.block_table[:, : table.shape[1]].copy_(table, non_blocking=True)
        self.tensors.cache_seqlens.copy_(seqlens, non_blocking=True)
