"""The scripts behind `make`: which PyTorch the set-up takes, and the time limit of `make gpu`."""

import importlib.util
import io
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("KEXUE_TORCH", "KEXUE_WHEELS"):
        monkeypatch.delenv(name, raising=False)
    return load("setup_environment")


class FakeEnvironment:
    """Records what is asked of pip; offers only what is listed."""

    def __init__(self, offered: tuple[str, ...] = ()) -> None:
        self.offered, self.asked, self.inherited = offered, [], False

    def pip(self, *arguments: str) -> bool:
        self.asked.append(arguments[0])
        return arguments[0] in self.offered

    def inherit(self) -> None:
        self.inherited = True


CUDA_TORCH, CPU_TORCH = ("2.11.0+cu130", "13.0"), ("2.13.0+cpu", None)


@pytest.mark.parametrize(
    ("driver", "online", "own", "inherits", "asked"),
    [
        (False, True, CUDA_TORCH, False, ["torch==2.13.0+cpu"]),
        (False, True, None, False, ["torch==2.13.0+cpu"]),
        (True, True, None, False, ["torch==2.13.0"]),
        (True, True, CPU_TORCH, False, ["torch==2.13.0"]),
        (True, True, CUDA_TORCH, True, []),
        (True, False, CUDA_TORCH, True, []),
        (True, False, CPU_TORCH, True, []),
        (False, False, CPU_TORCH, True, []),
    ],
)
def test_which_torch(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    driver: bool,
    online: bool,
    own: tuple[str, str | None] | None,
    inherits: bool,
    asked: list[str],
) -> None:
    monkeypatch.setattr(setup, "own_torch", lambda: own)
    environment = FakeEnvironment(offered=("torch==2.13.0+cpu", "torch==2.13.0"))
    setup.provide_torch(environment, driver, online)
    assert environment.inherited is inherits
    assert environment.asked == asked


def test_default_build_where_pip_offers_no_cpu_build(setup: ModuleType) -> None:
    environment = FakeEnvironment(offered=("torch==2.13.0",))
    setup.provide_torch(environment, driver=False, online=True)
    assert environment.asked == ["torch==2.13.0+cpu", "torch==2.13.0"]


def test_no_torch_anywhere_says_what_to_do(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "own_torch", lambda: None)
    with pytest.raises(SystemExit, match="PIP_FIND_LINKS"):
        setup.provide_torch(FakeEnvironment(), driver=False, online=False)
    with pytest.raises(SystemExit, match="could not be installed"):
        setup.provide_torch(FakeEnvironment(), driver=True, online=True)


def test_named_requirements_replace_the_pinned(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEXUE_TORCH", "torch==2.11.0+cpu triton==3.6.0")
    monkeypatch.setattr(setup, "own_torch", lambda: CUDA_TORCH)
    environment = FakeEnvironment(offered=("torch==2.11.0+cpu",))
    setup.provide_torch(environment, driver=True, online=True)
    assert environment.asked == ["torch==2.11.0+cpu"]


def test_fingerprint_sees_contents_and_variables(setup: ModuleType, tmp_path: Path) -> None:
    setup.ROOT = tmp_path
    source = tmp_path / "kernel.cpp"
    source.write_text("one")
    before = setup.fingerprint([source], "A=1")
    assert setup.fingerprint([source], "A=1") == before
    assert setup.fingerprint([source], "A=2") != before
    source.write_text("two")
    assert setup.fingerprint([source], "A=1") != before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("gpu")
    monkeypatch.setattr(module, "GRACE", 1)
    return module


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_gpu_stages_go_on_after_a_failure(gpu: ModuleType) -> None:
    log = io.StringIO()
    run = gpu.Run(60, log)
    run.stage(gpu.Stage("fails", python("print('seen'); raise SystemExit(3)"), 0.5))
    run.stage(gpu.Stage("absent", ["no-such-program"], 0.5))
    run.stage(gpu.Stage("passes", python("import os; print(os.environ['A'])"), 0.5, {"A": "here"}))
    assert [result.outcome for result in run.results] == [
        "failed (exit status 3)",
        "not run: there is no no-such-program",
        "passed",
    ]
    assert not run.summary()
    assert "seen" in log.getvalue()
    assert "here" in log.getvalue()


def test_gpu_stage_is_stopped_at_its_limit(gpu: ModuleType) -> None:
    run = gpu.Run(10, io.StringIO())
    begun = time.monotonic()
    assert not run.stage(gpu.Stage("sleeps", ["bash", "-c", "sleep 60 & wait"], 0.1))
    assert time.monotonic() - begun < 10
    assert run.results[0].outcome == "stopped at its limit of 1 s"


def test_gpu_keeps_time_for_the_benchmark(gpu: ModuleType) -> None:
    run = gpu.Run(20, io.StringIO())
    run.start -= 14  # 6 seconds left, as much as is kept for the benchmark
    assert not run.stage(gpu.Stage("tests", python(""), 0.5))
    assert run.results[0].outcome == "not run: out of time"
    assert run.stage(gpu.Stage("benchmark", python("import sys; print(sys.argv)"), 1.0))
