"""Interventions on disk: JSON for the sites, edits and settings, safetensors for the numbers; no code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

import fmr.edits as edits_room
import fmr.subspaces as subspaces_room
from fmr.disk.files import decode, digest, encode, named, new_folder, opened, write_whole
from fmr.edits.values import Edit
from fmr.errors import EditError, StoreError
from fmr.ids import Site
from fmr.interventions.roles import Saved, roles_of
from fmr.structure.parts import Structure
from fmr.subspaces.fixed import Latents

CONFIG, TENSORS = "intervention.json", "intervention.safetensors"
_FORMAT = 1
_SITE = ("positions", "heads", "units", "examples", "passes", "layout", "n_heads")
_EDITS = {name: getattr(edits_room, name) for name in edits_room.__all__ if name not in ("Context", "Edit")}
_SPACES = {
    name: kind
    for name in subspaces_room.__all__
    if isinstance(kind := getattr(subspaces_room, name), type) and issubclass(kind, nn.Module) and kind is not Latents
}
_KINDS = {**_SPACES, **{name: kind for name, kind in _EDITS.items() if issubclass(kind, nn.Module)}}
"""What is written by its settings and its tensors."""

_STARTS = ("seed", "share")
"""Settings that say where training begins."""


class _Writer:
    """Turns what edits are made of into JSON; tensors and modules get a name in it, each one once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.modules: list[nn.Module] = []
        self.parts: list[dict[str, Any]] = []

    def told(self, value: Any, where: str) -> Any:
        """A value as JSON."""
        if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Site)):
            return value
        if isinstance(value, Tensor):
            return {"tensor": self._named(value), "trained": isinstance(value, nn.Parameter)}
        if isinstance(value, (list, tuple)):
            return {"list" if isinstance(value, list) else "tuple": [self.told(one, where) for one in value]}
        if isinstance(value, slice):
            return encode(value)
        if isinstance(value, Site):
            chosen = {name: self.told(getattr(value, name), where) for name in _SITE}
            return {"site": str(value.id)} | {name: one for name, one in chosen.items() if one is not None}
        if _KINDS.get(type(value).__name__) is type(value):
            return {"part": self._part(value, where)}
        if type(value) in _EDITS.values():
            return {"edit": type(value).__name__} | {
                one.name: self.told(getattr(value, one.name), where) for one in fields(value)
            }
        raise EditError(_unsaved(value, where))

    def _part(self, module: nn.Module, where: str) -> int:
        """The number of a module among those that are written."""
        for number, known in enumerate(self.modules):
            if known is module:
                return number
        names = [name for name in signature(type(module)).parameters if name not in _STARTS]
        settings = {name: self.told(getattr(module, name), where) for name in names}
        self.modules.append(module)
        number = len(self.modules) - 1
        self.parts.append({"kind": type(module).__name__, "settings": settings})
        own = {} if isinstance(module, subspaces_room.Part) else dict(module.named_parameters())  # a part's are its space's
        self.tensors |= {f"parts.{number}.{name}": one for name, one in own.items()}
        return number

    def _named(self, value: Tensor) -> str:
        known = next((name for name, one in self.tensors.items() if one is value), None)
        name = known or f"values.{len(self.tensors)}"
        self.tensors[name] = value
        return name


def _unsaved(value: object, where: str) -> str:
    """Why something cannot be written, and what to do."""
    if isinstance(value, Latents):
        return f"The edit of {where} is within Latents, whose encoder is code. Save the autoencoder by itself, with a Basis."
    kind = type(value).__name__
    if callable(value) and not isinstance(value, nn.Module):
        return f"The edit of {where} is {value!r}, which is code. Expected edits of fmr.edits, whose settings are values."
    return (
        f"The edit of {where} holds a {kind}, which cannot be saved. Expected numbers, tensors and subspaces of "
        f"fmr.subspaces; for a run as source give its name: edits.Interchange('other')."
    )


def write_folder(folder: str | os.PathLike[str], edits: dict[Site, tuple[Edit, ...]], structure: Structure | None) -> None:
    """Write an intervention: the tensors first, then the text, which holds their checksum."""
    writer = _Writer()
    told = [
        {"at": writer.told(site, repr(site)), "edits": [writer.told(edit, repr(site)) for edit in several]}
        for site, several in edits.items()
    ]
    data = save({name: one.detach().cpu().contiguous().clone() for name, one in writer.tensors.items()})
    config = {
        "format": _FORMAT,
        "model": structure.model if structure else "",
        "fingerprint": structure.graph.fingerprint if structure else "",
        "roles": _roles(edits, structure),
        "sites": told,
        "parts": writer.parts,
        "digest": digest(data),
    }
    place = new_folder(folder)
    write_whole(place / TENSORS, data)
    write_whole(place / CONFIG, json.dumps(config, indent=1).encode())


def _roles(edits: dict[Site, tuple[Edit, ...]], structure: Structure | None) -> dict[str, str]:
    """The roles of the IDs that an intervention names."""
    known = roles_of(structure) if structure else {}
    own = [edit.at for several in edits.values() for edit in several if isinstance(getattr(edit, "at", None), Site)]  # type: ignore[attr-defined]
    return {str(site.id): known[site.id] for site in (*edits, *own) if site.id in known}


class _Reader:
    """Makes what was written again."""

    def __init__(self, tensors: dict[str, Tensor], parts: Iterable[dict[str, Any]]) -> None:
        self.tensors = tensors
        self.values: dict[str, Tensor] = {}
        self.parts: list[nn.Module] = []
        for number, part in enumerate(parts):
            self.parts.append(self._made(part, f"parts.{number}."))

    def _made(self, part: dict[str, Any], prefix: str) -> nn.Module:
        settings = {name: self.read(value) for name, value in part["settings"].items()}
        module: nn.Module = _KINDS[part["kind"]](**settings)
        own = {name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)}
        if own:
            module.load_state_dict(own, assign=True)
        return module

    def read(self, told: Any) -> Any:
        """A value from its JSON."""
        if not isinstance(told, dict):
            return told
        if "tensor" in told:
            value = self.tensors[told["tensor"]]
            return self.values.setdefault(told["tensor"], nn.Parameter(value) if told["trained"] else value)
        if "slice" in told:
            return decode(told)
        if "part" in told:
            return self.parts[told["part"]]
        if "site" in told:
            return Site(told["site"], **{name: self.read(told.get(name)) for name in _SITE})
        if "edit" in told:
            return _EDITS[told["edit"]](**{name: self.read(value) for name, value in told.items() if name != "edit"})
        return [self.read(one) for one in told["list"]] if "list" in told else tuple(map(self.read, told["tuple"]))


def read_folder(folder: str | os.PathLike[str]) -> Saved:
    """Read an intervention, or raise one clear error."""
    place = named(folder)
    expected = "a folder that intervention.save(folder) wrote"
    try:
        config = json.loads(_bytes(place / CONFIG, expected))
        if config["format"] > _FORMAT:
            raise StoreError(f"{place} has format {config['format']}, expected {_FORMAT} at most. Upgrade fmr.")
        data = _bytes(place / TENSORS, expected)
        if digest(data) != config["digest"]:
            raise StoreError(f"{place / TENSORS} does not hold the numbers that {CONFIG} was written with. Save it again.")
        reader = _Reader(load(data), config["parts"])
        edits = {reader.read(one["at"]): tuple(reader.read(edit) for edit in one["edits"]) for one in config["sites"]}
        return Saved(edits, config["roles"], config["model"] or "another model", config["fingerprint"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError) as error:
        raise StoreError(
            f"{place} holds no intervention of fmr ({type(error).__name__}: {error}). Expected {expected}."
        ) from error


def _bytes(path: Path, expected: str) -> bytes:
    with opened(path, expected) as file:
        return file.read()


def fetched(name: str | os.PathLike[str], settings: dict[str, Any]) -> Path:
    """The folder of that name, or a copy of the repository of that name on the hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(os.fspath(name), allow_patterns=[CONFIG, TENSORS], **settings))


def upload(name: str, write: Callable[[str], None], settings: dict[str, Any]) -> str:
    """Write to a repository on the hub; its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=settings.get("token"))
    address = str(api.create_repo(name, exist_ok=True, **settings))
    with TemporaryDirectory() as folder:
        write(folder)
        api.upload_folder(repo_id=name, folder_path=folder)
    return address
