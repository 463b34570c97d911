"""Results on disk: one safetensors file, numbers as tensors and the rest as JSON in its header; nothing is executed."""

import json
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from analyzers.protocol import AnalyzerError
from fmr.disk.files import decode, encode, write_whole
from fmr.errors import number_of

if TYPE_CHECKING:
    from typing import Self


class Stored:
    """A frozen dataclass of arrays, tensors and plain values that is written to one file and read again."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to one safetensors file, whole or not at all.

        >>> effects.save("patching.safetensors")
        """
        tensors: dict[str, Tensor] = {}
        plain = {field.name: _taken(getattr(self, field.name), field.name, tensors) for field in fields(self)}  # type: ignore[arg-type]
        told = json.dumps({"result": type(self).__name__, "values": plain})
        write_whole(path, save(tensors, {"fmr": told}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Self":
        """Read a result that was saved.

        >>> effects.save("patching.safetensors")
        >>> analyzers.Effects.load("patching.safetensors").strongest(1) == effects.strongest(1)
        True
        """
        try:
            with safe_open(os.fspath(path), "pt") as file:
                told = json.loads((file.metadata() or {})["fmr"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise AnalyzerError(
                f"{os.fspath(path)} holds no result of fmr ({error}). Expected what .save(path) wrote."
            ) from error
        if told["result"] != cls.__name__:
            raise AnalyzerError(
                f"{os.fspath(path)} holds a {told['result']}, expected a {cls.__name__}: {told['result']}.load."
            )
        return cls(**{name: _given(value, tensors) for name, value in told["values"].items()})


def told_skip(skip: int) -> str:
    """How many tokens were left out, in words; nothing where none was."""
    return f" without the first {number_of(skip, 'token') if skip > 1 else 'token'} of each" if skip else ""


def _taken(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """A value in JSON, with names in place of the tensors and arrays in it."""
    if isinstance(value, (Tensor, np.ndarray)):
        tensors[at] = torch.as_tensor(value).detach().cpu().contiguous()
        return {"array" if isinstance(value, np.ndarray) else "tensor": at}
    if isinstance(value, dict):
        return {"dict": [[name, _taken(item, f"{at}/{name}", tensors)] for name, item in value.items()]}
    return {"plain": encode(value)}


def _given(told: Any, tensors: dict[str, Tensor]) -> Any:
    (kind, held), *_ = told.items()
    if kind in ("array", "tensor"):
        return tensors[held].numpy() if kind == "array" else tensors[held]
    return {name: _given(item, tensors) for name, item in held} if kind == "dict" else decode(held)
