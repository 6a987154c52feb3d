"""Checks of arguments that are no tensors, for ops and modules alike."""

import math

import torch


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def integer(name: str, value: object, smallest: int = 1) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < smallest:
        raise ValueError(f"{name}: expected at least {smallest}, got {value}")


def number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def finite(name: str, value: object) -> None:
    number(name, value)
    assert isinstance(value, int | float)
    if not -math.inf < value < math.inf:  # traceable, unlike isfinite
        raise ValueError(f"{name}: expected a finite number, got {value}")
