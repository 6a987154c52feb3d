"""PagedLatentCache: latents of many sequences in pages, shared where they are alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kexue_kernels import checks, options
from kexue_kernels.mla import fp8
from kexue_kernels.mla.append import mla_cache_append


class CacheFullError(RuntimeError):
    """A PagedLatentCache has too few free pages for what was asked; nothing was changed."""


@dataclass
class _Held:
    """What one sequence holds: its pages in order, the last one perhaps not full."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagedLatentCache(nn.Module):
    """Cached rows (latent and key) of sequences of any lengths, in pages of block_size tokens.

    Args:
        num_blocks: pages in all.
        block_size: tokens of a page.
        kv_lora_rank: dc, the width of a latent.
        qk_rope_head_dim: dr, the width of a key.
        dtype, device: of the cache; PyTorch's defaults if None. float8_e4m3fn is for bfloat16
            tokens, kept in rows of bytes: 656 for 512 + 64, in place of 1152.

    `kv_cache` [num_blocks, block_size, dc + dr] is what `mla_decode` reads. With float8_e4m3fn it
    is uint8 [num_blocks, block_size, dc + dc/32 + 2 dr], which `.to(dtype)` leaves alone.
    Which page belongs to whom is kept on the host, so that nothing here waits for a device.
    """

    kv_cache: Tensor

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value, smallest in (
            ("num_blocks", num_blocks, 1),
            ("block_size", block_size, 1),
            ("kv_lora_rank", kv_lora_rank, 1),
            ("qk_rope_head_dim", qk_rope_head_dim, 0),
        ):
            options.integer(name, value, smallest)
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.block_size = block_size
        _check_dtype(dtype)
        width = kv_lora_rank + qk_rope_head_dim
        if dtype in fp8.DTYPES:
            width = fp8.checked_row_bytes("dtype", kv_lora_rank, qk_rope_head_dim)
            dtype = torch.uint8
        cache = torch.zeros(num_blocks, block_size, width, dtype=dtype, device=device)
        self.register_buffer("kv_cache", cache, persistent=False)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners = [0] * num_blocks  # sequences that hold a page
        self._held: dict[int, _Held] = {}
        self._next = 0

    def allocate(self) -> int:
        """A new sequence without tokens: its id. Takes no page yet."""
        self._next += 1
        self._held[self._next - 1] = _Held()
        return self._next - 1

    def append(self, seq_id: int, kv_latent: Tensor, k_rope: Tensor) -> None:
        """Add T tokens to a sequence: kv_latent [T, dc] and k_rope [T, dr], as they are.

        Raises CacheFullError, and changes nothing, where the free pages are too few.
        """
        self._check_rows((), kv_latent, k_rope)
        self.write(self.reserve([seq_id], kv_latent.shape[0]), kv_latent, k_rope)

    def fork(self, seq_id: int) -> int:
        """A new sequence with the same tokens, on the same pages until either one writes."""
        held = self._of(seq_id)
        forked = self.allocate()
        self._held[forked] = _Held(list(held.pages), held.length)
        for page in held.pages:
            self._owners[page] += 1
        return forked

    def free(self, seq_id: int) -> None:
        """Forget a sequence; pages that nobody else holds are free again."""
        held = self._of(seq_id)
        del self._held[seq_id]
        for page in reversed(held.pages):
            self._release(page)

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence."""
        return self._of(seq_id).length

    @property
    def free_blocks(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def block_table(self, seq_ids: Sequence[int]) -> Tensor:
        """int32 [B, max_blocks], for `mla_decode`; rows are filled up with 0."""
        pages = [self._of(seq_id).pages for seq_id in seq_ids]
        width = max(map(len, pages), default=0)
        rows = [row + [0] * (width - len(row)) for row in pages]
        table = torch.tensor(rows, dtype=torch.int32).view(len(rows), width)
        return table.to(self.kv_cache.device, non_blocking=True)

    def cache_seqlens(self, seq_ids: Sequence[int]) -> Tensor:
        """int32 [B], for `mla_decode`."""
        lengths = [self._of(seq_id).length for seq_id in seq_ids]
        return torch.tensor(lengths, dtype=torch.int32).to(self.kv_cache.device, non_blocking=True)

    def select(self, seq_ids: Sequence[int]) -> "SelectedSequences":
        """The batch of these sequences: what a module's `forward(x, cache=...)` takes."""
        seq_ids = list(seq_ids)
        for seq_id in seq_ids:
            self._of(seq_id)
        _check_distinct(seq_ids)
        return SelectedSequences(self, seq_ids)

    def reserve(self, seq_ids: Sequence[int], tokens: int) -> Tensor:
        """Room for `tokens` more of each sequence: their slots, int64 [B * tokens], on the device.

        Their lengths grow at once. Raises CacheFullError, and changes nothing, where the free
        pages are too few.
        """
        options.integer("tokens", tokens, 0)
        _check_distinct(seq_ids)
        needed = self._pages_needed([self._of(seq_id) for seq_id in seq_ids], tokens)
        if needed > len(self._free):
            raise CacheFullError(
                f"PagedLatentCache: {needed} more pages are needed, {len(self._free)} of "
                f"{len(self._owners)} are free"
            )
        slots: list[int] = []
        for seq_id in seq_ids:
            slots += self._grow(self._of(seq_id), tokens)
        return torch.tensor(slots, dtype=torch.int64).to(self.kv_cache.device, non_blocking=True)

    def write(self, slots: Tensor, kv_latent: Tensor, k_rope: Tensor) -> None:
        """Rows at slots that `reserve` gave."""
        with torch.no_grad():
            mla_cache_append(kv_latent.detach(), k_rope.detach(), self.kv_cache, slots)

    def extra_repr(self) -> str:
        num_blocks, block_size, width = self.kv_cache.shape
        return f"{num_blocks} pages of {block_size} tokens, {width} wide, {self.free_blocks} free"

    def _check_rows(self, batch: tuple[int, ...], kv_latent: Tensor, k_rope: Tensor) -> None:
        """kv_latent [*batch, T, dc] and k_rope [*batch, T, dr]; B is the only axis of a batch."""
        checks.tensor("kv_latent", kv_latent)
        checks.tensor("k_rope", k_rope)
        axes = "[B, T, d" if batch else "[T, d"
        checks.ndim("kv_latent", kv_latent, len(batch) + 2, f"{axes}c]")
        rows = *batch, kv_latent.shape[-2]
        for name, value, width, last in (
            ("kv_latent", kv_latent, self.kv_lora_rank, "c]"),
            ("k_rope", k_rope, self.qk_rope_head_dim, "r]"),
        ):
            checks.dtype(name, value, (fp8.dtype_of(self.kv_cache),))
            checks.shape(name, value, (*rows, width), axes + last)
            checks.device(name, value, self.kv_cache.device, "the cache")

    def _of(self, seq_id: int) -> _Held:
        if not isinstance(seq_id, int) or isinstance(seq_id, bool):
            raise TypeError(f"seq_id: expected an int, got {type(seq_id).__name__}")
        if seq_id not in self._held:
            raise ValueError(f"seq_id: expected a sequence of this cache, got {seq_id}")
        return self._held[seq_id]

    def _shares_last(self, held: _Held) -> bool:
        """Whether its next token would go onto a page that another sequence reads."""
        partly = held.length % self.block_size != 0
        return partly and self._owners[held.pages[-1]] > 1

    def _pages_needed(self, batch: list[_Held], tokens: int) -> int:
        """A page to copy onto for each that leaves a shared one: not for the last to stay."""
        needed, left = 0, dict[int, int]()
        for held in batch if tokens > 0 else []:
            needed += -(-(held.length + tokens) // self.block_size) - len(held.pages)
            if self._shares_last(held):
                shared = held.pages[-1]
                staying = self._owners[shared] - left.get(shared, 0)
                needed += staying > 1
                left[shared] = left.get(shared, 0) + 1
        return needed

    def _grow(self, held: _Held, tokens: int) -> list[int]:
        if tokens > 0 and self._shares_last(held):
            self._copy_last(held)
        begin, held.length = held.length, held.length + tokens
        while len(held.pages) * self.block_size < held.length:
            held.pages.append(self._take())
        places = (divmod(token, self.block_size) for token in range(begin, held.length))
        return [held.pages[page] * self.block_size + place for page, place in places]

    def _copy_last(self, held: _Held) -> None:
        shared, own = held.pages[-1], self._take()
        self.kv_cache[own].copy_(self.kv_cache[shared])
        held.pages[-1] = own
        self._release(shared)

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._owners[page] -= 1
        if self._owners[page] == 0:
            self._free.append(page)


@dataclass(frozen=True)
class SelectedSequences:
    """Sequences of a cache as a batch."""

    cache: PagedLatentCache
    seq_ids: list[int]

    def block_table(self) -> Tensor:
        """int32 [B, max_blocks]."""
        return self.cache.block_table(self.seq_ids)

    def cache_seqlens(self) -> Tensor:
        """int32 [B]."""
        return self.cache.cache_seqlens(self.seq_ids)

    def append(self, kv_latent: Tensor, k_rope: Tensor) -> None:
        """T tokens to each: kv_latent [B, T, dc] and k_rope [B, T, dr].

        Raises CacheFullError, and changes nothing, where the free pages are too few.
        """
        self.cache._check_rows((len(self.seq_ids),), kv_latent, k_rope)
        slots = self.cache.reserve(self.seq_ids, kv_latent.shape[1])
        self.cache.write(slots, kv_latent.flatten(0, 1), k_rope.flatten(0, 1))


def _check_dtype(dtype: object) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and dtype not in (*checks.REAL, *fp8.DTYPES):
        raise ValueError(f"dtype: expected a real floating dtype or float8_e4m3fn, got {dtype}")


def _check_distinct(seq_ids: Sequence[int]) -> None:
    if len(set(seq_ids)) < len(seq_ids):
        raise ValueError(f"seq_ids: expected each sequence once, got {seq_ids}")
