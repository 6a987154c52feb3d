"""selective_scan in CUDA C++: what is allocated and how a call is cut up.

The kernels: csrc/scan/selective_scan_forward.cuh, _backward.cuh and _split.cuh. Nothing here waits
for the device, so calls can be captured in a graph.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kexue_kernels.scan.chunks import SelectiveGradients, SelectiveInputs, chunk_length
from kexue_kernels.scan.cuda_linear_scan import DTYPES, _address, _array, _module, _stream

WARPS_PER_PROCESSOR = 8  # that the kernels are meant to run with
SHORTEST_SPLIT = 128  # steps


def forward(
    inputs: SelectiveInputs,
    out: Tensor,
    final_state: Tensor | None,
    checkpoints: Tensor | None,
) -> None:
    u, A = inputs.u, inputs.A
    call = _prepare(inputs, backward=False)
    sums = _sums(u, 1) if A.shape[1] > call.launch_states else None
    entering = time = None
    if call.cut.split < u.shape[1]:
        entering = A.new_empty((call.cut.slots, A.shape[1], A.shape[0]))
        time = u.new_empty((call.cut.slots, A.shape[0]), dtype=torch.float32)
    options = {"given": call.given, "dtype": DTYPES[u.dtype], "complex": A.is_complex()}
    nothing = dict.fromkeys(("out", "sums", "final", "checkpoints", "entering", "local", "time"), 0)
    with _stream(u.device) as stream:
        if entering is not None:
            local = {"local": entering.data_ptr(), "time": _address(time), "stream": stream}
            _module().selective_scan_cuda_forward(**options, **nothing | local)
            _chain(call, A, inputs.initial_state, entering, time, False, stream)
        outputs = {
            "out": out.data_ptr(),
            "sums": _address(sums),
            "final": _address(final_state),
            "checkpoints": _address(checkpoints),
            "entering": _address(entering),
            "stream": stream,
        }
        _module().selective_scan_cuda_forward(**options, **nothing | outputs)


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    inputs: SelectiveInputs,
    checkpoints: Tensor,
) -> SelectiveGradients:
    u, _, A, B, C, D, z, delta_bias, initial_state, *_ = inputs
    call = _prepare(inputs, backward=True)
    d, n = A.shape
    rows = call.cut.rows
    grads = {name: u.new_empty(u.shape) for name in ("u", "delta")}
    if z is not None:
        grads["z"] = u.new_empty(u.shape)
    of_rows = {"A": A.new_empty((rows, n, d))}  # sums over the steps of a block's segments
    of_rows |= {name: A.new_empty((rows, n, d)) for name in call.invariant}
    of_rows |= {k: u.new_empty((rows, d), dtype=torch.float32) for k in ("D", "bias")}
    grad_initial = None if initial_state is None else torch.empty_like(initial_state)
    over_launches = _sums(u, 3) if n > call.launch_states else None
    per_step: dict[str, list[Tensor]] = {"B": [], "C": []}
    options = {"given": call.given, "dtype": DTYPES[u.dtype], "complex": A.is_complex()}
    options["grad_out"] = _array(grad_out)
    with _stream(u.device) as stream:
        options["stream"] = stream
        entering = None
        if call.cut.split < u.shape[1]:
            entering = A.new_empty((call.cut.slots, n, d))
            time = u.new_empty((call.cut.slots, d), dtype=torch.float32)
            addresses = {"local": entering.data_ptr(), "time": time.data_ptr()}
            _module().selective_scan_cuda_reverse(**options, **addresses)
            _chain(call, A, grad_final, entering, time, True, stream)
        for first in range(0, n, call.launch_states):
            shape = (*u.shape[:2], call.tiles, min(call.launch_states, n - first))
            of_tiles = {k: A.new_empty(shape) for k in ("B", "C") if k not in call.invariant}
            _module().selective_scan_cuda_backward(
                **options,
                **{k: x.data_ptr() for k, x in (of_rows | of_tiles).items()},
                **{k: _address(grads.get(k)) for k in ("u", "delta", "z")},
                first_state=first,
                checkpoints=checkpoints.data_ptr(),
                grad_final=_address(grad_final),
                entering=_address(entering),
                initial=_address(grad_initial),
                sums=_address(over_launches),
            )
            for k, x in of_tiles.items():
                per_step[k].append(_over_tiles(x, B if k == "B" else C))
    of_steps = {k: x.sum(0) for k, x in of_rows.items()}
    matrices = {k: torch.cat(x, 3) if len(x) > 1 else x[0] for k, x in per_step.items() if x}
    matrices |= {k: x.T.contiguous() for k, x in of_steps.items() if x.ndim == 2}
    return SelectiveGradients(
        u=grads["u"],
        delta=grads["delta"],
        A=matrices["A"],
        B=matrices["B"],
        C=matrices["C"],
        D=None if D is None else of_steps["D"],
        z=grads.get("z"),
        delta_bias=None if delta_bias is None else of_steps["bias"],
        initial_state=grad_initial,
    )


def _over_tiles(sums: Tensor, x: Tensor) -> Tensor:
    """[batch, L, tiles, states] -> [batch, L, groups, states]: tiles never straddle groups."""
    batch, L, _, states = sums.shape
    return sums.view(batch, L, x.shape[2], -1, states).sum(3).to(x.dtype)


def _chain(
    call: "_Call",
    A: Tensor,
    firsts: Tensor | None,
    states: Tensor,
    time: Tensor | None,
    backwards: bool,
    stream: int,
) -> None:
    """What segments do, from zero, becomes what enters them."""
    _module().selective_scan_cuda_chain(
        given=call.given,
        complex=A.is_complex(),
        firsts=_address(firsts),
        states=states.data_ptr(),
        time=_address(time),
        backwards=backwards,
        stream=stream,
    )


class Cut(NamedTuple):
    split: int  # steps
    slots: int
    rows: int
    run: int


class _Call(NamedTuple):
    given: tuple[object, ...]
    cut: Cut
    tiles: int
    launch_states: int
    invariant: tuple[str, ...]  # of B and C
    cu_seqlens: Tensor | None  # kept for as long as `given` has its address


def _prepare(inputs: SelectiveInputs, backward: bool) -> _Call:
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus = inputs
    batch, L, d = u.shape
    n = A.shape[1]
    sequences = batch
    if cu_seqlens is not None:
        # Values on a device are not checked: wrong ones must still not lead outside the data.
        cu_seqlens = cu_seqlens.clamp(0, L).cummax(0).values
        sequences = cu_seqlens.shape[0] - 1
    forward_channels, backward_channels, states = _limits(A.is_complex())
    run = math.gcd(*(d if x.ndim == 2 else d // x.shape[2] for x in (B, C)))
    tiles = d // run * -(-run // (backward_channels if backward else forward_channels))
    warps = tiles * (4 if backward else 2)
    chunk = chunk_length(n)
    cut = choose_cut(
        sequences=sequences,
        packed=cu_seqlens is not None,
        steps=batch * L,
        L=L,
        chunk=chunk,
        warps=warps,
        tiles=tiles,
        processors=_processors(u.device),
        run=run,
    )
    given = (
        (batch, L, d, n, chunk, sequences),
        tuple(cut),
        _address(cu_seqlens),
        delta_softplus,
        _array(u),
        _array(delta),
        (0, 0, 0, 0) if z is None else _array(z),
        A.data_ptr(),
        _matrix(B, d),
        _matrix(C, d),
        _address(D),
        _address(delta_bias),
        _address(initial_state),
    )
    invariant = tuple(name for name, x in (("B", B), ("C", C)) if x.ndim == 2)
    return _Call(given, cut, tiles, states, invariant, cu_seqlens)


def choose_cut(
    *,
    sequences: int,
    packed: bool,
    steps: int,
    L: int,
    chunk: int,
    warps: int,
    tiles: int,
    processors: int,
    run: int,
) -> Cut:
    """Segments and blocks. A segment is a sequence; sequences are only cut where the device would
    be three quarters empty without, since that costs every exponential twice."""
    wanted = processors * WARPS_PER_PROCESSOR
    split = L // chunk * chunk + chunk
    if 4 * sequences * warps <= wanted:
        pieces = -(-wanted // warps)
        shorter = max(-(-steps // pieces), SHORTEST_SPLIT)
        split = min(split, -(-shorter // chunk) * chunk)
    slots = L // split + sequences if packed else sequences * -(-L // split)
    rows = min(slots, -(-8 * wanted // tiles))  # more: a block takes several segments
    return Cut(split, slots, rows, run)


def _matrix(x: Tensor, d: int) -> tuple[int, ...]:
    """Address, strides, and channels of a group: 0 where x is time-invariant."""
    if x.ndim == 2:
        return x.data_ptr(), 0, 0, 0, 0, 0
    strides = (0 if size == 1 else s for size, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), *strides, d // x.shape[2]


def _sums(u: Tensor, planes: int) -> Tensor:
    return u.new_empty((planes, *u.shape), dtype=torch.float32)


@functools.cache
def _limits(complex: bool) -> tuple[int, int, int]:
    return _module().selective_scan_cuda_limits(complex)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
