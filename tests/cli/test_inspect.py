"""`inspect`: what kernels compile to. Needs Triton, not a GPU."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kexue_kernels import families
from kexue_kernels.cli import app
from kexue_kernels.offline import cubins, cuda_costs, pool, tools
from kexue_kernels.offline import triton as triton_kernels
from kexue_kernels.offline.archs import DEFAULT_ARCHS, KIB
from tests.cli import example_kernels

LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: CliRunner().invoke(app, ["inspect", *arguments])


@pytest.fixture
def only_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the family shipped the kernels of example_kernels.py, and no extension were built."""
    own = {"scan": [example_kernels.__name__]}
    monkeypatch.setattr(triton_kernels, "modules", lambda family: own.get(family, []))
    monkeypatch.setattr(cubins, "extension_file", lambda: None)


# ---- every kernel that is shipped


@pytest.fixture(scope="module")
def shipped() -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["inspect", "--json"])
    cards: list[dict[str, Any]] = json.loads(result.stdout)
    assert result.exit_code == 0, [
        (card["name"], card["arch"], card["problems"], card["error"])
        for card in cards
        if card["problems"]
    ]
    return cards


def test_every_shipped_configuration_has_a_card(shipped: list[dict[str, Any]]) -> None:
    expected = {
        (case.op, case.name, arch)
        for family in families.names()
        for module in triton_kernels.modules(family)
        for case in triton_kernels.cases(module)
        for arch in DEFAULT_ARCHS
        if arch in (case.archs or DEFAULT_ARCHS)
    }
    found = [(c["op"], c["name"], c["arch"]) for c in shipped if c["backend"] == "triton"]
    assert len(found) == len(expected) > 0
    assert set(found) == expected


def test_every_shipped_configuration_fits(shipped: list[dict[str, Any]]) -> None:
    for card in shipped:
        what = (card["name"], card["arch"])
        assert not card["error"], (what, card["error"])
        assert card["spills"] == 0, what
        assert card["stack"] == 0, what
        assert card["shared_limit"] == LIMITS[card["arch"]], what
        assert card["shared"] <= LIMITS[card["arch"]], what
        assert 0 < card["registers"] <= (512 if card["arch"] == "gfx942" else 255), what
        assert card["occupancy"]["blocks"] >= 1, what
        assert card["loop"]["instructions"] == sum(card["loop"]["mix"].values()), what
        assert card["loop"]["mix"].get("other", 0) == 0, (what, card["loop"]["mix"])


# ---- the command, on kernels of our own


@pytest.mark.usefixtures("only_examples")
def test_a_memory_bound_kernel(run: Run) -> None:
    result = run("--kernel", "decayed_sum", "--arch", "sm_90", "--arch", "gfx942", "--json")
    first, second, *broken = json.loads(result.stdout)
    assert (first["op"], first["name"], first["arch"]) == ("example", "decayed_sum", "sm_90")
    assert (first["threads"], second["threads"]) == (128, 256)  # waves of 64
    for card in (first, second):
        assert card["problems"] == []
        assert card["loop"]["is_loop"]
        assert card["loop"]["mix"]["global"] >= 3
        assert card["loop"]["mix"]["special"] >= 2
        assert next(iter(card["loop"]["cycles"])) == "DRAM"
        assert card["roofline"]["bound"] == "memory"
    assert first["loop"]["mix"]["global"] == 3  # whole vectors: the arguments are aligned
    assert second["roofline"]["intensity"] == pytest.approx(2 / 12)
    assert [card["name"] for card in broken] == ["broken", "broken"]
    assert all("power of 2" in card["error"] for card in broken)
    assert result.exit_code == 1


@pytest.mark.usefixtures("only_examples")
def test_tensor_cores_show(run: Run) -> None:
    result = run("--kernel", "tiled", "--json")
    assert result.exit_code == 0
    cards = json.loads(result.stdout)
    assert [card["arch"] for card in cards] == list(DEFAULT_ARCHS)
    for card in cards:
        assert card["problems"] == []
        assert card["loop"]["mix"]["tensor"] >= 1
        assert 0 < card["shared"] <= LIMITS[card["arch"]]
        if card["arch"] != "sm_100":  # where descriptors have the shape
            assert card["loop"]["cycles"]["tensor core"] > 0


@pytest.mark.usefixtures("only_examples")
def test_spills_show(run: Run) -> None:
    """Two warps can't hold 128 x 128 sums in registers."""
    result = run("--kernel", "crowded", "--arch", "sm_80", "--json")
    assert result.exit_code == 1
    (card,) = json.loads(result.stdout)
    assert card["registers"] == 255
    assert card["spills"] > 0
    assert card["stack"] > 0
    assert [problem.partition(" ")[2] for problem in card["problems"]] == [
        "spill instructions",
        f"stack of {card['stack']} bytes",
    ]


@pytest.mark.usefixtures("only_examples")
def test_cards_for_people(run: Run) -> None:
    result = run("--kernel", "decayed_sum", "--arch", "sm_90")
    assert "DRAM" in result.stdout
    assert "memory-bound: 12 bytes and 2 FLOP" in result.stdout
    assert "H100 SXM" in result.stdout
    assert re.search(r"occupancy\s+100%: 16 blocks", result.stdout)
    assert "does not compile" in result.stdout
    assert "C++ extension is not built" in result.stderr


@pytest.mark.usefixtures("only_examples")
def test_no_such_kernel(run: Run) -> None:
    result = run("--kernel", "nonesuch", "--arch", "sm_90", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == []
    assert "--kernel: no op or name has 'nonesuch' in it" in result.stderr


@pytest.mark.usefixtures("only_examples")
def test_without_triton(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    result = run("--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == []
    assert "Triton is not installed" in result.stderr
    assert "C++ extension is not built" in result.stderr


# ---- CUDA C++


def test_cards_from_a_cubin() -> None:
    ((card,),) = pool.run([(example_kernels.cubin_cards, ("sm_90",))])
    assert (card.backend, card.kernel, card.arch) == ("cuda", "decayed_sum", "sm_90")
    assert card.threads == 128
    assert card.occupancy is not None
    assert card.occupancy.warps == 64
    assert card.loop is not None
    assert card.loop.mix["global"] == 3
    assert card.problems == []
    assert card.roofline is None


def test_what_a_cuda_kernel_is_called() -> None:
    declaration = "void kexue::(anonymous namespace)::linear_scan_backward<(kexue::DType)0, true>"
    for parameters in ("(kexue::Args)", "(float const*, void (*)(int))", ""):
        assert cubins._identity(declaration + parameters) == (
            *("scan", "linear_scan"),
            "linear_scan_backward<(kexue::DType)0, true>",
        )
    assert cubins._identity("helper(int)") == ("", "", "helper")


@pytest.mark.parametrize(
    ("name", "shown", "cost"),
    [
        ("linear_scan_forward_kernel<(kexue::DType)0, true>", "<f32, true>", (12, 2)),
        ("linear_scan_backward_kernel<(kexue::DType)1, true>", "<bf16, true>", (10, 3)),
        ("linear_scan_forward_kernel<(kexue::DType)3, false>", "<c64, false>", (24, 8)),
        ("linear_scan_backward_kernel<(kexue::DType)3, false>", "<c64, false>", (40, 14)),
    ],
)
def test_what_a_cuda_kernel_s_op_costs(name: str, shown: str, cost: tuple[float, float]) -> None:
    assert cuda_costs.readable(name).endswith(f"_kernel{shown}")
    assert cuda_costs.cost("scan", name) == cost


def test_the_dtypes_are_those_of_csrc() -> None:
    headers = sorted((Path(__file__).parents[2] / "csrc").rglob("*.h"))
    text = "".join(header.read_text() for header in headers)
    listed = re.search(r"enum class DType[^{]*{([^}]*)}", text)
    assert listed is not None
    pairs = (entry.split("=") for entry in listed[1].split(","))
    numbers = {number.strip(): name.strip() for name, number in pairs}
    assert numbers == {number: name for number, (name, _) in cuda_costs.DTYPES.items()}


def test_launch_bounds() -> None:
    text = """
.nv.info
\t<0x1>
\tAttribute:\tEIATTR_REGCOUNT

.nv.info._Z4scanv
\t<0x1>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x100 0x2 0x1

.nv.info._Z5otherv
\t<0x1>
\tAttribute:\tEIATTR_CUDA_API_VERSION
"""
    assert cubins._threads(text) == {"_Z4scanv": 512}


def test_an_extension_without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*_: object, **__: object) -> str:
        raise RuntimeError("cuobjdump info: File 'x' does not contain device code")

    monkeypatch.setattr(cubins, "extension_file", lambda: tmp_path)
    monkeypatch.setattr(tools, "run", failing)
    found, why = cubins.extract(tmp_path, ["sm_90"])
    assert found == []
    assert "built without CUDA" in why


def test_no_tool_to_read_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cubins, "extension_file", lambda: tmp_path)
    monkeypatch.setattr(tools, "find", lambda *_: None)
    found, why = cubins.extract(tmp_path, ["sm_90"])
    assert found == []
    assert "cuobjdump is neither in Triton's wheel nor in a CUDA toolkit" in why
    assert tools.demangled(["_Z1fv"]) == {"_Z1fv": "_Z1fv"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attention"], ["FAMILY", "attention", "scan"]),
        (["--arch", "sm_70"], ["--arch", "sm_70", "sm_80", "sm_120", "gfx942"]),
    ],
)
def test_unknown_names(run: Run, arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
