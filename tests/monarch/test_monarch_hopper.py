"""monarch_matmul's cluster kernels without a Hopper GPU: their source run on the CPU, and what nvcc
makes of it."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.offline import cubins
from tests import emulation
from tests.emulation import machine_code
from tests.monarch.cases import Case, check_close, make, widened

BF16, F16 = torch.bfloat16, torch.float16
LIMIT = 227 * 1024  # bytes of shared memory


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulation")
    return emulation.build(folder, "monarch_module.cpp", "kexue_monarch_emulated")


def sizes(case: Case) -> tuple[int, ...]:
    return case.N, case.k, case.q, case.p, case.l, case.s, case.r


def forward(module: ModuleType, case: Case, cluster: int, inputs: dict[str, Tensor]) -> Tensor:
    x, w1, w2, bias = (inputs.get(name) for name in ("x", "w1", "w2", "bias"))
    assert x is not None
    assert w1 is not None
    assert w2 is not None
    y = x.new_full((case.N, case.out_features()), torch.nan)
    module.monarch_matmul_cuda(
        sizes=sizes(case),
        cluster=cluster,
        dtype={BF16: 1, F16: 2}[case.dtype],
        x=(x.data_ptr(), x.stride(0)),
        w1=w1.data_ptr(),
        w2=w2.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        stream=0,
    )
    return y


def check(module: ModuleType, case: Case, cluster: int, inputs: dict[str, Tensor]) -> None:
    found = forward(module, case, cluster, inputs)
    own = kk.reference.monarch_matmul(**inputs)
    exact = kk.reference.monarch_matmul(**{n: widened(x) for n, x in inputs.items()})
    check_close("y", found, own, exact)


def case(*sizes: int, dtype: torch.dtype = BF16, bias: bool = True) -> Case:
    N, k, q, p, l, s = sizes
    return Case(k, q, p, l, s, N, dtype, bias)


RESIDENT = [
    (2, case(40, 16, 16, 32, 16, 16)),
    (2, case(250, 16, 16, 64, 16, 72, dtype=F16)),  # three clusters, several tiles for each walker
    (2, case(33, 16, 32, 128, 16, 24, bias=False)),  # l divides q; two boxes for a block
    (2, case(65, 16, 96, 32, 16, 16, dtype=F16)),  # two tiles of outputs in the first product
    (2, case(31, 32, 32, 64, 32, 32)),  # eight and eight blocks of both factors
    (4, case(70, 32, 64, 64, 32, 40)),
    (8, case(33, 64, 64, 64, 64, 64)),
]
STREAMED = [
    (8, case(70, 64, 128, 64, 128, 64, dtype=F16)),
    (16, case(130, 64, 128, 64, 128, 128)),
]


@pytest.mark.parametrize(("cluster", "case"), [*RESIDENT, *STREAMED], ids=str)
def test_emulated_kernel(module: ModuleType, cluster: int, case: Case) -> None:
    assert module.way(sizes(case), cluster) == ("streamed" if case.q == 128 else "resident")
    check(module, case, cluster, make(case)[0])


@pytest.mark.parametrize(("cluster", "case"), [RESIDENT[1], STREAMED[0]], ids=str)
def test_results_do_not_depend_on_who_is_faster(
    module: ModuleType, cluster: int, case: Case
) -> None:
    inputs = make(case)[0]
    found = []
    for seed in (1, 2, 3):
        module.schedule(seed)
        found.append(forward(module, case, cluster, inputs))
    module.schedule(0)
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_rows_apart(module: ModuleType) -> None:
    """NaN between rows, and of one row any stride."""
    for N in (40, 1):
        apart = case(N, 16, 16, 32, 16, 16)
        inputs = make(apart)[0]
        room = torch.full((N, 16 * 32 + 24), torch.nan, dtype=BF16)
        x = room[:, 8 : 8 + 16 * 32]
        x.copy_(inputs["x"])
        if N == 1:
            x = x.as_strided(x.shape, (3, 1))
        check(module, apart, 2, inputs | {"x": x})


@pytest.mark.parametrize(
    ("n", "cluster", "way", "shape"),
    [
        (1024, 2, "resident", case(1, 32, 32, 32, 32, 32)),
        (2048, 4, "resident", case(1, 32, 64, 64, 32, 64)),
        (4096, 8, "resident", case(1, 64, 64, 64, 64, 64)),
        (16384, 16, "streamed", case(1, 128, 128, 128, 128, 128)),
    ],
    ids=str,
)
def test_real_sizes_fit(module: ModuleType, n: int, cluster: int, way: str, shape: Case) -> None:
    assert shape.k * shape.p == n
    assert module.way(sizes(shape), cluster) == way
    assert module.shared_bytes(sizes(shape), cluster) <= LIMIT
    assert cluster == 2 or module.way(sizes(shape), cluster // 2) == ""


@pytest.mark.parametrize(
    ("cluster", "case"),
    [
        (1, case(9, 16, 16, 32, 16, 16)),
        (4, case(9, 16, 16, 32, 16, 16)),  # four blocks of each
        (32, case(9, 256, 256, 32, 256, 32)),
        (2, case(9, 24, 16, 32, 16, 16)),
        (2, case(9, 16, 24, 32, 16, 16)),  # l doesn't divide q
        (2, case(9, 16, 16, 48, 16, 16)),
        (2, case(9, 16, 16, 32, 16, 20)),
        (4, case(9, 64, 64, 64, 64, 64)),  # too large
        (8, case(9, 2**14, 2**14, 2**14, 2**14, 2**14)),
        (16, case(9, 128, 128, 128, 128, 96)),  # s of streamed blocks
    ],
    ids=str,
)
def test_other_sizes_are_refused(module: ModuleType, cluster: int, case: Case) -> None:
    assert module.way(sizes(case), cluster) == ""
    with pytest.raises(ValueError, match="don't serve these sizes"):
        module.monarch_matmul_cuda(
            sizes=sizes(case), cluster=cluster, dtype=1, x=(0, 0), w1=0, w2=0, bias=0, y=0, stream=0
        )


def test_float32_is_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="bf16 and f16"):
        module.monarch_matmul_cuda(
            sizes=sizes(case(9, 16, 16, 32, 16, 16)),
            cluster=2,
            dtype=0,
            x=(0, 512),
            w1=0,
            w2=0,
            bias=0,
            y=0,
            stream=0,
        )


# ---- the arithmetic beneath


@pytest.mark.parametrize("m", [1, 2, 6])
def test_units_hold_what_the_permutation_says(module: ModuleType, m: int) -> None:
    k, l = 16, 8
    q = m * l
    seen = set()
    for i in range(k):
        for a in range(q):
            unit = i // 8 * m + a // l
            assert module.input_of_unit(unit, i % 8, m) == (i * q + a) // l
            assert (i * q + a) % l == a % l
            seen.add((unit, i % 8, a % l))
    assert len(seen) == k * q


@pytest.mark.parametrize("rows", [16, 32, 40, 72])
def test_descriptors_find_each_element_of_units(module: ModuleType, rows: int) -> None:
    units = 5 * 8192  # an address
    for step in range(4):
        descriptor = module.across_units(units, rows, step)
        assert descriptor >> 46 == 0  # no swizzle, no base offset
        start, leading, stride = ((descriptor >> shift & 0x3FFF) * 16 for shift in (0, 16, 32))
        for row in range(rows):
            for k in range(16):  # ((8, m), (T, 2)) : ((1T, SBO), (1, LBO)) of 16-bit elements
                found = start + row % 8 * 16 + row // 8 * stride + k // 8 * leading + k % 8 * 2
                unit = step * 2 + k // 8
                assert found == units + module.unit_offset(rows, row, unit) + k % 8 * 2


# ---- what nvcc makes of it


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("cubins")
    source, kernel = "csrc/monarch/monarch_matmul_cuda.cu", "monarch_matmul_resident_hopper"
    found, why = machine_code.find(folder, source, kernel)
    if why:
        pytest.skip(why)
    return found


def test_nothing_spills(machine: dict[str, list[Path]]) -> None:
    for arch, paths in machine.items():
        cards = [card for path in paths for card in cubins.cards(arch, path)]
        cards = [card for card in cards if "monarch_matmul" in card.kernel]
        assert len(cards) == (6 if paths else 0)  # of two dtypes: two resident, one streamed
        for card in cards:
            assert (card.family, card.op) == ("monarch", "monarch_matmul")
            assert (card.spills, card.stack) == (0, 0), (arch, card.kernel)
            assert card.problems == []


def test_hopper_multiplies_and_copies_as_meant(machine: dict[str, list[Path]]) -> None:
    if not machine["sm_90"]:
        pytest.skip("the extension has no code for sm_90")
    kernels = machine_code.opcodes(machine["sm_90"], "hopper")
    for name, code in kernels.items():
        if "monarch_matmul" not in name:
            continue
        streamed, halves = "streamed" in name, "Li2E" in name  # halves of a box: p is 32
        products = [op for op in code if op.startswith("HGMMA")]
        kind = "HGMMA.64x40x16" if streamed else "HGMMA.64x32x16"
        assert all(op.startswith(kind) for op in products), name
        # no wait beyond those meant: the compiler has made no product wait for another
        waits = sum(op.startswith("WARPGROUP.DEPBAR") for op in code)
        assert len(products) == (64 if streamed else 24 if halves else 40)
        assert waits == (16 if streamed else 5 if halves else 9)
        assert any(op.startswith("UTMALDG.3D") for op in code)
        assert sum(op.startswith("USETMAXREG") for op in code) == 2
        assert sum(op.startswith("UCGABAR_ARV") for op in code) == 2


def test_other_architectures_have_no_part_in_it(machine: dict[str, list[Path]]) -> None:
    for arch in ("sm_80", "sm_100"):
        for name, code in machine_code.opcodes(machine[arch], "hopper").items():
            if "monarch_matmul" in name:
                assert len(code) < 64, (arch, name)
