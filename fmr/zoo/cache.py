"""What is made once and kept in the user's cache folder: there whole or not at all, and noticed where it is damaged.

The folder is `fmr/zoo` in XDG_CACHE_HOME, else in ~/.cache, and may be deleted at any time.
"""

import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from fmr.errors import ZooError

SEAL = "seal.json"
"""The file that is written last: the size and the checksum of every other."""

CHUNK = 1 << 22


def home() -> Path:
    """The folder in which the zoo keeps what it has converted."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "fmr" / "zoo"


def kept(name: str, made_of: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder with the files that `make` writes into the folder it is given, made anew only where it is not whole.

    made_of: what the files depend on; other ones are other files. Of several processes that ask at once, one makes it and
    the others wait. It is written beside its place and renamed when it is complete, so that no reader ever sees half of
    it; what a killed process left behind is removed by the next one that makes something of that name.
    """
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    folder = home() / f"{name}-{key}"
    if whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not whole(folder):
                _make(folder, name, make)
    except (OSError, SafetensorError) as error:
        raise ZooError(
            f"The zoo keeps {name} in {folder.parent}, which cannot be written ({error}). Make room there and allow "
            f"writing, or name another folder in the environment variable XDG_CACHE_HOME."
        ) from error
    return folder


def whole(folder: Path) -> bool:
    """Whether a folder has every file of its seal, each with the bytes that were written."""
    try:
        seal = json.loads((folder / SEAL).read_bytes())
        return bool(seal) and isinstance(seal, dict) and all(_mark(folder / file) == mark for file, mark in seal.items())
    except (OSError, ValueError):
        return False


def _make(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    """Write a folder beside its place, seal it, and put it there; the caller holds the lock of this name."""
    for left in folder.parent.glob(f".{name}-*.tmp"):
        shutil.rmtree(left)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        make(temporary)
        marks = {file.name: _mark(file) for file in sorted(temporary.iterdir())}
        (temporary / SEAL).write_text(json.dumps(marks))
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _mark(path: Path) -> list[int]:
    """The size of a file and a checksum that changes with any flipped bit; half a gigabyte takes a fraction of a second."""
    size = check = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, check = size + len(chunk), zlib.crc32(chunk, check)
    return [size, check]
