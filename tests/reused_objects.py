"""A compiler launcher that spares a second build what the checkout's own has compiled.

    reused_objects.py BUILD COMPILER ARGUMENT ...

BUILD is a Ninja build of this checkout's csrc. Where it made the same object by the same command
from files with the same contents, that object is copied; else the compiler runs.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "csrc"
FOR_NINJA = {"-MD": 1, "-MT": 2, "-MF": 2}  # words of options that compile_commands.json leaves out


def object_of(build: Path, command: list[str], source: Path = SOURCE) -> Path | None:
    """BUILD's object for a command that runs in the current folder, if it would come out alike."""
    if "-c" not in command or "-o" not in command:
        return None
    file, target = (Path(command[command.index(option) + 1]) for option in ("-c", "-o"))
    own = next((folder for folder in file.parents if folder.name == "csrc"), None)
    made = build / target
    if own is None or not made.exists() or _recorded(build, made) is None:
        return None
    places = {str(source): str(own), str(build): str(Path.cwd())}
    recorded = [_moved(word, places) for word in _recorded(build, made) or []]
    if recorded != _plain(command):
        return None
    used = _used(build, target)
    return made if used and all(_alike(path, made, places) for path in used) else None


def _recorded(build: Path, made: Path) -> list[str] | None:
    database = build / "compile_commands.json"
    entries = json.loads(database.read_text()) if database.exists() else []
    return next((shlex.split(e["command"]) for e in entries if e.get("output") == str(made)), None)


def _plain(command: list[str]) -> list[str]:
    words, kept = list(command), []
    while words:
        count = FOR_NINJA.get(words[0], 0)
        if not count:
            kept.append(words[0])
        del words[: count or 1]
    return kept


def _moved(text: str, places: dict[str, str]) -> str:
    for old, new in places.items():
        text = text.replace(old, new)
    return text


def _used(build: Path, target: Path) -> list[Path]:
    """The source and every header that went into an object, as Ninja recorded them."""
    ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    if ninja is None:
        return []
    command = (ninja, "-C", str(build), "-t", "deps", str(target))
    listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [Path(line.strip()) for line in listed if line.startswith("    ")]


def _alike(path: Path, made: Path, places: dict[str, str]) -> bool:
    """Unchanged since the object was made, and in the second build the same."""
    other = Path(_moved(str(path), places))
    if not path.exists() or path.stat().st_mtime > made.stat().st_mtime:
        return False
    return other == path or (other.exists() and other.read_bytes() == path.read_bytes())


def main() -> None:
    build, *command = sys.argv[1:]
    if found := object_of(Path(build), command):
        shutil.copyfile(found, command[command.index("-o") + 1])
    else:
        os.execvp(command[0], command)


if __name__ == "__main__":
    main()
