"""A layer of Transformers' DynamicCache that holds latents and keys in rows with room to grow.

Importing this imports Transformers.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

transformers: Any = importlib.import_module("transformers.cache_utils")

PAGE = 64  # tokens of a page
ROOM = 256  # least number of tokens to grow by

Starts = tuple[int, ...] | None  # each sequence's first token; None: 0


class LatentLayer(transformers.DynamicLayer):
    """Rows [B, capacity, dc + dr], of which the first `length` are filled.

    To Transformers it is what it was: `keys` are the latents [B, 1, length, dc], `values` the
    rotated keys [B, 1, length, dr]. Writing is in place, so that no gradient can come back: given
    what requires one, it turns into the DynamicLayer that it was.
    """

    rows: Tensor | None
    length: int
    dc: int
    _table: tuple[Any, Tensor] | None  # the last block table, after what it was made for

    @property
    def keys(self) -> Tensor | None:
        return None if self.rows is None else self.rows[:, None, : self.length, : self.dc]

    @property
    def values(self) -> Tensor | None:
        return None if self.rows is None else self.rows[:, None, : self.length, self.dc :]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dc, self.length = key_states.shape[-1], 0
        width, B = self.dc + value_states.shape[-1], key_states.shape[0]
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        self.rows = key_states.new_empty(B, 0, width, dtype=dtype)
        self.dtype, self.device = dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append latents [B, 1, T, dc] and keys [B, 1, T, dr]; all of both."""
        if torch.is_grad_enabled():
            release(self)
            return self.update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.length, self.length + key_states.shape[2]
        rows = self._room(end)
        rows[:, begin:end, : self.dc] = key_states[:, 0]
        rows[:, begin:end, self.dc :] = value_states[:, 0]
        self.length = end
        return self.keys, self.values

    def pages(self, starts: Starts) -> tuple[Tensor, Tensor]:
        """The rows as pages, and the block table that leads through each sequence's."""
        assert self.rows is not None
        made_for = self.rows.shape, self.rows.device, starts
        if self._table is None or self._table[0] != made_for:
            self._table = made_for, block_table(self.rows, starts)
        return paged(self.rows, starts), self._table[1]

    def _room(self, end: int) -> Tensor:
        """The rows, made anew where they don't reach beyond `end` by a page."""
        rows = self.rows
        assert rows is not None
        B, capacity, width = rows.shape
        if capacity < end + PAGE or _frozen(rows):
            wider = rows.new_empty(B, whole_pages(end + max(end // 4, ROOM)), width)
            wider[:, : self.length] = rows[:, : self.length]
            self.rows = rows = wider
        return rows

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget as many of the last tokens, given as 0 or less; above 0, how many are kept."""
        kept = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        self.length = max(0, min(self.length, kept))

    def reset(self) -> None:
        self.rows, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.rows is not None:
            self.rows = self.rows[indices.to(self.rows.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.rows = self.rows.repeat_interleave(repeats, dim=0)

    def offload(self) -> None:
        if self.rows is not None:
            self.rows = self.rows.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.rows is not None:
            self.rows = self.rows.to(self.device, non_blocking=True)


def adopt(cache: Any, layer_idx: int) -> None:
    """Make this layer of a cache a LatentLayer, where it is a DynamicLayer of an ordinary cache."""
    if type(cache).update is not transformers.Cache.update or cache.offloading:
        return
    layers = cache.layers
    while cache.layer_class_to_replicate is transformers.DynamicLayer and len(layers) <= layer_idx:
        layers.append(transformers.DynamicLayer())
    layer = layers[layer_idx]
    if type(layer) is not transformers.DynamicLayer:
        return
    keys, values = vars(layer).pop("keys"), vars(layer).pop("values")
    layer.__class__ = LatentLayer
    layer.reset()
    layer._table = None
    if keys is not None and keys.numel():
        layer.update(keys, values)


def pages(
    cache: Any, layer_idx: int, held: tuple[Tensor, Tensor], end: int, starts: Starts
) -> tuple[Tensor, Tensor]:
    """Pages and block table of a layer's first `end` rows: `held` is what its update returned."""
    layer = cache.layers[layer_idx]
    if isinstance(layer, LatentLayer):
        return layer.pages(starts)
    rows = beside(*held, end)
    return paged(rows, starts), block_table(rows, starts)


def release(layer: Any) -> None:
    """Make it a DynamicLayer again."""
    keys, values, filled = layer.keys, layer.values, layer.is_initialized
    for name in ("rows", "length", "dc", "_table"):
        vars(layer).pop(name, None)
    layer.__class__ = transformers.DynamicLayer
    layer.keys, layer.values, layer.is_initialized = keys, values, filled


def _frozen(rows: Tensor) -> bool:
    """Whether they were made in inference mode, outside of which they can't be written to."""
    compiling = torch.compiler.is_compiling()  # and can't be asked
    return not compiling and rows.is_inference() and not torch.is_inference_mode_enabled()


def whole_pages(tokens: int) -> int:
    """Tokens of the pages that hold so many, and one page more."""
    return (-(-tokens // PAGE) + 1) * PAGE


def beside(keys: Tensor, values: Tensor, end: int) -> Tensor:
    """Rows [B, capacity, dc + dr] of what another kind of cache holds apart, copied."""
    latent, key = keys[:, 0, :end], values[:, 0, :end]
    width = latent.shape[2] + key.shape[2]
    dtype = torch.promote_types(keys.dtype, values.dtype)
    rows = latent.new_empty(latent.shape[0], whole_pages(end), width, dtype=dtype)
    rows[:, :end, : latent.shape[2]] = latent
    rows[:, :end, latent.shape[2] :] = key
    return rows


def paged(rows: Tensor, starts: Starts) -> Tensor:
    """Pages [num_blocks, PAGE, dc + dr] of rows: one behind the other, or one from each row on."""
    flat = rows.flatten(0, 1)
    return flat.unflatten(0, (-1, PAGE)) if starts is None else flat.unfold(0, PAGE, 1).mT


def block_table(rows: Tensor, starts: Starts) -> Tensor:
    """int32 [B, capacity / PAGE]: the pages of each sequence from its first token on."""
    B, capacity, _ = rows.shape
    if starts is None:
        return torch.arange(B * capacity // PAGE, dtype=torch.int32).view(B, -1).to(rows.device)
    first = torch.tensor(starts, dtype=torch.int32) + torch.arange(B, dtype=torch.int32) * capacity
    return (first[:, None] + torch.arange(0, capacity, PAGE, dtype=torch.int32)).to(rows.device)
