"""Results of analyzers in a lab: their files, and their classes by name."""

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

from analyzers.lab.errors import LabError
from analyzers.results import Stored


def stored_files(value: Stored) -> dict[str, bytes]:
    """What `.save` writes: one file under an empty name, or those of a folder by their paths in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        value.save(path)
        if path.is_file():
            return {"": path.read_bytes()}
        inside = sorted(one for one in path.rglob("*") if one.is_file())
        return {one.relative_to(path).as_posix(): one.read_bytes() for one in inside}


def without_form(data: bytes) -> str | None:
    """What of a result its file has no form for and keeps as the words that it prints; None where all of it has one."""
    if data[8:9] != b"{":
        return None
    told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {}).get("fmr")
    return _printed(json.loads(told).get("values")) if told is not None else None


def _printed(told: Any) -> str | None:
    if isinstance(told, dict) and [*told] == ["printed"]:
        return str(told["printed"])
    inside = told.values() if isinstance(told, dict) else told if isinstance(told, list) else ()
    return next((found for item in inside if (found := _printed(item)) is not None), None)


def class_named(name: str) -> type[Stored]:
    """The class of a result: one of this library, or one of the user's that was imported; nothing else is imported."""
    module = name.rpartition(".")[0]
    if module.startswith("analyzers."):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise LabError(
                f"{name} is no result of this version of fmr ({error}). Its file is whole; read it as safetensors."
            ) from None
    classes, found = [Stored], list[type[Stored]]()
    while classes:
        one = classes.pop()
        classes += one.__subclasses__()
        found.append(one)
    for one in found:
        if f"{one.__module__}.{one.__qualname__}" == name:
            return one
    raise LabError(f"{name} is not known here. Import the module that defines it; its file is whole, and is safetensors.")
