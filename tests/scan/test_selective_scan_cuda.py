"""selective_scan's CUDA C++ kernels: their sources run on the CPU, and what nvcc makes of them."""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

import kexue_kernels as kk
from kexue_kernels import _extension, dispatch, launchers
from kexue_kernels.offline import cubins
from kexue_kernels.scan import cuda_selective_scan, cuda_selective_state_update
from kexue_kernels.scan.chunks import SelectiveInputs
from kexue_kernels.scan.cuda_selective_scan import Cut, choose_cut
from tests import emulation
from tests.scan import test_selective_state_update as update_tests
from tests.scan.cases import error
from tests.scan.selective_cases import ALL, Case, check, make, packed, run


@pytest.fixture(scope="module")
def emulated_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("selective_emulation")
    return emulation.build(folder, "selective_module.cpp", "kexue_selective_emulated")


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
    monkeypatch.setattr(cuda_selective_scan, "_stream", no_stream)
    monkeypatch.setattr(cuda_selective_state_update, "_stream", no_stream)
    monkeypatch.setattr(cuda_selective_scan, "_processors", lambda _: 1)
    monkeypatch.setitem(dispatch._STATUS, "cuda", lambda: dispatch.BackendStatus(True, ""))
    monkeypatch.setattr(dispatch, "_served_devices", lambda _: ("cpu",))
    launchers.launcher.cache_clear()
    return emulated_module


@pytest.mark.parametrize("case", ALL, ids=str)
def test_whole_sequences(case: Case, emulated: ModuleType, poisoned: None) -> None:
    check(case, "cuda")


# By 16 bytes (d a multiple of 8) and by elements; several tiles of channels; n in several launches.
LARGER = [
    Case(batch=2, L=40, d=72, n=16),
    Case(batch=1, L=34, d=80, n=16, dtype=torch.bfloat16, B="group"),
    Case(batch=1, L=70, d=6, n=36, C="invariant", dtype=torch.float16),
    Case(batch=1, L=40, d=40, n=9, complex=True, C="group"),
]


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_tiles_and_launches(case: Case, emulated: ModuleType, poisoned: None) -> None:
    check(case, "cuda")


SPLIT = [
    Case(batch=1, L=150, d=5, n=4),
    Case(batch=2, L=100, d=40, n=8, dtype=torch.bfloat16, strided=True),
    Case(batch=1, L=100, d=4, n=9, complex=True, C="invariant"),
    Case(batch=1, L=130, d=8, n=20, dtype=torch.float16, B="invariant", z=False),
    packed((40, 0, 64, 33, 1, 70)),
    packed((0, 96, 32, 0, 64, 31, 0), d=16, n=16, dtype=torch.bfloat16, initial=False),
    packed((40, 100), complex=True, B="group"),
]


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_split_sequences(
    case: Case, emulated: ModuleType, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_selective_scan, "SHORTEST_SPLIT", 1)
    monkeypatch.setattr(cuda_selective_scan, "_processors", lambda _: 40)
    cuts = record_cuts(monkeypatch)
    check(case, "cuda")
    assert all(cut.split < case.L for cut in cuts)


@pytest.mark.parametrize(
    "case", [Case(batch=5, L=9), packed((5, 0, 40, 2, 3), complex=True, C="invariant")], ids=str
)
def test_blocks_take_several_segments(
    case: Case, emulated: ModuleType, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = record_cuts(monkeypatch, rows=2)
    check(case, "cuda")
    assert all(cut.slots > 2 * cut.rows for cut in cuts)


def record_cuts(monkeypatch: pytest.MonkeyPatch, **changes: int) -> list[Cut]:
    cuts: list[Cut] = []

    def choose(**options: int) -> Cut:
        cuts.append(choose_cut(**options)._replace(**changes))
        return cuts[-1]

    monkeypatch.setattr(cuda_selective_scan, "choose_cut", choose)
    return cuts


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, L=70, d=66, n=9, dtype=torch.bfloat16),
        packed((33, 0, 40), complex=True, C="invariant"),
    ],
    ids=str,
)
@pytest.mark.parametrize("processors", [1, 40])
def test_any_schedule_gives_the_same_bits(
    case: Case,
    processors: int,
    emulated: ModuleType,
    schedule: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_selective_scan, "SHORTEST_SPLIT", 1)
    monkeypatch.setattr(cuda_selective_scan, "_processors", lambda _: processors)
    inputs = make(case)
    schedule(1, 1)
    alone = run(case, inputs, "cuda")
    for blocks_at_once, seed in ((2, 2), (5, 3)):
        schedule(blocks_at_once, seed)
        for name, value in run(case, inputs, "cuda").items():
            assert torch.equal(value, alone[name]), name


@pytest.mark.parametrize("lengths", [(40,), (5, 0, 35)])
def test_chunked_prefill_is_the_whole(lengths: tuple[int, ...], emulated: ModuleType) -> None:
    i = make(Case(batch=1, L=40)).tensors
    whole, last = kk.selective_scan(**i, return_final_state=True, backend="cuda")
    outs, state, start = [], i["initial_state"], 0
    for length in lengths:
        part = {k: x[:, start : start + length] if x.ndim == 3 else x for k, x in i.items()}
        part["initial_state"] = state
        out, state = kk.selective_scan(**part, return_final_state=True, backend="cuda")
        outs.append(out)
        start += length
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    torch.testing.assert_close(state, last)


def test_far_from_zero(emulated: ModuleType) -> None:
    """Decays that underflow, steps of nothing, gates at both ends: finite, as in the reference."""
    i = make(Case(L=33, n=16)).tensors
    i["delta"][:, ::3] = 60.0
    i["delta"][:, 1::3] = -60.0
    i["z"][:, ::2] *= 100
    i["A"][:, 0] = -1e4
    out, last = kk.selective_scan(**i, delta_softplus=True, return_final_state=True, backend="cuda")
    expected, expected_last = kk.selective_scan(
        **i, delta_softplus=True, return_final_state=True, backend="reference"
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-4)


def test_unchecked_boundaries_do_no_harm(emulated: ModuleType) -> None:
    """On a device nobody has looked at cu_seqlens: here as [0, 40, 40, 100, 100]."""
    case = Case(batch=1, L=100, initial=False)
    i = make(case).tensors
    i["B"], i["C"] = i["B"].unsqueeze(2), i["C"].unsqueeze(2)
    bounds = torch.tensor([0, 40, 7, 1 << 40, -5])
    out, final = torch.empty_like(i["u"]), torch.empty(4, case.d, case.n)
    given = [i[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    inputs = SelectiveInputs(*given, None, bounds, True)
    cuda_selective_scan.forward(inputs, out, final, None)
    good = torch.tensor([0, 40, 40, 100, 100])
    same, same_final = torch.empty_like(out), torch.empty_like(final)
    cuda_selective_scan.forward(inputs._replace(cu_seqlens=good), same, same_final, None)
    assert torch.equal(out, same)
    assert torch.equal(final, same_final)


@pytest.mark.parametrize(
    ("sequences", "tiles", "L", "split", "slots", "rows"),
    [
        (8, 64, 2048, 2080, 8, 8),  # enough blocks for 132 processors
        (1, 8, 65536, 1024, 64, 64),
        (4096, 8, 16, 32, 4096, 1056),
        (1, 1, 100, 128, 1, 1),
    ],
)
def test_choose_cut(sequences: int, tiles: int, L: int, split: int, slots: int, rows: int) -> None:
    cut = choose_cut(
        sequences=sequences,
        packed=False,
        steps=sequences * L,
        L=L,
        chunk=32,
        warps=2 * tiles,
        tiles=tiles,
        processors=132,
        run=32 * tiles,
    )
    assert cut == Cut(split, slots, rows, 32 * tiles)


def test_bad_codes_raise(emulated: ModuleType) -> None:
    given = ((1,) * 6, (1,) * 4, 0, False, *((0,) * 4,) * 3, 0, (0,) * 6, (0,) * 6, 0, 0, 0)
    names = ("out", "sums", "final", "checkpoints", "entering", "local", "time", "stream")
    with pytest.raises(ValueError, match="dtype"):
        emulated.selective_scan_cuda_forward(given, 3, False, **dict.fromkeys(names, 0))


# ---- one step


@pytest.mark.parametrize("form", update_tests.FORMS.values(), ids=update_tests.FORMS)
def test_state_update(form: dict, emulated: ModuleType, poisoned: None) -> None:
    update_tests.test_is_the_definition(form, "cuda", None)


def test_state_update_by_indices(emulated: ModuleType) -> None:
    form = {"heads": 2, "groups": 1}
    update_tests.test_indices_choose_states("cuda", 2, torch.int64)
    i = update_tests.build(form)
    before = i["state"].clone()
    indices = torch.tensor([-1, 2, 7])  # 7: past the last state, which a device does not see
    given = [i[k] for k in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    out = torch.full_like(i["x"], torch.nan)
    cuda_selective_state_update.update(*given, True, indices, out)
    assert not out[[0, 2]].any()
    assert out[1].isfinite().all()
    assert torch.equal(i["state"][:2], before[:2])
    assert not torch.equal(i["state"][2], before[2])


# ---- what nvcc makes of them


def test_nothing_spills(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cubins")
    found, why = cubins.extract(folder, ["sm_80", "sm_90", "sm_100"])
    if not found:
        pytest.skip(why)
    count = 0
    for arch, cubin in found:
        for kernel, usage in cubins.usages(cubin).items():
            if "selective" in kernel:
                assert (usage.stack, usage.local) == (0, 0), (arch, kernel)
                count += 1
    assert count == 27 * len({arch for arch, _ in found})


# ---- on a device


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALL + LARGER + SPLIT, ids=str)
def test_device(case: Case) -> None:
    check(case, "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=8, L=1024, d=256, n=16, dtype=torch.bfloat16),
        Case(batch=1, L=8192, d=64, n=16),  # split
        Case(batch=512, L=16, d=256, n=16, dtype=torch.float16),
        packed((3000, 0, 17, 900), d=192, n=16, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_real_sizes(case: Case) -> None:
    check(case, "cuda", "cuda")
    inputs = make(case, "cuda")
    first = run(case, inputs, "cuda")
    for name, value in run(case, inputs, "cuda").items():
        assert torch.equal(value, first[name]), name


@pytest.mark.gpu
def test_beyond_2_31_elements() -> None:
    """The last sequence's results are those it has alone."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB")
    batch, L, d, n = 65537, 33, 1000, 16
    assert batch * L * d > 1 << 31
    u = torch.empty(batch, L, d, device="cuda", dtype=torch.bfloat16).uniform_(-1, 1)
    B = torch.empty(batch, L, n, device="cuda", dtype=torch.bfloat16).uniform_(-1, 1)
    A = -torch.rand(d, n, device="cuda") - 0.1
    last = u[-1:].clone(), B[-1:].clone()
    results = []
    for x, matrix in ((u, B), last):
        x.requires_grad_()
        out = kk.selective_scan(x, x.abs(), A, matrix, matrix, backend="cuda")
        results.append((out[-1:], torch.autograd.grad(out, x, x.detach())[0][-1:]))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("form", update_tests.FORMS.values(), ids=update_tests.FORMS)
def test_state_update_on_a_device(form: dict) -> None:
    i = update_tests.build(form)
    exact = update_tests.definition(i)
    on_device = {k: x.cuda() for k, x in i.items()}
    y = kk.selective_state_update(**on_device, dt_softplus=True, backend="cuda")
    own = kk.reference.selective_state_update(**i, dt_softplus=True), i["state"]
    for value, plain, true in zip((y, on_device["state"]), own, exact, strict=True):
        allowed = 2 * error(plain, true)
        allowed += 4 * torch.finfo(value.dtype).eps * true.abs().max().item()
        assert error(value.cpu(), true) <= allowed
