"""The modules of Hugging Face Transformers models, replaced in place by fused ones."""

from kexue_kernels.integrations.patching import patch, unpatch
from kexue_kernels.integrations.report import PatchReport

__all__ = ["PatchReport", "patch", "unpatch"]
