"""Results of analyzers in a lab: the bytes of their files, and their classes by name."""

import importlib
import tempfile
from pathlib import Path

from analyzers.lab.errors import LabError
from analyzers.results import Stored


def stored_bytes(value: Stored) -> bytes:
    """What `.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.safetensors"
        value.save(path)
        return path.read_bytes()


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
