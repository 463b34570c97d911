"""Values as JSON with files beside it: tensors in safetensors, figures as PNG, results of analyzers in their own files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from analyzers.lab.errors import LabError
from analyzers.lab.frames import frame_of, is_frame, told_of_frame
from analyzers.lab.identity import Moment
from analyzers.lab.picture import Picture, png_of
from analyzers.lab.stored import class_named, stored_files, without_form
from analyzers.results import Stored
from fmr.disk.files import decode, digest, encode
from fmr.disk.tensors import bytes_of

KEPT = "numbers, text, lists, dicts, tensors, arrays, data frames, figures and results of analyzers"
NUMBERS = "biufc"
DEEPEST = 100
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, slice, type(...))
REMEDIES = {
    "asdict": "dataclasses.asdict(value)",
    "_asdict": "value._asdict()",
    "isoformat": "value.isoformat()",
    "to_dict": "value.to_dict()",
    "tolist": "value.tolist()",
    "name": "its name",
}


class Packed(NamedTuple):
    """A value as JSON, the files that it speaks of, by name, and the models in it as they were."""

    told: Any
    files: dict[str, bytes]
    models: tuple[Moment, ...] = ()


def pack(
    value: Any, name: str, code: Callable[[Any], str] | None = None, moment: Callable[[nn.Module], Moment] = Moment
) -> Packed:
    """A value in a form that outlives the library; what has none is an error that says where it is.

    >>> pack({"loss": 0.5, "logits": torch.zeros(3)}, "result").files.keys()
    dict_keys(['result.safetensors'])

    code: tells the code of a function; with it, functions and models may be in the value, and come back as words. moment:
    tells a model as it is now.
    """
    packer = _Packer(name, code, moment)
    told = packer.take(value, "")
    if packer.tensors:
        packer.files[f"{name}.safetensors"] = save_tensors(packer.tensors)
    return Packed(told, packer.files, tuple(packer.models))


def renamed(told: Any, words: Mapping[str, str]) -> Any:
    """JSON with other words for models."""
    if isinstance(told, list):
        return [renamed(item, words) for item in told]
    if isinstance(told, dict):
        return {key: words.get(item, item) if key == "model" else renamed(item, words) for key, item in told.items()}
    return told


def unpack(told: Any, name: str, read: Callable[[str], bytes], folder: Path) -> Any:
    """The value that was packed; `read` gives the bytes of a file that is whole, and `folder` is where these lie."""
    return _Unpacker(name, read, folder).give(told)


class _Packer:
    """What was found on the way through a nest."""

    def __init__(self, name: str, code: Callable[[Any], str] | None, moment: Callable[[nn.Module], Moment]) -> None:
        self.name, self.code, self.moment = name, code, moment
        self.tensors: dict[str, Tensor] = {}
        self.files: dict[str, bytes] = {}
        self.models: list[Moment] = []
        self._inside: list[int] = []

    def take(self, value: Any, at: str) -> Any:
        """A value in JSON."""
        if isinstance(value, PLAIN) and not isinstance(value, Tensor):
            return encode(value)
        if isinstance(value, np.generic) and value.dtype.kind in "biufcU":
            return encode(value.item())
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, at)}
        if isinstance(value, np.ndarray):
            return self._array(value, at)
        if is_frame(value):
            return told_of_frame(
                value, lambda part, where: self.take(part, f"{at}{where}"), lambda why: self.refuse(value, at, why)
            )
        if isinstance(value, Stored):
            return {"result": self._result(value, at)}
        if (png := png_of(value)) is not None:
            return {"picture": self._file(png, at, "png")}
        if isinstance(value, os.PathLike):
            return {"path": os.fspath(value)}
        if self.code is not None and isinstance(value, nn.Module):
            self.models.append(self.moment(value))
            return {"model": self.models[-1].word}
        return self._container(value, at)

    def _container(self, value: Any, at: str) -> Any:
        if id(value) in self._inside:
            raise self.refuse(value, at, "It holds itself; return what is in it once")
        if len(self._inside) == DEEPEST:
            raise self.refuse(value, f"{at[:30]}...", f"It lies deeper than {DEEPEST} levels; return it as a flat list")
        self._inside.append(id(value))
        try:
            if type(value) in (list, tuple, torch.Size):
                items = [self.take(item, f"{at}[{n}]") for n, item in enumerate(value)]
                return {"list" if type(value) is list else "tuple": items}
            if isinstance(value, (set, frozenset)):
                return {"set": sorted((self.take(item, f"{at}{{}}") for item in value), key=json.dumps)}
            if isinstance(value, Mapping):
                return {"dict": [[self.take(k, f"{at}.keys"), self.take(v, f"{at}[{k!r}]")] for k, v in value.items()]}
        finally:
            self._inside.pop()
        if self.code is not None and callable(value):
            return {"code": self.code(value)}
        raise self.refuse(value, at)

    def _tensor(self, value: Tensor, at: str) -> dict[str, Any]:
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise self.refuse(value, at, "It is not dense; return value.to_dense()")
        if value.is_meta:
            raise self.refuse(value, at, "It lies on the meta device and has no numbers; return its shape")
        flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().clone()
        where = unused(at or "value", self.tensors)
        self.tensors[where] = kept = torch.view_as_real(flat) if flat.is_complex() else flat
        return {"dtype": str(value.dtype), "shape": list(value.shape), "at": where, "digest": digest(bytes_of(kept))}

    def _array(self, value: Any, at: str) -> Any:
        if value.dtype.kind == "U":
            return {"words": [list(value.shape), [str(word) for word in value.ravel()]]}
        if value.dtype.kind not in NUMBERS or value.dtype.itemsize > 16 or value.dtype == np.longdouble:
            raise self.refuse(value, at, f"Its dtype is {value.dtype}; return value.tolist()")
        native = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("="), copy=True).reshape(value.shape)
        return {"array": self._tensor(torch.from_numpy(native), at)}

    def _result(self, value: Stored, at: str) -> dict[str, Any]:
        kind, files = type(value), stored_files(value)
        lost = next((found for data in files.values() if (found := without_form(data)) is not None), None)
        if lost is not None:
            raise self.refuse(value, at, f"It holds {lost}, which its file would keep as words alone; keep its numbers")
        stem = self._stem(at) + (".safetensors" if "" in files else "")
        named = {f"{stem}/{name}" if name else stem: data for name, data in files.items()}
        self.files |= named
        return {
            "file": stem,
            "parts": [[name, digest(data)] for name, data in named.items()],
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "says": repr(value),
        }

    def _file(self, data: bytes, at: str, end: str) -> dict[str, Any]:
        name = f"{self._stem(at)}.{end}"
        self.files[name] = data
        return {"file": name, "digest": digest(data)}

    def _stem(self, at: str) -> str:
        """A name for a file that is not taken, by the place of what is in it."""
        inner = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in at).strip(
            "-"
        )[:60]
        stem = f"{self.name}-{inner}" if inner else f"{self.name}-value"
        return unused(stem, {one.partition("/")[0].partition(".")[0] for one in self.files})

    def refuse(self, value: Any, at: str, why: str = "") -> LabError:
        """The error for a value that cannot be kept."""
        kind = type(value)
        known = next((say for name, say in REMEDIES.items() if hasattr(value, name)), None)
        if isinstance(value, nn.Module):
            known = "value.state_dict()"
        elif hasattr(value, "figure"):
            known = "value.figure"
        elif hasattr(value, "__dataclass_fields__"):
            known = REMEDIES["asdict"]
        verb = "Return" if self.code is None else "Give"
        remedy = why or f"{verb} {known}" if why or known else f"{verb} what of it counts as these"
        return LabError(
            f"{self.name}{at} is a {kind.__module__}.{kind.__qualname__}, which a lab cannot keep. Expected {KEPT}. "
            f"{remedy}."
        )


def unused(name: str, taken: Container[str]) -> str:
    """The name, or the first of name-2, name-3, ... that is not taken."""
    return name if name not in taken else next(one for n in count(2) if (one := f"{name}-{n}") not in taken)


class _Unpacker:
    def __init__(self, name: str, read: Callable[[str], bytes], folder: Path) -> None:
        self.name, self.read, self.folder = name, read, folder
        self._tensors: dict[str, Tensor] | None = None

    def give(self, told: Any) -> Any:
        """The value that JSON tells of."""
        if not isinstance(told, dict):
            return told
        ((kind, held),) = told.items()
        match kind:
            case "list":
                return [self.give(item) for item in held]
            case "tuple":
                return tuple(self.give(item) for item in held)
            case "set":
                return {self.give(item) for item in held}
            case "dict":
                return {self.give(key): self.give(item) for key, item in held}
            case "tensor":
                return self._tensor(held)
            case "array":
                return self._tensor(held).numpy()
            case "words":
                return np.array(held[1], dtype=str).reshape(held[0])
            case "frame":
                return frame_of(held, self.give)
            case "picture":
                return Picture(self.read(held["file"]))
            case "path":
                return Path(held)
            case "result":
                for name, _ in held["parts"]:
                    self.read(name)
                return class_named(held["class"]).load(self.folder / held["file"])
            case "model" | "code":
                return held
        return decode(told)

    def _tensor(self, held: dict[str, Any]) -> Tensor:
        if self._tensors is None:
            try:
                self._tensors = load_tensors(self.read(f"{self.name}.safetensors"))
            except safetensors.SafetensorError as error:
                raise LabError(
                    f"{self.folder / self.name}.safetensors is damaged ({error}). Run the experiment again."
                ) from None
        found = self._tensors[held["at"]]
        return torch.view_as_complex(found) if held["dtype"].startswith("torch.complex") else found
