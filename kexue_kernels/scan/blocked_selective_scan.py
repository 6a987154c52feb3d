"""selective_scan in PyTorch without a Python step per time step: where no compiled kernel serves.

L is cut into the chunks of the checkpoints, [batch, chunks, K, ...], which advance together: once
to find what each does to the state passing through it, then, with the states known, once more
for the outputs. The backward goes against the steps likewise; its states are those of a few
chunks at a time, so that a fixed number of tensors as large as u exists at once.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from kexue_kernels.scan.chunks import SelectiveGradients, SelectiveInputs, chunk_length

Marks = list[tuple[Tensor, Tensor]]  # for each step of a chunk: (chunks, sequences)


def forward(
    inputs: SelectiveInputs,
    out: Tensor,
    final_state: Tensor | None,
    checkpoints: Tensor | None,
) -> None:
    run = _Recurrence(inputs)
    initial = run.by_sequence(inputs.initial_state)
    final = initial.clone()
    state = run.entering(initial)
    if checkpoints is not None:
        checkpoints.copy_(state.mT)
    y = torch.empty_like(run.dt)
    for k in range(run.K):
        chunks, sequences = run.first[k]
        state[:, chunks] = initial[:, sequences]
        state = run.advance(state, k)
        y[:, :, k] = run.read_out(run.step(run.C, k), state)
        chunks, sequences = run.last[k]
        final[:, sequences] = state[:, chunks]
    if final_state is not None:
        final_state.copy_(final.view_as(final_state))
    y = run.joined(y)
    if inputs.D is not None:
        y = y + inputs.D * inputs.u
    out.copy_(y if inputs.z is None else y * functional.silu(inputs.z.to(y.dtype)))


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    inputs: SelectiveInputs,
    checkpoints: Tensor,
) -> SelectiveGradients:
    run = _Recurrence(inputs)
    u, delta, _, B, C, D, z, delta_bias, initial_state, _, delta_softplus = inputs
    reaches = grad_out.to(run.dt.dtype)
    if z is not None:
        gate = torch.sigmoid(z.to(reaches.dtype))
        slope = gate * (1 + z * (1 - gate))  # silu's
        grad_gated, reaches = reaches, reaches * z * gate
    sums = _Sums(run, run.cut(reaches) * run.output_scale, grad_final, initial_state)
    for begin in range(0, run.chunks, sums.at_once):
        sums.add(slice(begin, begin + sums.at_once), checkpoints.mT)

    BG = run.joined(sums.BG)
    grad_delta = run.joined(sums.dt) + u * BG
    if delta_softplus:
        grad_delta = grad_delta * torch.sigmoid(run.raw)
    grad_u = run.joined(run.dt) * BG
    y = run.joined(sums.y)
    if D is not None:
        grad_u, y = grad_u + D * reaches, y + D * u
    return SelectiveGradients(
        grad_u.to(u.dtype),
        grad_delta.to(delta.dtype),
        sums.A,
        run.joined(sums.B).to(B.dtype) if B.ndim == 4 else sums.B,
        run.joined(sums.C).to(C.dtype) if C.ndim == 4 else sums.C,
        None if D is None else (reaches * u).sum((0, 1)),
        None if z is None else (grad_gated * y * slope).to(z.dtype),
        None if delta_bias is None else grad_delta.sum((0, 1)),
        None if initial_state is None else sums.initial.view_as(initial_state),
    )


class _Recurrence:
    """What states are made of, cut into chunks, and where sequences begin and end in them."""

    def __init__(self, inputs: SelectiveInputs) -> None:
        u, delta, A, B, C, _, _, delta_bias, _, cu_seqlens, delta_softplus = inputs
        self.batch, self.L, self.d = u.shape
        self.K = chunk_length(A.shape[1])
        self.chunks = -(-self.L // self.K)
        self.A = A
        self.output_scale = 2 if A.is_complex() else 1
        real = A.real.dtype
        self.raw = delta.to(real) if delta_bias is None else delta.to(real) + delta_bias
        self.dt = self.cut(functional.softplus(self.raw) if delta_softplus else self.raw)
        self.dtu = self.dt * self.cut(u.to(real))
        self.B, self.C = (self.cut(x.to(A.dtype)) if x.ndim == 4 else x for x in (B, C))
        self.bounds = [0, self.L] if cu_seqlens is None else cu_seqlens.tolist()
        spans = [(n, span) for n, span in enumerate(pairwise(self.bounds)) if span[0] < span[1]]
        self.first = self._marks([(n, begin) for n, (begin, _) in spans])
        self.last = self._marks([(n, end - 1) for n, (_, end) in spans])

    def cut(self, x: Tensor) -> Tensor:
        """[batch, L, ...] as [batch, chunks, K, ...], padded with zeros: steps that do nothing."""
        padding = self.chunks * self.K - self.L
        x = functional.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
        return x.unflatten(1, (self.chunks, self.K))

    def joined(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)[:, : self.L]

    def by_sequence(self, states: Tensor | None) -> Tensor:
        """States as [batch, sequences of a row, d, n]."""
        count = len(self.bounds) - 1
        shape = self.batch, count, *self.A.shape
        if states is None:
            return self.A.new_zeros(shape)
        return states.view(shape)

    def step(self, x: Tensor, k: int | slice, chunks: slice = slice(None)) -> Tensor:
        """B or C, broadcasting to states [batch, chunks, (steps,) d, n]."""
        if x.ndim == 2:
            return x
        x = x[:, chunks, k]
        return x if x.shape[-2] == 1 else x.repeat_interleave(self.d // x.shape[-2], -2)

    def decay(self, k: int | slice, chunks: slice = slice(None)) -> Tensor:
        return torch.exp(self.dt[:, chunks, k].unsqueeze(-1) * self.A)

    def input(self, k: int | slice, chunks: slice = slice(None)) -> Tensor:
        return self.dtu[:, chunks, k].unsqueeze(-1) * self.step(self.B, k, chunks)

    def advance(self, state: Tensor, k: int) -> Tensor:
        return self.decay(k) * state + self.input(k)

    def read_out(self, C: Tensor, state: Tensor) -> Tensor:
        y = (C * state).sum(-1)
        return 2 * y.real if y.is_complex() else y

    def entering(self, initial: Tensor) -> Tensor:
        """The states that enter each chunk, [batch, chunks, d, n]."""
        state = self._no_states()
        for k in range(self.K):
            chunks, sequences = self.first[k]
            state[:, chunks] = initial[:, sequences]
            state = self.advance(state, k)
        enters = self._carried(state, self.first, range(self.chunks), back=False)
        chunks, sequences = self.first[0]
        enters[:, chunks] = initial[:, sequences]
        return enters

    def entering_back(self, grad_y: Tensor, final: Tensor) -> Tensor:
        """The gradients of states that reach each chunk from the next."""
        flow = self._no_states()
        for k in reversed(range(self.K)):
            chunks, sequences = self.last[k]
            flow[:, chunks] = final[:, sequences]
            C = torch.conj_physical(self.step(self.C, k))
            flow = torch.conj_physical(self.decay(k)) * (flow + C * grad_y[:, :, k].unsqueeze(-1))
        return self._carried(flow, self.last, range(self.chunks - 1, -1, -1), back=True)

    def _no_states(self) -> Tensor:
        return self.A.new_zeros(self.batch, self.chunks, *self.A.shape)

    def _carried(self, local: Tensor, marks: Marks, order: range, back: bool) -> Tensor:
        """What enters each chunk, from what each adds; past a mark nothing else passes."""
        product = torch.exp(self.dt.sum(2).unsqueeze(-1) * self.A)
        if back:
            product = torch.conj_physical(product)
        product[:, torch.cat([chunks for chunks, _ in marks])] = 0
        enters = torch.empty_like(local)
        state = torch.zeros_like(local[:, 0])
        for c in order:
            enters[:, c] = state
            # a product that overflowed must not meet a zero state: inf * 0 is NaN
            passed = torch.where(state == 0, state, product[:, c] * state)
            state = passed + local[:, c]
        return enters

    def _marks(self, steps: list[tuple[int, int]]) -> Marks:
        by_step: list[list[tuple[int, int]]] = [[] for _ in range(self.K)]
        for n, step in steps:
            by_step[step % self.K].append((step // self.K, n))
        pairs = [torch.tensor(each, dtype=torch.int64).view(-1, 2) for each in by_step]
        return [tuple(each.to(self.A.device).unbind(1)) for each in pairs]  # type: ignore[misc]


class _Sums:
    """Gradients that are sums over states, steps or channels, of a few chunks at a time."""

    def __init__(
        self, run: _Recurrence, grad_y: Tensor, grad_final: Tensor | None, initial: Tensor | None
    ) -> None:
        self.run, self.grad_y = run, grad_y
        self.at_once = max(1, run.chunks // run.A.shape[1])
        self.starts = run.by_sequence(initial)
        self.ends = run.by_sequence(grad_final)
        self.flow = run.entering_back(grad_y, self.ends)
        self.initial = self.ends.clone()  # an empty sequence's
        self.A, self.B, self.C = (torch.zeros_like(x) for x in (run.A, run.B, run.C))
        self.dt, self.BG, self.y = (torch.empty_like(run.dt) for _ in range(3))

    def add(self, own: slice, checkpoints: Tensor) -> None:
        run, steps = self.run, slice(None)
        decay = run.decay(steps, own)
        added = run.input(steps, own)
        before = self._states(own, decay, added, checkpoints)
        after = decay * before + added
        B, C = run.step(run.B, steps, own), run.step(run.C, steps, own)
        g = self.grad_y[:, own].unsqueeze(-1)
        G = self._gradients(own, decay, torch.conj_physical(C) * g)

        p = torch.conj_physical(decay * before) * G
        dt = run.dt[:, own].unsqueeze(-1)
        self.A += (dt * p).sum((0, 1, 2))
        self.dt[:, own] = (torch.conj_physical(run.A) * p).sum(-1).real
        self.BG[:, own] = (torch.conj_physical(B) * G).sum(-1).real
        self.y[:, own] = run.read_out(C, after)
        self._add(self.B, own, run.dtu[:, own].unsqueeze(-1) * G)
        self._add(self.C, own, g * torch.conj_physical(after))

    def _add(self, to: Tensor, own: slice, terms: Tensor) -> None:
        """terms [batch, chunks, K, d, n], summed to the shape of B or C."""
        if to.ndim == 2:
            to += terms.sum((0, 1, 2))
        else:
            to[:, own] = terms.unflatten(-2, (to.shape[-2], -1)).sum(-2)

    def _states(self, own: slice, decay: Tensor, added: Tensor, checkpoints: Tensor) -> Tensor:
        before = torch.empty_like(added)
        state = checkpoints[:, own].clone()
        for k in range(self.run.K):
            chunks, sequences = self._within(self.run.first[k], own)
            state[:, chunks] = self.starts[:, sequences]
            before[:, :, k] = state
            state = decay[:, :, k] * state + added[:, :, k]
        return before

    def _gradients(self, own: slice, decay: Tensor, grad_states: Tensor) -> Tensor:
        G = torch.empty_like(decay)
        flow = self.flow[:, own].clone()
        for k in reversed(range(self.run.K)):
            chunks, sequences = self._within(self.run.last[k], own)
            flow[:, chunks] = self.ends[:, sequences]
            G[:, :, k] = flow + grad_states[:, :, k]
            flow = torch.conj_physical(decay[:, :, k]) * G[:, :, k]
            chunks, sequences = self._within(self.run.first[k], own)
            self.initial[:, sequences] = flow[:, chunks]
        return G

    @staticmethod
    def _within(marks: tuple[Tensor, Tensor], own: slice) -> tuple[Tensor, Tensor]:
        chunks, sequences = marks
        live = (chunks >= own.start) & (chunks < own.stop)
        return chunks[live] - own.start, sequences[live]
