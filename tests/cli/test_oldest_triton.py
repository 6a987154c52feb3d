"""The oldest Triton that is supported compiles the kernels too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = "3.6.0"
ROOT = Path(__file__).parents[2]


@pytest.mark.packaging
def test_the_oldest_triton_compiles_the_kernels(tmp_path: Path) -> None:
    """Those for bfloat16, on sm_90: all of them take minutes."""
    where = tmp_path / "packages"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps")
    subprocess.run([*pip, "--target", where, f"triton=={OLDEST}"], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{where}:{ROOT}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    version = "import triton; print(triton.__version__)"
    found = subprocess.check_output([sys.executable, "-c", version], env=environment, text=True)
    assert found.strip() == OLDEST
    inspect = (sys.executable, "-m", "kexue_kernels", "inspect", "--arch", "sm_90", "--json")
    done = subprocess.run(
        [*inspect, "--kernel", "bfloat16"], env=environment, stdout=subprocess.PIPE, text=True
    )
    cards = [card for card in json.loads(done.stdout) if card["backend"] == "triton"]
    assert {card["op"] for card in cards} >= {"linear_scan", "selective_scan"}
    assert len(cards) >= 16
    assert done.returncode == 0, [(c["name"], c["problems"], c["error"]) for c in cards]
