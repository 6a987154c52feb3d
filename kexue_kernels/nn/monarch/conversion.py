"""monarchize: the Linear layers of a model as Monarchs, and a report of what that costs."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from kexue_kernels import checks, options
from kexue_kernels.monarch.reference import monarch_to_dense
from kexue_kernels.nn.monarch.linear import MonarchLinear

if TYPE_CHECKING:
    from rich.table import Table

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class ConvertedLayer(NamedTuple):
    """One layer before and after; FLOPs are those of the matrix products for one row."""

    path: str
    relative_error: float  # |weight - Monarch| / |weight|
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int


class MonarchReport(NamedTuple):
    """What `kexue_kernels.monarchize` did to a model; `str` of it is a table."""

    converted: list[ConvertedLayer]
    skipped: list[tuple[str, str]]  # (module path, reason)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=200, color_system=None)
        console.print(self.__rich__())
        for path, reason in self.skipped:
            console.print(f"skipped {path}: {reason}", markup=False, highlight=False)
        return text.getvalue().rstrip("\n")

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table("layer", show_footer=bool(self.converted))
        table.columns[0].footer = f"{len(self.converted)} converted, {len(self.skipped)} skipped"
        table.add_column("relative error", justify="right")
        for title, field in (("parameters", "parameters"), ("FLOPs a row", "flops")):
            before, after = (
                sum(getattr(layer, f"{field}_{when}") for layer in self.converted)
                for when in ("before", "after")
            )
            table.add_column(title, footer=_change(before, after), justify="right")
        for layer in self.converted:
            path, error, *counts = layer
            table.add_row(Text(path), f"{error:.4f}", _change(*counts[:2]), _change(*counts[2:]))
        return table


def monarchize(
    model: nn.Module,
    nblocks: int | tuple[int, int],
    rank: int | None = None,
    filter: Callable[[str, nn.Linear], bool] | None = None,
) -> MonarchReport:
    """Replace, in place, each nn.Linear of a model by the nearest `MonarchLinear`.

    Args:
        model: any module that holds Linear layers.
        nblocks: the blocks (k, l) of the two factors, or an int for both.
        rank: of each block; None for full blocks, as in `MonarchLinear`.
        filter: called with each layer's path and module; False leaves the layer alone, in every
            place where it stands. It is for layers whose weight something else reads, and those
            not worth an error.

    Returns:
        `.converted`, with each layer's path, relative error, parameters and FLOPs a row before
        and after; and `.skipped`, a list of (path, reason). Skipped are layers that `filter`
        refuses, whose sizes nblocks doesn't divide or rank exceeds, that share a parameter with
        another module, that have hooks or a forward of their own, or whose owner is known to read
        the weight itself (`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`). A layer that
        stands in several places is replaced by one in all of them.

    New parameters have the dtype, device and requires_grad of the old; an optimizer still
    holds the old ones, so make it afterwards. Either all layers are replaced or, where an error
    is raised, none.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: nblocks or rank below 1, a model that is itself a Linear, or a weight that is
            not finite.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate
    Training" (2022), section 5.3: dense to sparse fine-tuning.
    """
    k, l = _checked(model, nblocks, rank, filter)
    report = MonarchReport([], [])
    made: dict[nn.Linear, MonarchLinear] = {}
    places = _places(model)
    for linear, paths in places.items():
        reason = _reason_against(model, linear, paths, k, l, rank)
        if reason is None and filter is not None:
            wanted = all(filter(path, linear) for path in paths)
            reason = None if wanted else "refused by the filter"
        if reason is not None:
            report.skipped.append((paths[0], reason))
            continue
        try:
            made[linear] = _converted(linear, (k, l), rank)
        except ValueError as error:
            error.add_note(f"in the layer {paths[0]}")
            raise
        report.converted.append(_line(paths[0], linear, made[linear]))
    for linear, layer in made.items():
        for path in places[linear]:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
    return report


def _checked(model: object, nblocks: object, rank: int | None, filter: object) -> tuple[int, int]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a module that holds Linear layers, got one itself "
            "(kk.nn.MonarchLinear.from_linear converts it)"
        )
    pair = nblocks if isinstance(nblocks, tuple | list) else (nblocks, nblocks)
    if len(pair) != 2:
        raise ValueError(f"nblocks: expected an int or a pair (k, l), got {nblocks!r}")
    for name, count in zip("kl", pair, strict=True):
        options.integer(f"nblocks ({name})", count)
    if rank is not None:
        options.integer("rank", rank)
    if filter is not None and not callable(filter):
        raise TypeError(f"filter: expected a callable or None, got {type(filter).__name__}")
    return pair[0], pair[1]


def _places(model: nn.Module) -> dict[nn.Linear, list[str]]:
    """Every Linear layer and the paths it stands at."""
    found: dict[nn.Linear, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            found.setdefault(module, []).append(path)
    return found


def _reason_against(
    model: nn.Module, linear: nn.Linear, paths: list[str], k: int, l: int, rank: int | None
) -> str | None:
    """Why the layer can't be replaced, if it can't."""
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, not a plain Linear"
    if any(getattr(linear, hooks) for hooks in _HOOKS):
        return "has hooks, which a new module would not run"
    if "forward" in vars(linear):
        return "has a forward of its own, which a new module would not run"
    for path in paths:
        if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
            return "its TransformerEncoderLayer reads the weight itself"
    if linear.weight.is_meta:
        return "is on the meta device"
    if linear.weight.dtype not in checks.FLOATING:
        return f"has dtype {str(linear.weight.dtype).removeprefix('torch.')}"
    others = _sharers(model, linear)
    if others:
        return f"shares a parameter with {', '.join(others)}"
    return _misfit(linear, k, l, rank)


def _sharers(model: nn.Module, linear: nn.Linear) -> list[str]:
    """Parameters of other modules that are this layer's too."""
    own = {id(parameter) for parameter in linear.parameters()}
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if module is not linear
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in own
    ]


def _misfit(linear: nn.Linear, k: int, l: int, rank: int | None) -> str | None:
    size = f"{linear.in_features} -> {linear.out_features}"
    if linear.in_features % k or linear.out_features % l:
        blocks = f"{k} blocks don't" if k == l else f"({k}, {l}) blocks don't"
        return f"{blocks} divide {size}"
    full = min(linear.in_features // k, linear.out_features // l)
    if full == 0:
        return f"has no elements ({size})"
    if rank is not None and rank > full:
        return f"rank {rank} is above that of a block, {full} ({size})"
    return None


def _converted(linear: nn.Linear, nblocks: tuple[int, int], rank: int | None) -> MonarchLinear:
    layer = MonarchLinear.from_linear(linear, nblocks=nblocks, rank=rank)
    for name, parameter in layer.named_parameters():
        old = linear.bias if name == "bias" else linear.weight
        parameter.requires_grad_(old.requires_grad)
    return layer


@torch.no_grad()
def _line(path: str, linear: nn.Linear, layer: MonarchLinear) -> ConvertedLayer:
    wide = checks.state_dtype(linear.weight.dtype)
    weight = linear.weight.to(wide)
    lost = torch.linalg.vector_norm(weight - monarch_to_dense(layer.w1.to(wide), layer.w2.to(wide)))
    norm = torch.linalg.vector_norm(weight)
    return ConvertedLayer(
        path,
        torch.where(norm > 0, lost / norm, 0).item(),
        sum(parameter.numel() for parameter in linear.parameters()),
        sum(parameter.numel() for parameter in layer.parameters()),
        2 * linear.weight.numel(),
        2 * (layer.w1.numel() + layer.w2.numel()),
    )


def _change(before: int, after: int) -> str:
    share = f" ({after / before:.1%})" if before else ""
    return f"{before:,} -> {after:,}{share}"
