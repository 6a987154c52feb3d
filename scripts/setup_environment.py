"""Make the virtual environment ready: PyTorch, the other requirements, this project built in.

    setup_environment.py [--cpu] FOLDER [EXTRA ...]

The Makefile runs it before anything else, with any Python 3.11 or newer; when everything is
current it returns at once. With --cpu, an extension without CUDA will do where there is no
NVIDIA driver. The extras [test] and [bench] are always in. Which PyTorch the environment gets:

1. Where there is an NVIDIA driver and this Python has a suitable PyTorch with CUDA: that one.
2. Else the pinned one, by pip; without a driver its CPU build, where pip finds one.
3. Where pip reaches nothing: any suitable PyTorch that this Python has.

In cases 1 and 3 the environment also sees every other package of this Python.

Environment variables: KEXUE_TORCH, requirements to use in place of the pinned ones (such as
"torch==2.11.0+cpu triton==3.6.0"); KEXUE_WHEELS, a directory whose wheels are installed, for
machines without a network; KEXUE_BUILD_CUDA and KEXUE_CUDA_ARCHS, as in setup.py; and pip's
own (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX).
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - whatever Python make found runs this
    sys.exit(
        f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12"
    )

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import site
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TRITON = "triton==3.7.1; platform_system == 'Linux'"
OLDEST_TORCH = (2, 11)
# Without these the tests can't run at all; the rest of [test] can be missing on a machine
# without a network, and what needs it then says so.
ESSENTIAL_FOR_TESTS = ("pytest", "hypothesis")

TORCH_PROBE = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda]))"

# argv: requirements -> a JSON list of those that the running Python does not meet
REQUIREMENTS_PROBE = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement

def met(requirement):
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False

print(json.dumps([text for text in sys.argv[1:] if not met(Requirement(text))]))
"""


class Environment:
    """A virtual environment and what is recorded of its last set-up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = str(folder / "bin" / "python")
        self.record = folder / "setup.json"
        self.state = json.loads(self.record.read_text()) if self.record.exists() else {}

    def save(self, **entries: object) -> None:
        self.state |= entries
        self.record.write_text(json.dumps(self.state, indent=2) + "\n")

    def create(self) -> None:
        if self.folder.exists() and not self.record.exists():
            sys.exit(f"{self.folder} was not made by this script: move it away")
        say(f"creating {self.folder.name} with Python {sys.version.split()[0]}")
        self.state = {}
        command = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
        if subprocess.run(command).returncode != 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            sys.exit("Python's venv module does not work here (on Debian: install python3-venv)")
        self.save(made_by=sys.version)

    def pip(self, *arguments: str, log: Path | None = None) -> bool:
        """Whether `pip install` with these arguments worked; its output goes to `log`, if given."""
        print("  pip install", shlex.join(arguments), flush=True)
        command = [self.python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        if log is None and not sys.stdout.isatty():
            command.append("-qq")  # errors alone: a progress bar is for those who watch
        # cmake and ninja may be this Python's
        path = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        env = os.environ | {"PATH": os.pathsep.join(path)}
        with open(log, "w") if log else contextlib.nullcontext() as output:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=output)
        return done.returncode == 0

    def inherit(self) -> None:
        """Show the packages of the Python that runs this, after the environment's own.

        Not --system-site-packages, which shows the base installation's where that Python is
        itself in a virtual environment.
        """
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.check_output([self.python, "-c", ask], text=True).strip()
        folders = site.getsitepackages()
        if site.ENABLE_USER_SITE:
            folders.append(site.getusersitepackages())
        lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
        Path(own, "inherited.pth").write_text("\n".join(lines) + "\n")
        # venv's own copy (Python 3.11) is too old to build with, and would hide the newer one
        subprocess.run([self.python, "-m", "pip", "uninstall", "-qq", "--yes", "setuptools"])

    def unmet(self, requirements: Iterable[str]) -> list[str]:
        command = [self.python, "-c", REQUIREMENTS_PROBE, *requirements]
        found: list[str] = json.loads(subprocess.check_output(command, text=True))
        return found


def say(message: str) -> None:
    print(f"set-up: {message}", flush=True)


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def fingerprint(files: Iterable[Path], *extra: str) -> str:
    digest = hashlib.sha256("\0".join(extra).encode())
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def variables(*names: str) -> list[str]:
    return [f"{name}={os.environ.get(name, '')}" for name in names]


def has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


def own_torch() -> tuple[str, str | None] | None:
    """Version and CUDA version of this Python's PyTorch, where it is new enough."""
    found = subprocess.run([sys.executable, "-c", TORCH_PROBE], capture_output=True, text=True)
    if found.returncode != 0:
        return None
    version, cuda = json.loads(found.stdout.splitlines()[-1])
    return (version, cuda) if _release(version) >= OLDEST_TORCH else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def reaches_packages(environment: Environment) -> bool:
    """Whether pip finds packages here, from wherever it is told to look."""
    probe = ("--dry-run", "--ignore-installed", "--no-deps", "--retries=1", "--timeout=15")
    return environment.pip(*probe, "pybind11>=2.13", log=environment.folder / "probe.log")


def install_torch(environment: Environment, driver: bool) -> bool:
    """Install PyTorch and Triton by pip: the first of the choices that pip finds."""
    chosen = os.environ.get("KEXUE_TORCH")
    if chosen:
        return environment.pip(*chosen.split())
    if not driver and environment.pip(f"{TORCH}+cpu", TRITON):
        return True
    if not driver and sys.platform == "linux":
        say(
            "pip offers no CPU build of PyTorch, taking the default one: several GB of CUDA "
            "libraries. To spare them, stop and set PIP_EXTRA_INDEX_URL to PyTorch's index of "
            "CPU builds (its address is on PyTorch's installation page)"
        )
    return environment.pip(TORCH, TRITON)


def provide_torch(environment: Environment, driver: bool, online: bool) -> None:
    own = own_torch() if driver or not online else None
    if own is not None and (own[1] is not None or not online) and "KEXUE_TORCH" not in os.environ:
        say(f"using PyTorch {own[0]} of {sys.executable}")
        environment.inherit()
    elif not online:
        oldest = ".".join(map(str, OLDEST_TORCH))
        sys.exit(
            f"pip reaches no packages, and {sys.executable} has no PyTorch {oldest} or newer to "
            "use: connect, or set PIP_FIND_LINKS to a folder of wheels, or PYTHON to a Python "
            "that has them"
        )
    elif not install_torch(environment, driver):
        sys.exit("PyTorch could not be installed")


def install_carried_wheels(environment: Environment) -> None:
    folder = os.environ.get("KEXUE_WHEELS")
    if not folder:
        return
    wheels = sorted(str(path) for path in Path(folder).glob("*.whl"))
    if not wheels:
        sys.exit(f"KEXUE_WHEELS: there is no wheel in {folder}")
    if not environment.pip("--no-index", "--no-deps", *wheels):
        sys.exit(f"KEXUE_WHEELS: the wheels in {folder} could not be installed")


def prepare(environment: Environment) -> None:
    """PyTorch and every other requirement; records what a machine without a network lacks."""
    if not Path(environment.python).exists() or environment.state.get("made_by") != sys.version:
        environment.create()
    online = reaches_packages(environment)
    say("pip reaches packages" if online else "pip reaches no packages: using what is here")
    driver = has_nvidia_driver()
    provide_torch(environment, driver, online)
    install_carried_wheels(environment)
    project = pyproject()
    build = project["build-system"]["requires"]
    runtime = project["project"]["dependencies"]
    extras = project["project"]["optional-dependencies"]
    wanted = list(dict.fromkeys([*build, *runtime, *extras["test"], *extras["bench"]]))
    if online and not environment.pip(*wanted):
        sys.exit("the requirements in pyproject.toml could not be installed")
    missing = environment.unmet(wanted)
    needed = [*build, *runtime, *(r for r in extras["test"] if r.startswith(ESSENTIAL_FOR_TESTS))]
    if lacking := [requirement for requirement in missing if requirement in needed]:
        sys.exit(f"without a network, these must be here and are not: {', '.join(lacking)}")
    if missing:
        say(f"not installed here, and what needs it is left out: {', '.join(missing)}")
    environment.save(missing=missing)


def provide_extras(environment: Environment, names: list[str]) -> None:
    """Requirements of pyproject.toml's extras that are asked for by name."""
    extras = pyproject()["project"]["optional-dependencies"]
    missing = environment.unmet([requirement for name in names for requirement in extras[name]])
    if missing and not environment.pip(*missing):
        sys.exit(f"could not be installed: {', '.join(missing)}")


def build_project(environment: Environment, cuda: str) -> None:
    log = environment.folder / "build.log"
    say(f"building the extension and installing the project (minutes; log: {log})")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--verbose", "--editable")
    os.environ["KEXUE_BUILD_CUDA"] = cuda
    if not environment.pip(*options, ".", log=log):
        sys.exit(f"{_tail(log)}\nthe project could not be installed")
    ask = "from kexue_kernels import _extension; print(_extension.load().reason)"
    reason = subprocess.check_output([environment.python, "-c", ask], text=True).strip()
    if reason:
        say(f"{_tail(log)}\ngoing on without the extension: {reason}")


def project_fingerprint(cuda: str) -> str:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    return fingerprint(
        [ROOT / "setup.py", ROOT / "kexue_kernels" / "_version.py", *sources],
        repr(pyproject()["build-system"]),
        repr(pyproject()["project"]["scripts"]),
        cuda,
        *variables("KEXUE_CUDA_ARCHS", "CC", "CXX", "CFLAGS", "CXXFLAGS"),
    )


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def main() -> None:
    arguments = sys.argv[1:]
    if cpu_will_do := "--cpu" in arguments:
        arguments.remove("--cpu")
    folder, *extras = arguments or [".venv"]
    environment = Environment(Path(folder).resolve())
    requirements = fingerprint(
        [ROOT / "pyproject.toml", Path(__file__).resolve()],
        sys.version,
        *variables("KEXUE_TORCH", "KEXUE_WHEELS"),
    )
    if environment.state.get("requirements") != requirements:
        prepare(environment)
        environment.save(requirements=requirements)
    if extras:
        provide_extras(environment, extras)

    asked = os.environ.get("KEXUE_BUILD_CUDA", "auto")
    enough = [asked]
    if cpu_will_do and asked == "auto" and not has_nvidia_driver():
        enough = ["0", asked]
    if environment.state.get("project") not in map(project_fingerprint, enough):
        build_project(environment, enough[0])
        environment.save(project=project_fingerprint(enough[0]))
        say("ready")


if __name__ == "__main__":
    main()
