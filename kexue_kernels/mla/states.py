"""merge_attention_states: attention over a set of keys from attention over its parts."""

from torch import Tensor

from kexue_kernels import checks
from kexue_kernels.mla import reference


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Join the results of attention over disjoint keys: those of all the keys, exactly.

        lse = log(exp(lse_a) + exp(lse_b)),  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Args:
        out_a, out_b: [B, T, H, dv], of one dtype.
        lse_a, lse_b: [B, H, T], natural logarithms, float32 (float64 beside float64); -inf where
            a query saw no key, or +inf, as `flash_mla_with_kvcache` has it.

    Returns:
        out in out_a's dtype, and lse; 0 and -inf where neither saw a key.

    Differentiable in all four, any number of times.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype or device, named.

    Source: Ye et al., "FlashInfer" (2025), section 2.2.
    """
    for name, value in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        checks.tensor(name, value)
    checks.dtype("out_a", out_a, checks.REAL)
    checks.ndim("out_a", out_a, 4, "[B, T, H, dv]")
    checks.like("out_b", out_b, out_a, "out_a", "[B, T, H, dv]")
    B, T, H, _ = out_a.shape
    for name, value in (("lse_a", lse_a), ("lse_b", lse_b)):
        checks.dtype(name, value, (checks.state_dtype(out_a.dtype),))
        checks.shape(name, value, (B, H, T), "[B, H, T]")
        checks.device(name, value, out_a.device, "out_a")
    return reference.merge_attention_states(out_a, lse_a, out_b, lse_b)
