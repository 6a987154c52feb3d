"""The benchmark: cases, peers, the machine's roof, and what came of them.

A case is a shape with its bytes and FLOPs counted; contestants are this package's backends and
other people's ways to the same result. See `run`.
"""

from kexue_kernels.benchmarks.runner import FAMILIES, run

__all__ = ["FAMILIES", "run"]
