"""Photographs that come with scikit-learn, and a small autoencoder with a codebook inside."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import kexue_kernels as kk

CODES, CHANNELS, WIDTH = 1024, 32, 48
STRIDE = 4  # pixels a row of the codebook stands for, each way
AVERAGED = {"ema_decay": 0.8, "commitment_weight": 1.0}  # as vector-quantize-pytorch's defaults
METHODS: dict[str, dict[str, object]] = {
    "straight through": {"gradient": "ste", **AVERAGED},
    "rotation": {"gradient": "rotation", **AVERAGED},
    "SimVQ": {"gradient": "ste", "simvq": True},
}


class Photos(NamedTuple):
    """Two photographs, cut at a column: [2, 3, height, width] in -1 .. 1."""

    train: Tensor
    held_out: Tensor


def load_photos(held_out: int = 128) -> Photos:
    """A temple and a flower; their last columns are kept for evaluation."""
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    height = images.shape[2] // STRIDE * STRIDE
    images = images[:, :, :height]
    return Photos(images[..., :-held_out], images[..., -held_out:])


def crops(photos: Tensor, count: int, size: int) -> Tensor:
    """Random squares [count, 3, size, size]."""
    n, _, height, width = photos.shape
    tops = torch.randint(height - size + 1, (count,)).tolist()
    lefts = torch.randint(width - size + 1, (count,)).tolist()
    which = torch.randint(n, (count,)).tolist()
    cut = zip(which, tops, lefts, strict=True)
    return torch.stack([photos[i, :, y : y + size, x : x + size] for i, y, x in cut])


class Autoencoder(nn.Module):
    """Convolutions down to a quarter of the resolution, a code for each place, and back."""

    def __init__(self, **quantizer: object) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, WIDTH, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(WIDTH, WIDTH, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(WIDTH, CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, WIDTH, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(WIDTH, WIDTH, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(WIDTH, 3, 4, stride=2, padding=1),
        )
        self.quantizer = kk.nn.VectorQuantizer(CHANNELS, CODES, **quantizer)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images made anew, and the quantiser's loss."""
        h = self.encoder(images).movedim(1, -1)  # [B, height, width, CHANNELS]
        quantized, _, loss = self.quantizer(h)
        return self.decoder(quantized.movedim(-1, 1)), loss
