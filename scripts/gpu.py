"""Everything that needs a GPU, within a time limit: build, check, test, sanitize, benchmark.

`make gpu` runs it. The limit is GPU_SECONDS (540) overall, set-up included; each stage gets a
share of it, the benchmark what is left, and a stage that fails or runs out of time does not
stop the next ones. gpu.log and the benchmark's results go to $OUT, or else to
benchmarks/results/cuda. The exit status is 1 unless every stage passed. On a machine without a
network, PIP_NO_INDEX=1 spares the set-up the time to find that out, and KEXUE_WHEELS=folder
brings packages that are not there, such as the benchmark's peers.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = str(ROOT / ".venv" / "bin" / "python")
KEPT_FOR_BENCHMARK = 0.3  # of the whole limit
LIMIT = "LIMIT"
SANITIZERS = ("memcheck", "racecheck")
PATH = os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin"  # where CUDA's tools often are
GRACE = 5  # seconds between asking a stage to stop and stopping it


class Stage(NamedTuple):
    name: str
    command: list[str]  # LIMIT in it stands for the seconds the stage gets
    share: float  # of the whole limit, at most
    variables: dict[str, str] | None = None


class Result(NamedTuple):
    name: str
    outcome: str
    seconds: float


def device_arch() -> str:
    """The architecture to compile for, such as sm_90a."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.check_output(query, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"make gpu needs an NVIDIA GPU and its driver: {error}")
    capability = found.split()[0]
    return "sm_90a" if capability == "9.0" else f"sm_{capability.replace('.', '')}"


def stages(out: Path) -> list[Stage]:
    sanitizer = ["compute-sanitizer", "--error-exitcode=1", "--tool"]
    tools = SANITIZERS if shutil.which(sanitizer[0], path=PATH) else ()
    # PyTorch's caching allocator would hide an access past the end of a tensor
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small_set = [PYTHON, "tests/gpu_sanitizer.py"]
    command_line = [PYTHON, "-m", "kexue_kernels"]
    benchmark = ["bench", "--device", "cuda", "--time-limit", LIMIT]
    return [
        Stage("info", [*command_line, "info"], 0.1),
        Stage("selfcheck", [*command_line, "selfcheck"], 0.15),
        Stage("tests", [PYTHON, "-m", "pytest", "-m", "gpu", "tests"], 0.35),
        *(Stage(tool, [*sanitizer, tool, *small_set], 0.12, uncached) for tool in tools),
        Stage("benchmark", [*command_line, *benchmark, "--out", str(out)], 1.0),
    ]


def build(variables: dict[str, str]) -> Stage:
    command = [sys.executable, "scripts/setup_environment.py", ".venv"]
    return Stage("build", command, 0.4, variables)


class Run:
    """Runs stages against one deadline, showing and logging what they print."""

    def __init__(self, seconds: float, log: IO[str]) -> None:
        self.seconds = seconds
        self.start = time.monotonic()
        self.log = log
        self.results: list[Result] = []

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start) - 2 * GRACE

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def stage(self, stage: Stage) -> bool:
        kept = 0.0 if stage.name == "benchmark" else KEPT_FOR_BENCHMARK * self.seconds
        limit = min(stage.share * self.seconds, self.left() - kept)
        command = [f"{limit:.0f}" if word == LIMIT else word for word in stage.command]
        self.say(f"\n== {stage.name}: {' '.join(command)} (at most {max(limit, 0):.0f} s)")
        begun = time.monotonic()
        outcome = self._outcome(command, stage.variables or {}, limit)
        self.results.append(Result(stage.name, outcome, time.monotonic() - begun))
        self.say(f"== {stage.name}: {outcome}")
        return outcome == "passed"

    def _outcome(self, command: list[str], variables: dict[str, str], limit: float) -> str:
        if limit <= 0:
            return "not run: out of time"
        if shutil.which(command[0], path=PATH) is None:
            return f"not run: there is no {command[0]}"
        env = os.environ | {"PATH": PATH, "PYTHONUNBUFFERED": "1"} | variables
        env.pop("TRITON_INTERPRET", None)  # the kernels themselves, not the interpreter
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        pump = threading.Thread(target=self._pump, args=(process.stdout,), daemon=True)
        pump.start()
        try:
            code = process.wait(limit + GRACE)
        except subprocess.TimeoutExpired:
            _stop(process)
            return f"stopped at its limit of {limit:.0f} s"
        finally:
            pump.join(GRACE)
        return "passed" if code == 0 else f"failed (exit status {code})"

    def _pump(self, lines: IO[str]) -> None:
        for line in lines:
            self.say(line.rstrip("\n"))

    def summary(self) -> bool:
        self.say("\n== summary")
        for name, outcome, seconds in self.results:
            self.say(f"{name:<10} {seconds:6.1f} s  {outcome}")
        if not any(result.name in SANITIZERS for result in self.results):
            self.say("compute-sanitizer is not installed here")
        return all(result.outcome == "passed" for result in self.results)


def _stop(process: subprocess.Popen[str]) -> None:
    """End a stage and everything it started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    arch = device_arch()
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "cuda").resolve()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "gpu.log", "w") as log:
        run = Run(float(os.environ.get("GPU_SECONDS") or 540), log)
        if not run.stage(build({"KEXUE_BUILD_CUDA": "1", "KEXUE_CUDA_ARCHS": arch})):
            run.say("going on with the Triton kernels alone")
            run.stage(build({"KEXUE_BUILD_CUDA": "0"}))
        for stage in stages(out):
            run.stage(stage)
        sys.exit(0 if run.summary() else 1)


if __name__ == "__main__":
    main()
