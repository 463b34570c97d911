"""Writing files whole or not at all, and reading back only what was written."""

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fmr.errors import StoreError
from fmr.nests import Hole

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

SCHEMA = 2

_CHUNK = 1 << 20
_LONGEST = 200
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NEW = _BINARY | os.O_RDWR | os.O_CREAT | os.O_EXCL
_READ = _BINARY | os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)


def named(path: str | os.PathLike[str]) -> Path:
    """The path that was given, if a system can take it; an empty one would be the working directory."""
    name: object = path
    try:
        name = os.fspath(path)
        good = isinstance(name, str) and b"\0" not in os.fsencode(name) and name
    except (UnicodeEncodeError, TypeError):
        good = ""
    if not good:
        shown = ascii(name) if len(ascii(name)) < _LONGEST else type(name).__name__
        raise StoreError(f"{shown} is no path. Expected the name of a file, as 'facts.fmr', or of a folder.")
    return Path(path)


def is_folder(path: Path) -> bool:
    """Whether there is a folder under a path; a path that no system takes is none."""
    with suppress(OSError):
        return path.is_dir()
    return False


def new_folder(path: str | os.PathLike[str]) -> Path:
    """A folder, made where there is none; a file of that name, or a place where none can be made, is an error."""
    place = named(path)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = "there is a file of that name" if place.exists() else _why(error)
        raise StoreError(f"{place} cannot be made ({told}). Expected a folder, or the name of a new one.") from None
    return place


@contextmanager
def replacing(path: str | os.PathLike[str], like: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends: a killed writer leaves the old file whole.

    It is written under a temporary name beside the target, flushed to disk and renamed; after an error it is removed,
    and what killed writers of this file left goes with the next one. The new file has the permissions of the old one, or
    of `like`; where the path is a link it stays one, and what it points to is replaced.
    """
    target = _target(path)
    temporary, handle = _begun(target, _mode(like or target))
    with ExitStack() as stack:
        stack.callback(os.close, handle)  # which holds the lock until the file has its name
        try:
            with os.fdopen(os.dup(handle), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if fcntl is None:  # an open file is not renamed there
                stack.close()
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    _flush_folder(target.parent)
    _remove_leftovers(target)


def _target(path: str | os.PathLike[str]) -> Path:
    """The file to replace: where the path is a link, the one at its end."""
    target = named(path)
    if os.path.islink(target):
        target = Path(os.path.realpath(target))
    with suppress(OSError):
        if not stat.S_ISREG(os.stat(target).st_mode):
            raise StoreError(f"{target} cannot be written: it is no regular file. Expected a new name, or that of a file.")
    return target


def _mode(path: Path) -> int | None:
    """The permissions of a file; None where there is none."""
    with suppress(OSError):
        return stat.S_IMODE(os.stat(path).st_mode)
    return None


def _begun(target: Path, mode: int | None) -> tuple[Path, int]:
    """A new file beside the target, open and locked, so that another writer does not take it for one that was left."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            handle = os.open(temporary, _NEW, 0o666 if mode is None else 0o600)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{target} cannot be written: there is no folder {target.parent}. Create it first.") from None
        except OSError as error:
            raise StoreError(f"{str(target)!r} cannot be written ({_why(error)}). Expected a path to a new file.") from None
        if mode is not None:
            with suppress(OSError):
                os.chmod(temporary, mode)
        if fcntl is None or (_locked(handle, fcntl.LOCK_EX), temporary.exists())[1]:
            return temporary, handle
        os.close(handle)


def _locked(handle: int, how: int) -> bool:
    """Whether an open file could be locked; some systems for files on a network have no locks."""
    with suppress(OSError):
        fcntl.flock(handle, how)
        return True
    return False


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of a file left beside it: those that still write hold a lock."""
    left = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    if fcntl is not None:
        with suppress(OSError), os.scandir(target.parent) as entries:
            for name in [entry.path for entry in entries if left.fullmatch(entry.name)]:
                _remove_left(name)


def _remove_left(path: str) -> None:
    with suppress(OSError):
        handle = os.open(path, _READ | os.O_RDWR | os.O_NOFOLLOW)
        try:
            if _locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                os.unlink(path)
        finally:
            os.close(handle)


def _flush_folder(folder: Path) -> None:
    """Have the renaming itself reach the disk, where the system can do that for a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader, at any moment, finds the old content or the new."""
    with replacing(path) as file:
        file.write(data)


def opened(path: str | os.PathLike[str], expected: str) -> BinaryIO:
    """A regular file, open for reading; a pipe or a device, which may never end, is an error."""
    path = named(path)
    try:
        handle = os.open(path, _READ)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(0, "it is no regular file")
    except OSError as error:
        raise StoreError(unreadable(path, expected, error)) from None
    return os.fdopen(handle, "rb")


def read_whole(path: str | os.PathLike[str], expected: str) -> bytes:
    """The text of a file; where there is none, one clear error that says what was expected."""
    with opened(path, expected) as file, understood(os.fspath(path)):
        try:
            return read_text(file)
        except OSError as error:
            raise StoreError(unreadable(path, expected, error)) from None


def read_text(file: BinaryIO, length: int | None = None) -> bytes:
    """The bytes of a text from where a file stands, or so many of them.

    A file may say that it is larger than any memory and hold nothing: its holes read as zeros, which no text has.
    """
    chunks, left = [], length
    while left is None or left > 0:
        chunk = file.read(_CHUNK if left is None else min(_CHUNK, left))
        if not chunk:
            break
        if b"\0" in chunk:
            raise ValueError("zeros where text was expected")
        chunks.append(chunk)
        left = None if left is None else left - len(chunk)
    return b"".join(chunks)


def unreadable(path: str | os.PathLike[str], expected: str, error: OSError) -> str:
    """The message for a path that does not open."""
    return f"{os.fspath(path)} cannot be read ({_why(error)}). Expected {expected}; check the path, or save it again."


def _why(error: OSError) -> str:
    return error.strerror or str(error)


@contextmanager
def understood(source: str) -> Iterator[None]:
    """Turn whatever goes wrong while foreign or damaged content is taken apart into one clear error."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        raise StoreError(
            f"{source} is not a file of fmr, or it is damaged ({type(error).__name__}: {str(error)[:80]}). Expected what "
            f"fmr writes with schema {SCHEMA}; save it again from the run."
        ) from None


def digest(data: bytes | memoryview) -> str:
    """A checksum that changes with any byte."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def seal(kind: str, body: dict[str, Any]) -> bytes:
    """A body as JSON under its kind, its schema version and its checksum."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    form = f"fmr.{kind}"
    return json.dumps({"format": form, "schema": SCHEMA, "digest": _mark(form, SCHEMA, text), "body": text}).encode()


def _mark(form: str, schema: int, text: str) -> str:
    return digest(f"{form} {schema} {text}".encode("utf-8", "surrogatepass"))


def unseal(kind: str, data: bytes, source: str) -> dict[str, Any]:
    """The body of a sealed file; anything else is one clear error."""
    with understood(source):
        outer = json.loads(data)
        form, schema, mark, text = outer["format"], outer["schema"], outer["digest"], outer["body"]
    if form != f"fmr.{kind}":
        raise StoreError(f"{source} holds {printed(form)}, expected 'fmr.{kind}'. Load it with the function for its kind.")
    if schema.__class__ is not int or schema > SCHEMA:
        raise StoreError(f"{source} has schema {printed(schema)}, this version of fmr reads schema {SCHEMA}. Upgrade fmr.")
    if not isinstance(text, str) or _mark(form, schema, text) != mark:
        raise StoreError(f"{source} is damaged: its checksum does not match its content. Save it again from the run.")
    if schema < SCHEMA:
        raise StoreError(
            f"{source} has schema {schema}, this version of fmr reads schema {SCHEMA}. Save it again from a run."
        )
    with understood(source):
        body: dict[str, Any] = json.loads(text)
    return body


_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)

_NUMBERS = "biufc"
"""The kinds of numpy's arrays of numbers."""

_LONGEST = 200
"""Characters of an argument that is kept as the text it prints."""


def encode(value: Any) -> Any:
    """A non-tensor argument of an op as JSON; what has no JSON form becomes its printed form, marked as such."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if value - value == 0 else {"float": repr(float(value))}
    if isinstance(value, (tuple, list)):
        return {"list" if type(value) is list else "tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, Hole):
        return {"hole": value.at}
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return encode(value.item())
    if isinstance(value, np.ndarray) and value.dtype.kind in _NUMBERS:
        return {"array": [value.dtype.str, list(value.shape), [encode(item) for item in value.ravel().tolist()]]}
    if isinstance(value, _TORCH):
        return {"torch": [type(value).__name__, str(value)]}
    return {"printed": printed(value)}


def printed(value: Any) -> str:
    """What an object prints, the same in every process: without its address in memory, and no longer than a line or two."""
    try:
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(_begin_of(value)))
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _begin_of(value: Any) -> Any:
    """The value, or as much of a long nest as can be seen in its printed form."""
    if value.__class__ is list or value.__class__ is tuple:
        return value.__class__([_begin_of(item) for item in value[:_LONGEST]])
    return value


def decode(value: Any) -> Any:
    """The value that was encoded; one that had no JSON form comes back as the text it printed."""
    if isinstance(value, list):
        raise ValueError("a list that does not say its kind")
    if not isinstance(value, dict):
        return value
    ((kind, item),) = value.items()
    match kind:
        case "float":
            return float(item)
        case "tuple":
            return tuple(decode(part) for part in item)
        case "list":
            return [decode(part) for part in item]
        case "dict":
            return {decode(key): decode(part) for key, part in item}
        case "slice":
            return slice(*(decode(part) for part in item))
        case "ellipsis":
            return Ellipsis
        case "complex":
            return complex(*(decode(part) for part in item))
        case "hole":
            return Hole(str(item))
        case "array":
            return _array(*item)
        case "torch":
            return torch.device(item[1]) if item[0] == "device" else _of_torch(item[1])
        case "printed":
            return str(item)
    raise ValueError(f"{kind} is no kind of argument")


def _array(dtype: str, shape: list[int], items: list[Any]) -> Any:
    """An array of numbers, as numpy has it."""
    kind = np.dtype(dtype)
    if kind.kind not in _NUMBERS:
        raise StoreError(f"{dtype} is no dtype of numbers. Expected an array that fmr wrote.")
    return np.array([decode(item) for item in items], kind).reshape(shape)


def _of_torch(name: str) -> Any:
    """A dtype, layout or memory format by its name; no other attribute of torch is ever taken from a file."""
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, _TORCH):
        raise StoreError(f"{name} is no dtype, layout or memory format of torch {torch.__version__}. Upgrade torch.")
    return found
