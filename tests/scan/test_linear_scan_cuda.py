"""linear_scan's CUDA C++ kernels: their sources run on the CPU, and what nvcc makes of them."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels import _extension, dispatch, launchers
from kexue_kernels.offline import cubins, sass, tools
from kexue_kernels.scan import blocked_linear_scan, cuda_linear_scan
from tests import emulation
from tests.scan.cases import ALL, Case, check, make, packed, run


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    return emulation.build(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def schedule(emulated_module: ModuleType) -> Iterator[Callable[[int, int], None]]:
    """Takes how many blocks are under way at once and a seed of which are how fast."""
    yield emulated_module.schedule
    emulated_module.schedule(3, 0)


@contextlib.contextmanager
def no_stream(_: torch.device) -> Iterator[int]:
    yield 0


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, emulated_module: ModuleType) -> ModuleType:
    """backend="cuda" serves CPU tensors, by the emulated extension."""
    extension = _extension.Extension(emulated_module, "", True)
    monkeypatch.setattr(_extension, "load", lambda: extension)
    monkeypatch.setattr(cuda_linear_scan, "_stream", no_stream)
    monkeypatch.setitem(dispatch._STATUS, "cuda", lambda: dispatch.BackendStatus(True, ""))
    monkeypatch.setattr(dispatch, "_served_devices", lambda _: ("cpu",))
    launchers.launcher.cache_clear()
    return emulated_module


@pytest.fixture
def warps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Small tiles, so that short sequences are long chains."""
    monkeypatch.setattr(cuda_linear_scan, "choose_warps", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("case", ALL, ids=str)
def test_one_tile(case: Case, emulated: ModuleType, poisoned: None) -> None:
    check(case, "cuda")


# By vectors (D a multiple of a Pack's channels) and by elements; one and two tiles of channels.
CHAINED = [
    Case(B=2, L=290, D=36),
    Case(B=1, L=150, D=5, a="invariant", reverse=True),
    Case(B=2, L=150, D=72, dtype=torch.bfloat16, reverse=True),
    Case(B=1, L=200, D=3, dtype=torch.bfloat16, a="channel"),
    Case(B=1, L=150, D=8, dtype=torch.float16, a="step"),
    Case(B=2, L=100, D=18, dtype=torch.complex64),
    Case(B=1, L=150, D=6, dtype=torch.complex64, a="batch", reverse=True, initial=None),
    Case(B=2, L=100, D=8, strided=True),
    packed((70, 0, 1, 133, 32, 0), D=8),
    packed((0, 65, 100, 3), D=40, a="channel", reverse=True),
    packed((40, 41, 0, 90), D=2, dtype=torch.complex64, initial=None),
    packed((1,) * 34 + (40,), D=8, dtype=torch.bfloat16, a="invariant"),
]


@pytest.mark.parametrize("case", CHAINED, ids=str)
@pytest.mark.parametrize("warps", [1, 3], indirect=True)
def test_many_tiles(case: Case, warps: int, emulated: ModuleType, poisoned: None) -> None:
    check(case, "cuda")


@pytest.mark.parametrize(
    ("case", "warps", "spans"),
    [
        (Case(B=1, L=19200, D=4, dtype=torch.complex64), 2, 1),
        (packed((40, 0, 2700, 16460), D=2, dtype=torch.complex64, reverse=True), 2, 1),
        (Case(B=1, L=10240, D=8), 8, 0),
    ],
    ids=str,
    indirect=["warps"],
)
def test_any_schedule_gives_the_same_bits(
    case: Case, warps: int, spans: int, emulated: ModuleType, schedule: Callable[[int, int], None]
) -> None:
    """Whichever tiles are faster and however many are under way; and the bits are right."""
    window = emulated.WINDOW
    tiles = max(case.lengths or (case.L,)) / (
        warps * emulated.linear_scan_cuda_steps_per_warp(False)
    )
    assert tiles > max(spans * window**2, 2 * window)
    inputs = make(case)
    a = inputs.a.sgn() * (1 - inputs.a.abs() / 500)  # far beyond a tile
    rest = (inputs.b, inputs.grad_h, case.reverse, inputs.initial_state, inputs.cu_seqlens)
    schedule(1, 1)
    alone = results(cuda_linear_scan, a, *rest)
    check_at_length(alone, a, *rest)
    for blocks_at_once, seed in ((4, 2), (12, 3)):
        schedule(blocks_at_once, seed)
        for name, value in results(cuda_linear_scan, a, *rest).items():
            assert torch.equal(value, alone[name]), name


@pytest.mark.parametrize("warps", [1], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_product_that_overflows_leaves_a_zero_state_alone(
    dtype: torch.dtype, warps: int, emulated: ModuleType
) -> None:
    L, D = 300, 8
    a = torch.full((1, L, D), 3.0, dtype=dtype, requires_grad=True)  # 3**81 is infinite
    b = torch.zeros(1, L, D, dtype=dtype)
    b[:, -3:] = 1
    grad_h = torch.zeros(1, L, D, dtype=dtype)
    grad_h[:, :3] = 1
    for backend in ("cuda", "reference"):
        h = kk.linear_scan(a, b, backend=backend)
        torch.testing.assert_close(h[0, -4:, 0].real, torch.tensor([0.0, 1.0, 4.0, 13.0]))
        assert not h[:, :-3].any()
    b.requires_grad_()
    grads = [
        torch.autograd.grad(kk.linear_scan(a, b, backend=backend), (a, b), grad_h)
        for backend in ("cuda", "reference")
    ]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("warps", [1], indirect=True)
def test_what_is_not_finite_spreads_as_in_the_reference(warps: int, emulated: ModuleType) -> None:
    a, b = torch.full((1, 200, 8), 0.5), torch.ones(1, 200, 8)
    a[0, 0, 1] = a[0, 50, 2] = b[0, 99, 3] = torch.nan
    a[0, 64, 4] = torch.inf
    found, expected = (kk.linear_scan(a, b, backend=name) for name in ("cuda", "reference"))
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    torch.testing.assert_close(found[finite], expected[finite])


@pytest.mark.parametrize("warps", [1], indirect=True)
def test_unchecked_boundaries_do_no_harm(warps: int, emulated: ModuleType) -> None:
    """On a device nobody has looked at cu_seqlens."""
    b = torch.ones(1, 100, 4)
    bounds = torch.tensor([0, 40, 7, 1 << 40, -5])  # as [0, 40, 40, 100, 100]
    h, final = cuda_linear_scan.forward(b, b, None, bounds, False, True)
    assert h[0, :, 0].tolist() == [*range(1, 41), *range(1, 61)]
    assert final[:, 0].tolist() == [40, 0, 60, 0]


@pytest.mark.parametrize("chunk", [0, 1, 15, 16, 17, 100, 255, 256, 257, 511, 512, 700])
@pytest.mark.parametrize("threads", [32, 96, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_look_back(
    dtype: torch.dtype, threads: int, chunk: int, emulated_module: ModuleType
) -> None:
    """Reads where the span before ended, where the windows since did, and its own window."""
    channels = 128 // dtype.itemsize
    state = dtype if dtype.is_complex else torch.float32
    window = emulated_module.WINDOW
    own_window, own_span = (chunk - chunk % size for size in (window, window**2))
    since = range(max(own_span - 1, 0), chunk)
    trail = [i for i in since if i >= own_window or (i + 1) % window == 0]
    g = torch.Generator().manual_seed(chunk)
    first = torch.randn(channels, generator=g, dtype=state)
    records = torch.full((chunk, channels, 2), torch.nan, dtype=state)
    records[trail] = torch.randn(len(trail), channels, 2, generator=g, dtype=state) * 0.7
    if own_span:
        records[trail[0], :, 0] = 0  # a state
    flags = torch.ones(chunk, dtype=torch.int32)
    found = torch.full((channels,), torch.nan, dtype=state)
    addresses = (x.data_ptr() for x in (flags, records, first, found))
    code = cuda_linear_scan.DTYPES[dtype]
    emulated_module.look_back(code, threads // 32, chunk, *addresses)
    expected = first.to(torch.complex128)
    for a, b in zip(records[trail][:, :, 0], records[trail][:, :, 1], strict=True):
        expected = a * expected + b
    torch.testing.assert_close(found.to(torch.complex128), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "chains", "expected"),
    [
        (1, 1, 1),
        (32, 1, 1),
        (33, 1, 2),
        (256, 1, 8),  # one tile, no chain
        (257, 1, 5),  # two of 160 steps
        (1 << 20, 2, 8),
        (1 << 20, 4096, 4),
        (16384, 384, 4),
    ],
)
def test_choose_warps(length: int, chains: int, expected: int) -> None:
    assert cuda_linear_scan.choose_warps(length, chains, steps_per_warp=32) == expected


def test_bad_codes_raise(emulated_module: ModuleType) -> None:
    sizes = (1, 8, 8, 1)
    with pytest.raises(ValueError, match="dtype"):
        emulated_module.linear_scan_cuda_cut(sizes, 0, 9, False, 1)
    for warps in (0, 9):
        with pytest.raises(ValueError, match="warps"):
            emulated_module.linear_scan_cuda_cut(sizes, 0, 0, False, warps)


def test_an_error_of_cuda_names_the_op() -> None:
    module, _, has_cuda = _extension.load()
    if not has_cuda or torch.cuda.is_available():
        pytest.skip("needs a build with CUDA on a machine without a device")
    assert module is not None
    array = (16, 0, 0, 1)
    with pytest.raises(RuntimeError, match=r"^linear_scan: CUDA says cudaError"):
        module.linear_scan_cuda_forward((1, 9, 4, 1), 0, False, 0, array, array, 16, 0, 0, 1, 0, 0)


# ---- what nvcc makes of them


def nvcc() -> str | None:
    folders = sorted(Path("/usr/local").glob("cuda*/bin"))
    return shutil.which("nvcc") or next(
        (found for folder in folders if (found := shutil.which("nvcc", path=folder))), None
    )


def compile_cubins(folder: Path) -> list[tuple[str, Path]]:
    source = emulation.ROOT / "csrc/scan/linear_scan_cuda.cu"

    def compile_for(arch: str) -> tuple[str, Path]:
        cubin = folder / f"{arch}.cubin"
        flags = ["-std=c++20", "-O3", f"-I{emulation.ROOT / 'csrc'}", f"-arch={arch}"]
        subprocess.run([nvcc(), *flags, "-cubin", source, "-o", cubin], check=True)
        return arch.removesuffix("a"), cubin

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_for, ("sm_80", "sm_90a", "sm_100")))


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """(arch, cubin) pairs: those of the built extension, or where it has none, made here."""
    folder = tmp_path_factory.mktemp("cubins")
    found, why = cubins.extract(folder, ["sm_80", "sm_90", "sm_100"])
    if found:
        return found
    if nvcc() is None:
        pytest.skip(f"{why}; no nvcc")
    return compile_cubins(folder)


def test_nothing_spills(machine_code: list[tuple[str, Path]]) -> None:
    variants = 16  # 4 dtypes x by vectors or not x forward and backward
    count = 0
    for arch, cubin in machine_code:
        for kernel, usage in own_usages(cubin).items():
            assert (usage.stack, usage.local) == (0, 0), (arch, kernel)
            assert usage.registers <= 128, (arch, kernel)  # two blocks of 256 threads an SM
            count += 1
    assert count == variants * len({arch for arch, _ in machine_code})


def test_rows_are_read_and_written_by_16_bytes(machine_code: list[tuple[str, Path]]) -> None:
    for arch, cubin in machine_code:
        for kernel, lines in code_by_kernel(cubin).items() if own_usages(cubin) else ():
            if "Lb0" in kernel:  # element by element
                continue
            wide = [sum(op in line and ".128" in line for line in lines) for op in ("LDG", "STG")]
            rows = (3 * 4, 2 * 4) if "backward" in kernel else (2 * 8, 8)  # arrays x steps
            assert wide[0] >= rows[0], (arch, kernel, wide)
            assert wide[1] >= rows[1], (arch, kernel, wide)


def own_usages(cubin: Path) -> dict[str, sass.Usage]:
    return {k: usage for k, usage in cubins.usages(cubin).items() if "linear_scan" in k}


def code_by_kernel(cubin: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part in tools.run("nvdisasm", "-c", "-ndf", cubin).split(".section\t.text.")[1:]:
        name, _, body = part.partition(",")
        found[name] = body.splitlines()
    return found


# ---- on a device


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALL + CHAINED, ids=str)
def test_device(case: Case) -> None:
    check(case, "cuda", "cuda")


def results(
    launcher: ModuleType,
    a: Tensor,
    b: Tensor,
    grad_h: Tensor,
    reverse: bool = False,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> dict[str, Tensor]:
    h, final = launcher.forward(a, b, initial, cu_seqlens, reverse, True)
    grads = launcher.backward(a, h, initial, grad_h, initial, cu_seqlens, reverse)
    named = dict(zip(("grad_a", "grad_b", "grad_initial"), grads, strict=True))
    named["grad_a"] = named["grad_a"].sum_to_size(a.shape)
    return {"h": h, "final": final, **named}


def check_at_length(
    found: dict[str, Tensor], a: Tensor, b: Tensor, grad_h: Tensor, *options: bool | Tensor | None
) -> None:
    """As cases.check; a loop over the steps would take too long."""
    double = torch.promote_types(b.dtype, torch.float64)
    wide = [x.to(double) if isinstance(x, Tensor) and x.dtype == b.dtype else x for x in options]
    exact = results(blocked_linear_scan, a.to(double), b.to(double), grad_h.to(double), *wide)
    own = results(blocked_linear_scan, a, b, grad_h, *options)
    for name, value in found.items():
        if value.numel() == 0:
            continue
        allowed = 2 * (own[name] - exact[name]).abs().max()
        allowed += 4 * torch.finfo(b.dtype).eps * exact[name].abs().max()
        assert (value - exact[name]).abs().max() <= allowed, name


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 16384, 1536), (1, 1 << 20, 64)], ids=str)
@pytest.mark.parametrize("invariant", [False, True])
def test_real_sizes(
    shape: tuple[int, int, int], dtype: torch.dtype, reverse: bool, invariant: bool
) -> None:
    if torch.cuda.mem_get_info()[1] < 40 << 30:
        pytest.skip("needs 40 GiB")
    g = torch.Generator("cuda").manual_seed(0)
    a = torch.rand((1, 1, shape[2]) if invariant else shape, device="cuda", generator=g)
    a = (0.9 + 0.0999 * a).to(dtype)
    b, grad_h = (torch.randn(shape, device="cuda", generator=g).to(dtype) for _ in range(2))
    found = results(cuda_linear_scan, a, b, grad_h, reverse)
    check_at_length(found, a, b, grad_h, reverse)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, (1 << 25) + 3, 72), (1, 32771, 1 << 16), (65537, 33, 1000)])
def test_beyond_2_31_elements(shape: tuple[int, int, int]) -> None:
    """Held to by the last channels of the last sequence."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB")
    B, L, D = shape
    assert B * L * D > 1 << 31
    a = torch.linspace(0.5, 0.99, D, device="cuda").to(torch.bfloat16)[None, None]
    b = torch.empty(shape, device="cuda", dtype=torch.bfloat16).uniform_(-1, 1)
    grads = a.expand(B, 1, D)  # a gradient for each sequence
    found = results(cuda_linear_scan, grads, b, b)
    some = {name: value[-1:, ..., -8:] for name, value in found.items()}
    check_at_length(some, a[..., -8:], b[-1:, :, -8:], b[-1:, :, -8:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(B=3, L=3000, D=256),
        Case(B=3, L=40, D=33),
        Case(B=2, L=3000, D=40, a="channel"),
        packed((700, 0, 1300, 5), D=64, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_graph_replay_with_changed_contents(case: Case) -> None:
    inputs, others = make(case, "cuda", 0), make(case, "cuda", 2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(case, inputs, "cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, inputs, "cuda")
    for source in (others, make(case, "cuda", 4), others):
        for name, value in vars(source).items():
            if value is not None:
                getattr(inputs, name).copy_(value)
        graph.replay()
        for name, value in run(case, source, "cuda").items():
            assert torch.equal(captured[name], value), name


@pytest.mark.gpu
@pytest.mark.parametrize("a", ["full", "channel"])
def test_device_bitwise_the_same_again(a: str) -> None:
    case = Case(B=2, L=20000, D=200, a=a)
    inputs = make(case, "cuda")
    first = run(case, inputs, "cuda")
    for _ in range(5):
        for name, value in run(case, inputs, "cuda").items():
            assert torch.equal(value, first[name]), name
