"""How a family names the Triton kernels it ships: `compile_cases() -> list[TritonCase]`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TritonCase:
    """One kernel in one shipped configuration: what the compiler needs, and the op's roofline.

    `signature` maps every argument to its Triton type ("*fp32", "i64", "constexpr") and
    `constexprs` the constant ones to their values. The two counts are the op's traffic with
    memory and its arithmetic per element of its main input, whatever the kernel does.
    `divisible_by_16` names the arguments a launch finds to be multiples of 16 (aligned
    pointers, whole vectors of channels), for which Triton compiles a variant of its own.
    `archs` are those for which a launcher picks the configuration; without any, all.
    """

    op: str
    name: str  # the configuration, in words
    kernel: str  # "module:attribute"
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    bytes_per_element: float
    flops_per_element: float
    divisible_by_16: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
