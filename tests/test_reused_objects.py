"""What test_packaging.py takes from the checkout's build instead of compiling it again."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import emulation
from tests.reused_objects import object_of

NINJA = """
rule cxx
  command = {command} -MD -MF $out.d
  depfile = $out.d
  deps = gcc
build one.o: cxx {source}/one.cpp
"""


def command(source: Path, *flags: str) -> list[str]:
    return [
        str(emulation.compiler()),
        *flags,
        f"-I{source}",
        "-o",
        "one.o",
        "-c",
        f"{source}/one.cpp",
    ]


@pytest.mark.packaging
def test_an_object_is_taken_only_where_it_would_come_out_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if emulation.compiler() is None or shutil.which("ninja") is None:
        pytest.skip("needs a C++ compiler and Ninja")
    source, build = tmp_path / "first/csrc", tmp_path / "first/build"
    other, elsewhere = tmp_path / "second/csrc", tmp_path / "second/build"
    for folder in (source, build, elsewhere):
        folder.mkdir(parents=True)
    (source / "one.h").write_text("inline int one() { return 1; }\n")
    (source / "one.cpp").write_text('#include "one.h"\nint two() { return 2 * one(); }\n')
    words = " ".join(command(source))
    (build / "build.ninja").write_text(NINJA.format(command=words, source=source))
    entry = {"command": words, "output": str(build / "one.o")}
    (build / "compile_commands.json").write_text(json.dumps([entry]))
    subprocess.run(["ninja", "-C", build], check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(source, other)
    monkeypatch.chdir(elsewhere)

    def taken(*flags: str) -> bool:
        wanted = [*command(other, *flags), "-MD", "-MT", "one.o", "-MF", "one.o.d"]
        found = object_of(build, wanted, source)
        assert found in (None, build / "one.o")
        return found is not None

    assert taken()
    assert not taken("-O1")
    (other / "one.h").write_text("inline int one() { return 3; }\n")
    assert not taken()
    shutil.copy(source / "one.h", other / "one.h")
    assert taken()
    later = (build / "one.o").stat().st_mtime + 10
    os.utime(source / "one.h", (later, later))  # changed since the object was made
    assert not taken()
