"""The repository as a newcomer meets it: documents that run and agree, an import that is light."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kexue_kernels as kk

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Folders of one machine, and addresses that belong in a user's own configuration. Written so
# that this file does not hold what it looks for.
FOLDERS = r"(?<![\w.])/(?:work|farm|root|home)/\w|/tmp/v[e]nv"
PRIVATE = re.compile(FOLDERS + r"|(?:p[y]pi|p[y]torch)\.org/")
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".json",
    ".yml",
    ".cpp",
    ".cu",
    ".cuh",
    ".h",
    ".txt",
    ".cmake",
    ".in",
    "",
}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def tracked() -> list[Path]:
    """Files under version control and new ones that are not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def run_python(program: str) -> str:
    """What `program` prints in a fresh interpreter that finds the package in this checkout."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if PYTHON_BLOCK.search(page.read_text())],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_examples_in_the_documents_run(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "example"}
    for block in PYTHON_BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), namespace)
    assert namespace["kk"] is kk
    assert "h" in namespace


def test_readme_example_learns_its_decay() -> None:
    (block,) = PYTHON_BLOCK.findall(read("README.md"))
    namespace: dict[str, object] = {}
    exec(block, namespace)
    grad = namespace["layer"].logit.grad  # type: ignore[attr-defined]
    assert grad.isfinite().all()
    assert grad.abs().max() > 0


def test_readme_names_the_two_commands_and_make_has_them() -> None:
    readme = read("README.md")
    for target in ("demo", "test"):
        assert f"$ make {target}" in readme
    for target in ("help", "setup", "demo", "test", "bench", "gpu", "docs", "format", "clean"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert "make test" in lines


def test_version_is_one() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == kk.__version__
    assert 'attr = "kexue_kernels._version.__version__"' in read("pyproject.toml")


def test_package_is_typed_and_licensed() -> None:
    assert (ROOT / "kexue_kernels" / "py.typed").exists()
    assert "Apache License" in read("LICENSE")
    assert 'license = "Apache-2.0"' in read("pyproject.toml")


def test_measurements_in_the_readme_are_those_of_the_results() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import measured
text = measured.README.read_text()
assert measured.updated(text) == text, "run scripts/measured.py"
"""
    run_python(program)


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "kexue_kernels").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_no_file_names_a_private_path_or_an_index() -> None:
    found = []
    for path in tracked():
        if path.suffix not in TEXT:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if PRIVATE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_import_is_light() -> None:
    heavy = ["triton", "matplotlib", "typer", "rich", "kexue_kernels._C", "kexue_kernels.cli"]
    program = f"""
import sys, torch
before = set(sys.modules)
import kexue_kernels
new = set(sys.modules) - before
print([name for name in {heavy} if name in new])
"""
    assert run_python(program).strip() == "[]"


def test_import_runs_no_other_program() -> None:
    program = """
import subprocess, sys, torch
started = []
sys.addaudithook(
    lambda event, arguments: started.append(arguments[0])
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn") else None
)
import kexue_kernels
print(started)
"""
    assert run_python(program).strip() == "[]"


@pytest.mark.parametrize(
    ("blocked", "backend", "available", "words"),
    [
        ("triton", "triton", False, "Triton is not installed"),
        ("kexue_kernels._C", "cpu", True, "blocked PyTorch"),
        ("kexue_kernels._C", "cuda", False, "is not built"),
    ],
)
def test_works_without(blocked: str, backend: str, available: bool, words: str) -> None:
    program = f"""
import sys
sys.modules[{blocked!r}] = None
import torch, kexue_kernels as kk
a = torch.rand(2, 50, 3, requires_grad=True)
b = torch.randn(2, 50, 3, requires_grad=True)
h = kk.linear_scan(a, b)
torch.testing.assert_close(h, kk.reference.linear_scan(a, b))
h.sum().backward()
assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0
status = kk.backends()[{backend!r}]
assert status.available is {available}, status
print(status.reason)
"""
    assert words in run_python(program)
