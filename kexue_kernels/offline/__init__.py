"""What a kernel compiles to, found without the GPU it is for.

case.py says how a family lists its kernels; triton.py compiles them and cubins.py takes the
CUDA C++ ones out of the extension; sass.py and gcn.py read machine code, instructions.py finds
the hottest loop, occupancy.py and archs.py know the hardware, card.py holds the result.
"""

from kexue_kernels.offline.case import TritonCase

__all__ = ["TritonCase"]
