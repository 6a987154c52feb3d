"""What `kexue_kernels.patch` did to a model."""

from typing import NamedTuple


class PatchReport(NamedTuple):
    """Each module of a kind that can be replaced, by its path in the model."""

    replaced: list[tuple[str, str]]  # (module path, original class name)
    skipped: list[tuple[str, str]]  # (module path, reason)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.skipped)} skipped"]
        lines += [f"  replaced {path}: {name}" for path, name in self.replaced]
        lines += [f"  skipped {path}: {reason}" for path, reason in self.skipped]
        return "\n".join(lines)
