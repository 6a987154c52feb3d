"""Rows of bytes, latents in float8_e4m3fn: written, read, and how near they come."""

import struct
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.mla import fp8, operators
from kexue_kernels.mla.triton_fp8 import decode_e4m3, encode_e4m3
from tests.mla.cases import Case, Inputs, error, make, run

HALF_STEP = 2.0**-4  # of a number with 3 bits of fraction
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [
    Case(dc=128, dr=16),
    Case((5, 20, 2, 0), Tq=4, H=3, dc=256, dr=8, block_size=5, num_splits=2),
    Case((20, 3), H=5, dc=384, dr=0, causal=False),
    Case((9, 12), dc=128, dr=6, block_size=1, shared=True),
]
CASES = [replace(case, dtype=torch.bfloat16) for case in CASES]


def in_bytes(inputs: Inputs, dc: int) -> tuple[Inputs, Inputs]:
    """The same cache as bytes, and as the bfloat16 that they stand for."""
    rows = fp8.pack(inputs.kv_cache[..., :dc], inputs.kv_cache[..., dc:])
    return inputs.with_data(inputs.q, rows), inputs.with_data(inputs.q, fp8.unpack(rows, dc))


@triton.jit
def convert(words, numbers, x, codes):
    i = tl.arange(0, 256)
    found = decode_e4m3(tl.load(words + tl.arange(0, 64)), (256,))
    tl.store(numbers + i, found * 256)
    tl.store(codes + i, encode_e4m3(tl.load(x + i)))


@pytest.mark.parametrize("device", DEVICES)
def test_codes_are_pytorch_s(device: str) -> None:
    """All of them; and those of numbers near them, between them and of any size."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    g = torch.Generator().manual_seed(0)
    between = (numbers + numbers.roll(-1)) / 2
    batches = [numbers, between, *(between.nextafter(torch.tensor(x)) for x in (-500.0, 500.0))]
    batches += [torch.randn(256, generator=g) * 10.0**power for power in (-4, -2, 0, 2)]
    found, made = torch.empty(256, device=device), codes.to(device, copy=True)
    for x in batches:
        x = x.clamp(-448, 448)
        convert[(1,)](codes.view(torch.int32).to(device), found, x.to(device), made)
        expected = x.to(torch.float8_e4m3fn)
        known = ~x.isnan()
        assert torch.equal(made.cpu()[known], expected.view(torch.uint8)[known])
        assert made.cpu().view(torch.float8_e4m3fn)[~known].float().isnan().all()
    torch.testing.assert_close(found.cpu(), numbers, rtol=0, atol=0, equal_nan=True)


def test_a_row_byte_by_byte() -> None:
    latent = torch.zeros(256)
    latent[0], latent[1], latent[130] = 448.0, -1.0, 0.875
    key = torch.tensor([1.0, -2.0])
    row = bytes(fp8.pack(latent, key).tolist())
    assert len(row) == fp8.row_bytes(256, 2) == 256 + 2 * 4 + 2 * 2
    assert (row[0], row[1], row[130]) == (0x7E, 0xB8, 0x7E)
    assert struct.unpack("<2f", row[256:264]) == (1.0, 0.875 / 448)
    assert row[264:] == bytes([0x80, 0x3F, 0x00, 0xC0])
    assert fp8.row_bytes(512, 64) == 656


def allowed(latent: Tensor) -> Tensor:
    """Half a step of a code, and of the bfloat16 that it is read as; latent [..., 128]."""
    scales = (latent.abs().amax(-1, keepdim=True) / 448).clamp_min(fp8.SMALLEST)
    half_step = torch.maximum(HALF_STEP * latent.abs(), 2.0**-10 * scales)
    return half_step + 2.0**-8 * (latent.abs() + half_step)


def test_every_latent_is_within_half_a_step() -> None:
    """Half a step of its own, or of the smallest codes where it is small beside its tile."""
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(50, 4, 128, generator=g) * torch.logspace(-30, 4, 50)[:, None, None]
    latent[:, 1] *= torch.logspace(-6, 0, 128)
    latent[7, 2], latent[8, 3, 1:] = 0.0, 0.0
    found = fp8.unpack(fp8.pack(latent.flatten(1), torch.zeros(50, 0)), 512).unflatten(1, (4, 128))
    assert ((found.float() - latent).abs() <= allowed(latent)).all()
    assert torch.equal(found[7, 2], torch.zeros(128).bfloat16())


def appended(T: int = 9, dc: int = 256, dr: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    angles = torch.rand(T, dr // 2, generator=g) * 6
    slots = torch.randperm(20, generator=g)[:T]
    slots[2] = -1
    return {
        "kv_latent": (
            torch.randn(T, dc, generator=g) * torch.logspace(-8, 8, T)[:, None]
        ).bfloat16(),
        "k_rope": torch.randn(T, dr, generator=g).bfloat16(),
        "kv_cache": torch.full((5, 4, fp8.row_bytes(dc, dr)), 7, dtype=torch.uint8),
        "slot_mapping": slots,
        "norm_weight": torch.randn(dc, generator=g),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_append_writes_the_packed_rows(backend: str) -> None:
    given = {k: v for k, v in appended().items() if k not in ("norm_weight", "cos", "sin")}
    latent = given["kv_latent"]
    latent[0, :128], latent[1, 3], latent[3, 5], latent[4, 200] = 0.0, -0.0, torch.nan, torch.inf
    expected = given["kv_cache"].clone().flatten(0, 1)
    kept = given["slot_mapping"] >= 0
    expected[given["slot_mapping"][kept]] = fp8.pack(latent, given["k_rope"])[kept]
    for cache in (given["kv_cache"].clone(), given["kv_cache"].clone().view(torch.float8_e4m3fn)):
        kk.mla_cache_append(**{**given, "kv_cache": cache.unsqueeze(2)}, backend=backend)
        found = cache.view(torch.uint8).flatten(0, 1)
        assert torch.equal(found[:, 256:], expected[:, 256:]) or lacking(found, expected)
        values, true = (fp8.unpack(x, 256) for x in (found, expected))
        torch.testing.assert_close(values, true, rtol=0, atol=0, equal_nan=True)
    assert values[given["slot_mapping"][3], :128].isnan().all()
    assert values[given["slot_mapping"][3], 128:256].isfinite().all()


def lacking(found: Tensor, expected: Tensor) -> bool:
    """Whether scales differ in nothing but the bits of NaN."""
    scales = (x[:, 256:264].contiguous().view(torch.float32) for x in (found, expected))
    return torch.allclose(*scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_append_normalises_and_turns_before(backend: str, interleaved: bool) -> None:
    """As into a float32 cache, within a code's half step; keys within bfloat16's."""
    given = appended()
    single = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in given.items()}
    single["kv_cache"] = torch.zeros(5, 4, 262)
    for each, by in ((given, backend), (single, "reference")):
        kk.mla_cache_append(**each, rope_interleaved=interleaved, backend=by)
    slots = given["slot_mapping"][given["slot_mapping"] >= 0]
    found = fp8.unpack(given["kv_cache"], 256).flatten(0, 1)[slots].float()
    true = single["kv_cache"].flatten(0, 1)[slots]
    tiles, near = (x[:, :256].unflatten(1, (2, 128)) for x in (true, found))
    assert ((near - tiles).abs() <= allowed(tiles) * (1 + 1e-5)).all()
    torch.testing.assert_close(found[:, 256:], true[:, 256:], rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("without_extension")
def test_decode_reads_what_the_bytes_stand_for(case: Case, backend: str) -> None:
    """Bitwise as from that bfloat16 cache, whatever lies beyond the ends."""
    packed, numbers = in_bytes(make(case), case.dc)
    found, expected = (run(case, x, backend) for x in (packed, numbers))
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert found["out"].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bytes_may_be_called_float8(backend: str) -> None:
    packed, _ = in_bytes(make(CASES[0]), 128)
    viewed = packed.kv_cache.view(torch.float8_e4m3fn).unsqueeze(2)
    found = run(CASES[0], packed.with_data(packed.q, viewed), backend)
    assert torch.equal(found["out"], run(CASES[0], packed, backend)["out"])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_any_scales_and_rows_further_apart(backend: str) -> None:
    """Bytes that others wrote: scales of any size, pages with something between."""
    case = replace(CASES[0], lengths=(7, 16), causal=False)
    inputs = make(case)
    g = torch.Generator().manual_seed(3)
    blocks, row = inputs.kv_cache.shape[0], fp8.row_bytes(case.dc, case.dr)
    spread = torch.randint(0, 256, (blocks, case.block_size + 1, row + 12), generator=g)
    pages = spread.to(torch.uint8)[:, : case.block_size, 8 : 8 + row]
    pages[..., : case.dc].masked_fill_(pages[..., : case.dc] % 128 == 127, 1)  # NaN
    scales = torch.logspace(-40, -4, pages[..., 0].numel(), 2.0).view(*pages.shape[:2], 1)
    pages[..., case.dc : case.dc + 4] = scales.view(torch.uint8)
    pages[..., case.dc + 4 :] = inputs.kv_cache.new_ones(16).view(torch.uint8)
    found = run(case, inputs.with_data(inputs.q, pages), backend)
    double = inputs.with_data(inputs.q.double(), fp8.unpack(pages, case.dc).double())
    exact = run(case, double, "reference")
    scale = exact["out"].abs().max().item()
    assert error(found["out"], exact["out"]) <= 2.0**-7 * scale
    torch.testing.assert_close(found["lse"].double(), exact["lse"], rtol=1e-4, atol=1e-4)


def test_accuracy_against_a_bfloat16_cache() -> None:
    """A number with 3 bits of fraction is rounded by up to 1/16 of itself, evenly: in the mean
    square by at most 1/16 sqrt(1/3). Values and scores each bring that share into the result."""
    case = Case((700, 2000, 90), H=16, dc=512, dr=64, block_size=64, dtype=torch.bfloat16)
    inputs = make(case)
    packed, numbers = in_bytes(inputs, case.dc)
    found, exact = run(case, packed, "cpu"), run(case, inputs, "cpu")
    mean = HALF_STEP / 3**0.5
    latents = (x.kv_cache[..., : case.dc].nan_to_num() for x in (numbers, inputs))
    assert relative(*latents) <= mean  # 0.0258 of 0.0361
    assert relative(found["out"], exact["out"]) <= mean * 2**0.5  # 0.0317 of 0.0510
    assert (found["lse"] - exact["lse"]).square().mean().sqrt() <= mean  # scores are about 1


def relative(x: Tensor, true: Tensor) -> float:
    return ((x - true).float().norm() / true.float().norm()).item()


def test_flash_mla_takes_656_bytes() -> None:
    case = Case((5, 0, 20), dc=512, dr=64, dtype=torch.bfloat16)
    packed, numbers = in_bytes(make(case), 512)
    found, expected = (
        call(
            x.q, x.kv_cache.unsqueeze(2), x.block_table, x.cache_seqlens, 512,
            is_fp8_kvcache=x is packed,
        )
        for x in (packed, numbers)
        for call in (kk.reference.flash_mla_with_kvcache,)
    )  # fmt: skip
    assert packed.kv_cache.shape[-1] == 656
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    mine = kk.flash_mla_with_kvcache(
        packed.q, packed.kv_cache.unsqueeze(2), packed.block_table, packed.cache_seqlens, 512
    )
    torch.testing.assert_close(mine, expected, rtol=2.0**-7, atol=1e-3)
    assert mine[1][1].eq(torch.inf).all()


def test_only_launchers_that_say_so_see_bytes() -> None:
    packed, _ = in_bytes(make(CASES[0]), 128)
    launcher = operators._launcher("mla_decode", "cpu", packed.q, packed.kv_cache)
    assert launcher.__name__ == "kexue_kernels.mla.blocked_mla_decode_fp8"
    with pytest.raises(kk.BackendUnavailableError, match="mla_decode_fp8 has no cuda"):
        run(CASES[0], packed, "cuda")


def test_opcheck() -> None:
    packed, _ = in_bytes(make(replace(CASES[0], lengths=(5, 9))), 128)
    tables = packed.block_table, packed.cache_seqlens
    args = (packed.q, packed.kv_cache, *tables, 128, 0.3, True, None, "cpu")
    torch.library.opcheck(torch.ops.kexue_kernels.mla_decode.default, args)
    given = appended()
    data = (given[name] for name in ("kv_latent", "k_rope", "kv_cache", "slot_mapping"))
    append_args = (*data, given["norm_weight"], 1e-6, given["cos"], given["sin"], True, "cpu")
    torch.library.opcheck(torch.ops.kexue_kernels.mla_cache_append.default, append_args)


def test_compiles_whole() -> None:
    case = replace(CASES[0], lengths=(5, 9))
    inputs, _ = in_bytes(make(case), 128)

    def step(q: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        kk.mla_cache_append(q[:, 0, 0, :128], q[:, 0, 0, 128:], cache, slots)
        out = kk.mla_decode(
            q, cache, inputs.block_table, inputs.cache_seqlens, head_dim_v=128, softmax_scale=0.3
        )
        return out + 1

    slots = inputs.block_table[[0, 1], [0, 1]].long() * 8 + torch.tensor([4, 0])
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    mine, theirs = (inputs.kv_cache.clone().view(torch.float8_e4m3fn) for _ in "ab")
    assert torch.equal(compiled(inputs.q, mine, slots), step(inputs.q, theirs, slots))
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    assert not torch.equal(mine.view(torch.uint8), inputs.kv_cache)


def test_autocast_takes_q_in_bfloat16() -> None:
    packed, _ = in_bytes(make(CASES[0]), 128)
    with torch.autocast("cpu", torch.float16):
        found = run(CASES[0], packed.with_data(packed.q.float(), packed.kv_cache), "auto")
    assert torch.equal(found["out"], run(CASES[0], packed, "auto")["out"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, Case(
    (4097, 0, 8192, 64), Tq=2, H=40, dc=512, dr=64, block_size=64, dtype=torch.bfloat16
)], ids=str)  # fmt: skip
def test_decode_on_a_gpu(case: Case) -> None:
    """Error against float64 at most twice that of PyTorch in bfloat16, plus rounding."""
    packed, numbers = in_bytes(make(case), case.dc)
    double = numbers.with_data(numbers.q.double(), numbers.kv_cache.double())
    exact, own = (run(case, x, "reference") for x in (double, numbers))
    moved = Inputs(
        packed.q.cuda(), packed.kv_cache.cuda(), packed.block_table.cuda(),
        packed.cache_seqlens.cuda(),
    )  # fmt: skip
    for name, x in run(case, moved, "triton").items():
        none = exact[name] == -torch.inf
        assert torch.equal(x.cpu() == -torch.inf, none)
        found, mine, true = (
            t.cpu().double().masked_fill(none, 0) for t in (x, own[name], exact[name])
        )
        rounding = 4 * torch.finfo(x.dtype).eps * true.abs().max().item()
        assert error(found, true) <= 2 * error(mine, true) + rounding


@pytest.mark.gpu
def test_append_on_a_gpu() -> None:
    given = appended()
    moved = {name: x.cuda() for name, x in given.items()}
    for each in (given, moved):
        for name in ("norm_weight", "cos", "sin"):
            del each[name]
        kk.mla_cache_append(**each)
    assert torch.equal(moved["kv_cache"].cpu(), given["kv_cache"])
