"""mla_decode's Hopper kernel without a Hopper GPU: its source run on the CPU, what nvcc makes of
it, and who gets it."""

import contextlib
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import kexue_kernels as kk
from kexue_kernels import _extension, dispatch, launchers
from kexue_kernels.cli import app
from kexue_kernels.mla import cuda_mla_decode
from kexue_kernels.offline import cubins, sass, tools
from tests import emulation
from tests.mla.cases import Case, check, make, run

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulation")
    return emulation.build(folder, "mla_module.cpp", "kexue_mla_emulated")


@contextlib.contextmanager
def no_stream(_: torch.device) -> Iterator[int]:
    yield 0


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> ModuleType:
    """backend="cuda" serves CPU tensors, by the emulated extension on a Hopper GPU of 4 SMs."""
    monkeypatch.setattr(_extension, "load", lambda: _extension.Extension(module, "", True))
    monkeypatch.setattr(cuda_mla_decode, "_stream", no_stream)
    monkeypatch.setattr(cuda_mla_decode, "_processors", lambda _: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(dispatch._STATUS, "cuda", lambda: dispatch.BackendStatus(True, ""))
    monkeypatch.setattr(dispatch, "_served_devices", lambda _: ("cpu",))
    launchers.launcher.cache_clear()
    return module


def case(*lengths: int, H: int = 64, dtype: torch.dtype = BF16, **more: object) -> Case:
    options = {"dc": 512, "dr": 64, "block_size": 64, "num_splits": 1} | more
    return Case(lengths, H=H, dtype=dtype, **options)  # type: ignore[arg-type]


CASES = [
    case(100, 0, 64),
    case(330, dtype=F16),  # the stages go round twice
    case(130, 2, 65, H=17, Tq=4, dtype=F16),  # 2: two queries see no key
    case(70, H=40, Tq=2, causal=False),
    case(150, block_size=20, num_splits=2),
    case(66, 3, block_size=1, dtype=F16),
    case(200, block_size=128, num_splits=None),
    case(130, 1, num_splits=7),  # more splits than blocks
    case(70, strided=True),
    case(90, 80, shared=True),
]


@pytest.mark.usefixtures("emulated", "poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernel(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.usefixtures("poisoned")
def test_results_do_not_depend_on_who_is_faster(emulated: ModuleType) -> None:
    inputs = make(several := case(200, 70, num_splits=2))
    found = []
    for seed in (1, 2, 3):
        emulated.schedule(seed)
        found.append(run(several, inputs, "cuda"))
    emulated.schedule(0)
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


@pytest.mark.usefixtures("emulated")
def test_wrong_lengths_and_ids_read_nothing_outside() -> None:
    inputs = make(case(40, 17))  # the emulated copy engine aborts outside the cache
    pages = inputs.kv_cache.nan_to_num()
    lengths = torch.tensor([10**9, -5], dtype=torch.int32)
    for id in (2**30, -(2**30)):
        table = torch.full_like(inputs.block_table, id)
        out, lse = cuda_mla_decode.forward(inputs.q, pages, table, lengths, 512, 0.04, True, 1)
        assert out.isfinite().all()
        assert torch.equal(lse[1], torch.full((64, 1), -torch.inf))
        assert torch.equal(out[1], torch.zeros(1, 64, 512, dtype=BF16))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("scale", [0.0, -0.05])
def test_any_scale(scale: float) -> None:
    inputs = make(case(70))
    given = inputs.kv_cache, inputs.block_table, inputs.cache_seqlens
    options = {"head_dim_v": 512, "softmax_scale": scale}
    found, own = (
        kk.mla_decode(inputs.q, *given, backend=backend, **options)
        for backend in ("cuda", "reference")
    )
    torch.testing.assert_close(found, own, atol=2e-2, rtol=2e-2)


# ---- who gets it


def refusal(q: Tensor, pages: Tensor, head_dim_v: int = 512) -> str:
    return "; ".join(cuda_mla_decode.reasons(q, pages, head_dim_v))


@pytest.mark.usefixtures("emulated")
def test_reasons_against_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(case(70, H=32, Tq=2))
    q, pages = inputs.q, inputs.kv_cache
    assert refusal(q, pages) == ""
    assert "bfloat16 and float16, got torch.float32" in refusal(q.float(), pages.float())
    assert "dc + dr = 576 and head_dim_v = 512, got 576 and 500" in refusal(q, pages, 500)
    assert "got 560 and 512" in refusal(q[..., :560], pages[..., :560])
    assert "64 and more queries" in refusal(q[:, :1], pages)
    wide = torch.zeros(3, 64, 580, dtype=BF16)
    assert "aligned to 16 bytes, got strides [37120, 580, 1]" in refusal(q, wide[..., :576])
    assert "address 2 bytes off" in refusal(q, torch.zeros(3, 64, 584, dtype=BF16)[..., 1:577])
    assert "rows are contiguous" in refusal(q, torch.zeros(3, 576, 64, dtype=BF16).mT)
    one_page = torch.zeros(5, 580 * 64, dtype=BF16)[:1, : 576 * 64].unflatten(1, (64, 576))
    assert refusal(q, one_page) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert "needs compute capability (9, 0), this GPU has (10, 0)" in refusal(q, pages)


def test_an_extension_without_sm_90a(monkeypatch: pytest.MonkeyPatch, emulated: ModuleType) -> None:
    inputs = make(case(70))
    monkeypatch.setattr(emulated, "build_info", {"archs": "sm_90 compute_90"})
    with pytest.raises(kk.BackendUnavailableError, match="built without sm_90a"):
        run(case(70), inputs, "cuda")


@pytest.mark.usefixtures("emulated")
def test_queries_that_are_not_aligned_are_copied() -> None:
    inputs = make(whole := case(70))
    apart = torch.zeros(1, 1, 64, 577, dtype=BF16)[..., 1:]
    apart.copy_(inputs.q)
    found = run(whole, inputs.with_data(apart, inputs.kv_cache), "cuda")
    assert all(torch.equal(x, found[name]) for name, x in run(whole, inputs, "cuda").items())


@pytest.mark.usefixtures("emulated")
def test_auto_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("cuda",))
    device = torch.device("cpu")
    assert launchers.launcher("mla", "mla_decode", "cuda", device, BF16) is cuda_mla_decode
    chosen = launchers.launcher("mla", "mla_decode", "auto", device, BF16)
    assert chosen is not cuda_mla_decode
    monkeypatch.setattr(launchers, "OFF_BY_DEFAULT", frozenset())
    launchers.launcher.cache_clear()
    assert launchers.launcher("mla", "mla_decode", "auto", device, BF16) is cuda_mla_decode


def test_info_says_that_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    lines = CliRunner().invoke(app, ["info"]).stdout.splitlines()
    found = [line for line in lines if "mla_decode " in line and "cuda" in line]
    assert len(found) == 1
    assert "off by default" in found[0]


# ---- the arithmetic beneath


def swizzled(address: int) -> int:
    return address ^ (address >> 7 & 7) << 4


def test_tiles_are_swizzled_and_complete(module: ModuleType) -> None:
    offsets = {(r, c): module.tile_offset(r, c) for r in range(64) for c in range(64)}
    assert sorted(offsets.values()) == list(range(0, 64 * 128, 2))
    for (r, c), offset in offsets.items():
        unit = c // 8 ^ r % 8  # the programming guide's smem[y][y % 8 ^ x]
        assert offset == r * 128 + unit * 16 + c % 8 * 2


def fields(descriptor: int) -> tuple[int, int, int]:
    """Start, leading and stride, in bytes."""
    assert descriptor >> 62 == 1  # 128-byte swizzle
    assert (descriptor >> 46 & 0xFFFF) == 0
    return tuple((descriptor >> shift & 0x3FFF) * 16 for shift in (0, 16, 32))  # type: ignore[return-value]


def test_descriptors_find_each_element(module: ModuleType) -> None:
    tiles = 5 * 8192  # an address
    for step in range(4):
        start, _, stride = fields(module.across_channels(tiles, step))
        for row in range(64):
            for k in range(16):  # ((8, m), (T, 2)) : ((8T, SBO), (1, T)) of 16-bit elements
                found = swizzled(start + row % 8 * 128 + row // 8 * stride + k * 2)
                assert found == tiles + module.tile_offset(row, step * 16 + k)
        start, leading, stride = fields(module.across_rows(tiles, step))
        for column in range(256):
            for k in range(16):  # ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO))
                at = column % 64 * 2 + column // 64 * leading + k % 8 * 128 + k // 8 * stride
                tile = tiles + column // 64 * 8192
                assert swizzled(start + at) == tile + module.tile_offset(step * 16 + k, column % 64)


def test_fragments_are_each_element_once(module: ModuleType) -> None:
    places = [module.fragment(thread, i) for thread in range(128) for i in range(32)]
    assert sorted(places) == [(row, column) for row in range(64) for column in range(64)]


def test_pieces_lie_in_one_page(module: ModuleType) -> None:
    for block_size in (1, 3, 8, 20, 48, 64, 96, 128, 1000):
        assert module.piece_rows(block_size) == math.gcd(64, block_size)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_share_the_keys(module: ModuleType, splits: int) -> None:
    Tq, H, block_size, max_blocks = 3, 30, 16, 20  # 90 queries: two tiles
    lengths = [0, 1, 64, 65, 319, 320, 10**9, -3]
    sizes = (len(lengths), Tq, H, 9, block_size, max_blocks, splits)
    works = [module.work(sizes, i, lengths) for i in range(len(lengths) * splits * 2)]
    for b, length in enumerate(min(max(n, 0), 320) for n in lengths):
        for query in (0, 64):
            own = [w for w in works if (w[0], w[2]) == (b, query)]
            assert [w[1] for w in own] == list(range(splits))
            assert [key for w in own for key in range(w[4], w[5])] == list(range(length))
            assert all(w[4] % 64 == 0 or w[4] == w[5] for w in own)
            assert all(w[3] == length for w in own)
            for w in own:
                for m in range(query, min(query + 64, Tq * H)):
                    last = length - Tq + m // H  # as API.md has it: keys j <= last
                    seen = [j for j in range(w[4], w[5]) if j <= last]
                    end = module.visible_end(sizes, True, w, m)
                    assert list(range(w[4], end)) == seen
                    assert module.visible_end(sizes, False, w, m) == w[5]


def test_places_are_clamped(module: ModuleType) -> None:
    sizes = (2, 1, 64, 9, 16, 3, 1)
    table = [4, 2, 8, 9, -1, 2**31 - 1]
    assert module.place(sizes, table, 0, 40) == (8, 8)
    assert [module.place(sizes, table, 1, key) for key in (0, 17, 47)] == [(8, 0), (0, 1), (8, 15)]


# ---- what nvcc makes of it

ARCHS = ("sm_80", "sm_90", "sm_100")


def nvcc() -> str | None:
    folders = sorted(Path("/usr/local").glob("cuda*/bin"))
    return shutil.which("nvcc") or next(
        (found for folder in folders if (found := shutil.which("nvcc", path=folder))), None
    )


def compile_cubin(folder: Path, arch: str) -> tuple[str, Path]:
    source = emulation.ROOT / "csrc/mla/mla_decode_cuda.cu"
    cubin = folder / f"{arch}.cubin"
    number = arch.removeprefix("sm_") + "a" * (arch == "sm_90")
    flags = ["-std=c++20", "-O3", f"-I{emulation.ROOT / 'csrc'}"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}", "-cubin"]
    subprocess.run([nvcc(), *flags, source, "-o", cubin], check=True)
    return arch, cubin


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The extension's cubins by architecture, or where it has none, some made here."""
    folder = tmp_path_factory.mktemp("cubins")
    found, why = cubins.extract(folder, list(ARCHS))
    found = [(arch, path) for arch, path in found if b"mla_decode_hopper" in path.read_bytes()]
    if not found:
        if nvcc() is None:
            pytest.skip(f"{why or 'the extension is older than the kernel'}; no nvcc")
        found = [compile_cubin(folder, arch) for arch in ARCHS]
    return {arch: [path for name, path in found if name == arch] for arch in ARCHS}


def opcodes(paths: list[Path]) -> dict[str, list[str]]:
    """Those of each mla_decode kernel."""
    texts = [tools.run("nvdisasm", "-c", path) for path in paths]
    kernels = [item for text in texts for item in sass.functions(text).items()]
    return {name: [i.opcode for i in code] for name, code in kernels if "mla_decode" in name}


def test_nothing_spills(machine_code: dict[str, list[Path]]) -> None:
    for arch, paths in machine_code.items():
        cards = [card for path in paths for card in cubins.cards(arch, path)]
        cards = [card for card in cards if "mla_decode" in card.kernel]
        assert len(cards) == (4 if paths else 0)  # two dtypes: decode and join
        for card in cards:
            assert (card.family, card.op) == ("mla", "mla_decode")
            assert (card.spills, card.stack) == (0, 0), (arch, card.kernel)
            assert card.problems == []


def test_hopper_multiplies_and_copies_as_meant(machine_code: dict[str, list[Path]]) -> None:
    if not machine_code["sm_90"]:
        pytest.skip("the extension has no code for sm_90")
    kernels = opcodes(machine_code["sm_90"])
    hopper = [code for name, code in kernels.items() if "hopper" in name]
    assert len(hopper) == 2
    for code in hopper:
        count = {
            start: sum(op.startswith(start) for op in code)
            for start in ("HGMMA.64x64x16", "HGMMA.64x256x16", "UTMALDG.3D", "USETMAXREG")
        }
        assert count["HGMMA.64x64x16"] == 9 * 4  # tiles x steps
        assert count["HGMMA.64x256x16"] == 4 + 4  # of the weigher and of the follower
        assert count["UTMALDG.3D"] >= 1
        assert count["USETMAXREG"] == 2
        # one wait for each group of products: the compiler has made none wait for another
        assert sum(op.startswith("WARPGROUP.DEPBAR") for op in code) == 3


def test_shared_memory_fits(module: ModuleType) -> None:
    assert module.SHARED_BYTES <= 227 * 1024


def test_other_architectures_have_no_part_in_it(machine_code: dict[str, list[Path]]) -> None:
    for arch in ("sm_80", "sm_100"):
        for name, code in opcodes(machine_code[arch]).items():
            if "hopper" in name:
                assert len(code) < 64, (arch, name)
