"""Wheel and sdist: what they hold, and that they install and run where there is little else."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parent.parent
NOT_SOURCE = (".*", "build", "dist", "site", "out", "*.egg-info", "__pycache__", "*.so")
EXTENSION = "kexue_kernels/_C" + sysconfig.get_config_var("EXT_SUFFIX")
# The same source and headers by the same command give the same object: the build that these tests
# run in has it already, as `make test` makes it.
REUSE = ";".join(
    (sys.executable, "-S", str(ROOT / "tests/reused_objects.py"), str(ROOT / "build/editable"))
)
NO_COMPILER = {"CC": "/nonexistent", "CXX": "/nonexistent", "CUDACXX": "/nonexistent", "PATH": ""}
SHOW_BACKENDS = """
import torch, kexue_kernels as kk
print(kk.__file__)
for status in kk.backends().values():
    print(status.reason)
assert kk.linear_scan(torch.full((2,), 0.5), torch.ones(1, 3, 2))[0, 2].tolist() == [1.75, 1.75]
"""


def run(
    *command: object, cwd: Path, ok: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that knows nothing of the checkout."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "KEXUE_BUILD_CUDA": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (result.returncode == 0) == ok, result.stdout
    return result


def copy_source(to: Path) -> Path:
    return shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*NOT_SOURCE))


def clean_environment(wheel: Path, at: Path) -> Path:
    """A Python with the wheel, and the test's own installation for its dependencies."""
    run(sys.executable, "-m", "venv", "--without-pip", at, cwd=at.parent)
    python = at / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=at.parent)
    packages = next(at.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def build_wheel(source: Path, **environment: str) -> tuple[Path, str]:
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation")
    result = run(*pip, "--wheel-dir", source.parent, source, cwd=source.parent, **environment)
    return next(source.parent.glob("*.whl")), result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it."""
    at = tmp_path_factory.mktemp("built")
    source = copy_source(at / "source")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", at, source)
    run(*build, cwd=at, CMAKE_CXX_COMPILER_LAUNCHER=REUSE)
    return at


def test_the_sdist_has_what_a_build_needs(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_the_wheel_has_the_extension_and_its_types(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert {EXTENSION, "kexue_kernels/py.typed", "kexue_kernels/__init__.py"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert all(top == "kexue_kernels" or top.endswith(".dist-info") for top in tops)


def test_the_wheel_passes_selfcheck_in_a_clean_environment(built: Path, tmp_path: Path) -> None:
    python = clean_environment(next(built.glob("*.whl")), tmp_path / "venv")
    shown = run(python, "-c", SHOW_BACKENDS, cwd=tmp_path).stdout
    assert str(tmp_path) in shown
    assert "C++ extension (" in shown
    assert "the C++ extension was built without CUDA" in shown
    run(python, "-m", "kexue_kernels", "selfcheck", cwd=tmp_path)


def test_the_extension_links_no_libtorch(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        library = wheel.extract(EXTENSION, tmp_path)
    needed = run("ldd", library, cwd=tmp_path).stdout
    assert "libc.so" in needed
    assert "torch" not in needed
    assert "c10" not in needed


def test_without_a_compiler(tmp_path: Path) -> None:
    wheel, log = build_wheel(copy_source(tmp_path / "source"), **NO_COMPILER)
    assert "WARNING: installing without kexue_kernels._C" in log
    assert EXTENSION not in zipfile.ZipFile(wheel).namelist()
    python = clean_environment(wheel, tmp_path / "venv")
    shown = run(python, "-c", SHOW_BACKENDS, cwd=tmp_path).stdout
    assert str(tmp_path) in shown
    assert "blocked PyTorch, slower: the C++ extension is not built" in shown
    run(python, "-m", "kexue_kernels", "selfcheck", cwd=tmp_path)
    assert "is not built" in run(python, "-m", "kexue_kernels", "info", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"KEXUE_BUILD_CUDA": "1", **NO_COMPILER}, "the build with KEXUE_BUILD_CUDA=1 failed"),
        ({"KEXUE_BUILD_CUDA": "yes"}, "KEXUE_BUILD_CUDA: expected one of"),
    ],
    ids=["cuda required, absent", "unknown value"],
)
def test_a_build_that_can_not_be_had_is_an_error(
    setting: dict[str, str], message: str, tmp_path: Path
) -> None:
    source = copy_source(tmp_path / "source")
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    assert message in run(*build, cwd=source, ok=False, **setting).stdout
