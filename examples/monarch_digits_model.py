"""Handwritten digits that come with scikit-learn, and a perceptron to read them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import kexue_kernels as kk

PIXELS, CLASSES, WIDTH = 64, 10, 1024
TRAINED = 1000  # images; the other 797 are held out


class Digits(NamedTuple):
    """Images [n, 64] of mean 0 and variance 1, and their classes [n]."""

    train: Tensor
    train_classes: Tensor
    held_out: Tensor
    held_out_classes: Tensor


def load_digits() -> Digits:
    """One split for every run."""
    from sklearn.datasets import load_digits as load

    found = load()
    images = torch.from_numpy(found.data).float()
    classes = torch.from_numpy(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:TRAINED], order[TRAINED:]
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return Digits(images[train], classes[train], images[held_out], classes[held_out])


def perceptron(width: int = WIDTH, nblocks: int | None = None) -> nn.Sequential:
    """Two hidden layers; nblocks makes a Monarch of what lies between them."""
    middle: nn.Module = nn.Linear(width, width)
    if nblocks is not None:
        middle = kk.nn.MonarchLinear(width, width, nblocks=nblocks)
    return nn.Sequential(
        nn.Linear(PIXELS, width), nn.ReLU(), middle, nn.ReLU(), nn.Linear(width, CLASSES)
    )


def is_square(_: str, layer: nn.Linear) -> bool:
    """The filter for `kk.monarchize`: the layer that most parameters are in."""
    return layer.in_features == layer.out_features


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module) -> int:
    """Of the matrix products for one image: two for each weight."""
    return sum(2 * p.numel() for p in model.parameters() if p.ndim > 1)
