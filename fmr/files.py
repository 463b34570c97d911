"""Writing files whole or not at all, and reading back only what was written."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fmr.errors import StoreError

SCHEMA = 1


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it: a killed writer leaves the old file whole."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def digest(data: bytes) -> str:
    """A checksum that changes with any byte."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def seal(kind: str, body: dict[str, Any]) -> bytes:
    """A body as JSON under its kind, its schema version and its checksum."""
    text = json.dumps(body, separators=(",", ":"))
    return json.dumps({"format": f"fmr.{kind}", "schema": SCHEMA, "digest": digest(text.encode()), "body": text}).encode()


def unseal(kind: str, data: bytes, source: str) -> dict[str, Any]:
    """The body of a sealed file; anything else is one clear error."""
    try:
        outer = json.loads(data)
        form, schema, mark, text = outer["format"], outer["schema"], outer["digest"], outer["body"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{source} is not a file of fmr, or it is damaged ({type(error).__name__}). Expected JSON with the fields "
            f"format, schema, digest and body; save it again from the run."
        ) from None
    if form != f"fmr.{kind}":
        raise StoreError(f"{source} holds {form!r}, expected 'fmr.{kind}'. Load it with the function for its kind.")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise StoreError(f"{source} has schema {schema!r}, this version of fmr reads up to {SCHEMA}. Upgrade fmr.")
    if not isinstance(text, str) or digest(text.encode("utf-8", "surrogatepass")) != mark:
        raise StoreError(f"{source} is damaged: its checksum does not match its content. Save it again from the run.")
    body: dict[str, Any] = json.loads(text)
    return body


_PLAIN = (str, int, bool, type(None))
_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)


def encode(value: Any) -> Any:
    """A non-tensor argument of an op as JSON; what has no JSON form becomes its printed form, marked as such."""
    if isinstance(value, float):
        return value if value - value == 0 else {"float": repr(value)}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (tuple, list)):
        return {type(value).__name__ if type(value) in (tuple, list) else "tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, _TORCH):
        return {"torch": [type(value).__name__, str(value)]}
    return {"printed": repr(value)}


def decode(value: Any) -> Any:
    """The value that was encoded; one that had no JSON form comes back as the text it printed."""
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
            return complex(*item)
        case "torch":
            return torch.device(item[1]) if item[0] == "device" else getattr(torch, item[1].removeprefix("torch."))
    return item
