"""Is a backend's answer as good as plain PyTorch's? Values and gradients, against float64."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kexue_kernels.cli.selfcheck_cases import Case

DOUBLE = {torch.complex64: torch.complex128}


@dataclass(frozen=True)
class Result:
    """The tensor that came closest to its limit, or went furthest past it."""

    op: str
    backend: str
    case: str
    worst: str = ""
    error: float = 0.0
    allowed: float = 0.0
    failure: str = ""  # the exception, where there is one

    @property
    def ok(self) -> bool:
        return not self.failure and self.error <= self.allowed


class Checker:
    """One case: its inputs, and the reference's answers in float64 and in the case's dtype."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.inputs = case.make()

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        return answers(self.case, {k: _widened(x) for k, x in self.inputs.items()}, "reference")

    @functools.cached_property
    def plain(self) -> dict[str, Tensor]:
        return answers(self.case, self.inputs, "reference")

    def check(self, backend: str, device: str) -> Result:
        """Error against float64 at most twice the reference's in the same dtype, plus rounding."""
        try:
            inputs = {name: _moved(x, device) for name, x in self.inputs.items()}
            found = answers(self.case, inputs, backend)
        except Exception as error:  # of any kind: a kernel that fails is what this looks for
            failure = f"{type(error).__name__}: {error}"
            return Result(self.case.op, backend, self.case.name, failure=failure)
        return max((self._compare(backend, name, x) for name, x in found.items()), key=_excess)

    def _compare(self, backend: str, name: str, found: Tensor) -> Result:
        exact, plain = self.exact[name], self.plain[name]
        result = functools.partial(Result, self.case.op, backend, self.case.name, name)
        if found.shape != exact.shape or found.dtype != plain.dtype:
            wrong = f"{name} is {found.dtype} {list(found.shape)}"
            return result(failure=f"{wrong}, expected {plain.dtype} {list(exact.shape)}")
        if not _floating(found):
            return result(error=float((found.cpu() != exact).sum()))
        rounding = 4 * torch.finfo(found.dtype).eps * _largest(exact)
        return result(error=_error(found, exact), allowed=2 * _error(plain, exact) + rounding)


def answers(case: Case, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs, and the gradients of their weighted sum, by name."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    outputs = case.call({**inputs, **leaves}, backend)
    found = {name: x.detach() for name, x in outputs.items()}
    if leaves:
        floating = [x for x in outputs.values() if _floating(x)]
        grads = torch.autograd.grad(floating, list(leaves.values()), _cotangents(floating))
        found |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def _cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """The same for every dtype and device: numbers that a half holds exactly."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(-8, 9, (2, *x.shape), generator=generator) / 8 for x in outputs]
    return [
        (torch.complex(*w) if x.is_complex() else w[0]).to(x.dtype).to(x.device)
        for w, x in zip(drawn, outputs, strict=True)
    ]


def _moved(x: Tensor, device: str) -> Tensor:
    """On the device, strides and the numbers between them included."""
    storage = x.as_strided((x.untyped_storage().size() // x.itemsize,), (1,), 0)
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _widened(x: Tensor) -> Tensor:
    return x.to(DOUBLE.get(x.dtype, torch.float64)) if _floating(x) else x


def _floating(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _error(x: Tensor, exact: Tensor) -> float:
    """The largest deviation; NaN counts as infinite."""
    return _largest((x.cpu().to(exact.dtype) - exact).abs().nan_to_num(nan=torch.inf))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _excess(result: Result) -> float:
    if result.failure:
        return torch.inf
    if result.allowed == 0:
        return torch.inf if result.error else 0.0
    return result.error / result.allowed
