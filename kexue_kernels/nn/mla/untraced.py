"""What torch.compile leaves to Python: a module of its own, as it imports Dynamo.

Which pages a cache gives out, and how long its sequences are, change with each token. Traced, they
would be constants of a graph, and each token would need a graph of its own.
"""

import torch

from kexue_kernels.nn.mla.step import Step

take = torch.compiler.disable(
    Step.take,
    reason="what a PagedLatentCache holds is kept in Python; "
    "with a kexue_kernels.nn.mla.DecodeStep the layer is one graph",
)
