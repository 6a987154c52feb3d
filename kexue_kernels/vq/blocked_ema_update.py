"""The step of ema_update_ in PyTorch: a few operations on tensors of the codebook's size."""

from kexue_kernels.vq.reference import ema_step_ as step

__all__ = ["step"]
