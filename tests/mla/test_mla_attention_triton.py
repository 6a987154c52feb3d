"""mla_attention's Triton kernels in the interpreter, and what they compile to."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kexue_kernels.mla import triton_mla_attention as launcher
from kexue_kernels.mla.triton_mla_attention import Config, configure, near, widths
from kexue_kernels.mla.triton_mla_attention_cases import compile_cases
from kexue_kernels.offline import pool
from kexue_kernels.offline import triton as offline
from kexue_kernels.offline.archs import ARCHS
from tests.mla.attention_cases import NAMES, Case, check, make, packed, plain, scale_of

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Case(1, 37, 1)

# ---- values and gradients


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        replace(SMALL, dtype=BF16, strided=True, scale=-0.2),
        replace(SMALL, dtype=FP16, causal=False, dk=16, dr=0, dv=16),
        Case(2, 20, 1, 1, 1, 1, 7, causal=False),
        packed(9, 0, 1, 23, 0, H=2, dk=5, dr=3, dv=4, dc=6),
        packed(0, 20, 17, H=1, causal=False, dtype=BF16),
    ],
    ids=str,
)
def test_every_case(case: Case) -> None:
    check(case, "triton")


@pytest.mark.parametrize(
    ("config", "case"),
    [
        (Config(16, 32, 1, 1), SMALL),
        (Config(16, 32, 1, 1), replace(SMALL, causal=False, lengths=(37,))),
        (Config(128, 64, 1, 1), Case(2, 70, 1)),
    ],
    ids=str,
)
def test_other_tiles(config: Config, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider than high, and as a GPU is given them, partly outside the tensors."""
    monkeypatch.setattr(launcher, "configure_interpreted", lambda *_: config)
    check(case, "triton")


def test_heads_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last group is smaller."""
    case = Case(1, 20, 3, dtype=BF16)
    monkeypatch.setattr(launcher, "heads_per_group", lambda *_: 2)
    check(case, "triton")


def test_a_scale_of_zero_takes_means() -> None:
    case = replace(SMALL, scale=0.0)
    inputs = make(case)
    out, lse = forward(case, inputs)
    torch.testing.assert_close(out, plain(case, inputs)["out"])
    seen = torch.arange(1.0, case.T + 1).log()
    torch.testing.assert_close(lse, seen.expand(1, case.H, -1))


def test_gradients_on_their_own() -> None:
    inputs = make(SMALL)
    out, lse = forward(SMALL, inputs)
    every = backward(SMALL, inputs, out, lse, (True,) * 6)
    for place in range(6):
        wanted = tuple(place == each for each in range(6))
        found = backward(SMALL, inputs, out, lse, wanted)
        assert tuple(x is not None for x in found) == wanted
        assert torch.equal(found[place], every[place])  # type: ignore[arg-type]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "bounds", [[3, 10, 20], [0, 50, -7, 20], [20, 0, 15], [0], [-(2**31), 2**31 - 1]], ids=str
)
def test_wrong_boundaries_touch_nothing_outside(bounds: list[int]) -> None:
    """Which a GPU's copy is not read back to find. What no sequence covers stays 0."""
    case = Case(1, 20, 1)
    inputs = make(case)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    out, lse = forward(case, inputs, cu_seqlens)
    grads = backward(case, inputs, out, lse, (True,) * 6, cu_seqlens)
    assert all(x is not None and x.isfinite().all() for x in (out, lse, *grads))
    if bounds[0] == 3:
        assert not out[:, :3].any()
        assert not any(x is None or x[:, :3].any() for x in grads[:4])


Options = Tensor | None


def forward(case: Case, inputs: dict[str, Tensor], bounds: Options = None) -> tuple[Tensor, Tensor]:
    data = [inputs[name] for name in NAMES]
    return launcher.forward(*data, scale_of(case), case.causal, bounds)  # type: ignore[call-arg]


def backward(
    case: Case,
    inputs: dict[str, Tensor],
    out: Tensor,
    lse: Tensor,
    wanted: tuple[bool, ...],
    bounds: Options = None,
) -> tuple[Tensor | None, ...]:
    data = [inputs[name] for name in NAMES]
    return launcher.backward(
        inputs["grad"], *data, out, lse, scale_of(case), case.causal, bounds, wanted
    )  # type: ignore[call-arg]


# ---- the launcher's rules


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("lengths", [(5,), (0, 16, 1, 0, 15, 32), (3, 0, 0, 3), (16, 16)], ids=str)
def test_every_tile_of_a_sequence_has_a_program(lengths: tuple[int, ...], block: int) -> None:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    sequences = launcher.sequence_of_programs(bounds, sum(lengths), block).tolist()
    for s, length in enumerate(lengths):
        first = int(bounds[s]) // block + s
        own = [program for program, sequence in enumerate(sequences) if sequence == s]
        assert own == list(range(first, first + len(own)))
        assert -(-length // block) <= len(own) <= length // block + 2


def test_copies_only_what_reaches_far() -> None:
    x = torch.empty(1, device="meta").as_strided((1, 500, 2, 64), (0, 2**23, 64, 1))
    assert near(x) is x
    assert near(x.as_strided((1, 500, 2, 64), (0, 2**24, 64, 1))).is_contiguous()
    assert near(x.as_strided((1, 500, 2, 64), (0, 64, 1, 2**25))).is_contiguous()


def test_tiles_are_padded_to_powers_of_two() -> None:
    assert widths(128, 64, 128) == (128, 64, 128)
    assert widths(40, 0, 1) == (64, 0, 16)
    assert configure("forward", widths(100, 64, 100), BF16, "sm_90").BLOCK_M == 128
    assert configure("forward", widths(200, 64, 100), BF16, "sm_90").BLOCK_M == 32
    assert configure("keys", widths(100, 64, 100), torch.float32, "sm_90").BLOCK_N == 32


# ---- as compiled


def test_every_configuration_has_its_case() -> None:
    names = {case.name: case for case in compile_cases()}
    assert len(names) == len(compile_cases())
    for target, arch in (("sm_80", "sm_80"), ("sm_90", "sm_90"), ("sm_100", "sm_100")):
        for kernel in ("forward", "keys", "queries"):
            for dtype in (BF16, torch.float32):
                config = configure(kernel, widths(128, 64, 128), dtype, target)  # type: ignore[arg-type]
                kind = str(dtype).removeprefix("torch.")
                tile = "x".join(map(str, config))
                assert arch in names[f"{kernel} 128+64/128 {kind} {tile}"].archs


def test_warp_groups_multiply_without_waiting_for_each_product() -> None:
    names = [c.name for c in compile_cases() if "bfloat16" in c.name and "sm_90" in c.archs]
    assert len(names) == 3
    jobs: list[Any] = [(opcodes, (name,)) for name in names]
    for name, found in zip(names, pool.run(jobs), strict=True):
        counted = dict(found)  # type: ignore[call-overload]
        assert [code for code in counted if code.endswith("MMA")] == ["HGMMA"], name
        assert counted["WARPGROUP"] < counted["HGMMA"], name  # where ptxas serialises, above it


def opcodes(name: str) -> list[tuple[str, int]]:
    """How many of each, of a case on sm_90. For a process where Triton does not interpret."""
    (case,) = (case for case in compile_cases() if case.name == name)
    code = offline._read_nvidia(offline._compile(case, ARCHS["sm_90"])).code
    heads = [instruction.opcode.split(".")[0] for instruction in code]
    return [(head, heads.count(head)) for head in sorted(set(heads))]
