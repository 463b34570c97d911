"""A folder of shards: what it was made of in one JSON file, and safetensors files of rows that only grow in number."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmr.disk.files import digest, read_whole, replacing, seal, understood, unseal, write_whole
from fmr.disk.tensors import Entry, bytes_of, write_tensors
from fmr.errors import StoreError, number_of

ABOUT, INDEX, BATCHES = "corpus.json", "index", "batches"
"""The file that says what there is; the names of the tensors that are not values."""

LOCK = ".lock"
"""The file by which one process alone writes to a folder."""

_NAME = re.compile(r"shard-(\d{6})\.safetensors")
_PART = re.compile(r"part-(\d+)-of-(\d+)")

_CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
"""The dtypes that values may have, as safetensors spells them."""


@dataclass(frozen=True)
class Piece:
    """One tensor of one shard: where its bytes lie, and their checksum; it has none in files of an older version."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    digest: str | None

    def mapped(self) -> np.ndarray[Any, Any]:
        """The numbers, read from disk as they are asked for; bfloat16, which NumPy has not, as whole numbers."""
        kind = np.dtype("uint16") if self.dtype == torch.bfloat16 else np.dtype(str(self.dtype).removeprefix("torch."))
        if not self.shape[0]:
            return np.empty(self.shape, kind)
        return np.memmap(self.path, kind, "r", self.begin, self.shape)

    def check(self) -> None:
        """Read all of it; bytes that are not those that were written are an error."""
        if self.digest is not None and digest(self.mapped().reshape(-1).view(np.uint8).data) != self.digest:
            raise StoreError(
                f"{self.path} is damaged: the checksum of {self.name!r} is another. Delete it and all shards after it, and "
                "collect again into the same folder, which goes on from there."
            )


def write_shard(folder: Path, number: int, rows: Mapping[str, Tensor], batches: Tensor) -> None:
    """Write a shard whole or not at all; batches: (batches, 2), a digest of each with its number of examples."""
    held = {INDEX: rows[""], BATCHES: batches} | {f"values.{name}": value for name, value in rows.items() if name}
    ordered = sorted(held.items(), key=lambda one: -one[1].element_size())
    entries = [
        Entry(name, str(one.dtype).removeprefix("torch."), tuple(one.shape), digest(bytes_of(one))) for name, one in ordered
    ]
    place = folder / f"shard-{number:06d}.safetensors"
    with _room_for(place), replacing(place) as file:
        write_tensors(file, entries, (bytes_of(one) for _, one in ordered), digests=True)


@contextmanager
def _room_for(place: Path) -> Iterator[None]:
    """Turn what the disk refuses while a file is written into one clear error."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{place} cannot be written ({error.strerror or error}). What was written before is whole: make room and "
            "collect again into the same folder, which goes on from there."
        ) from None


def is_shard(path: Path) -> bool:
    """Whether a file is a shard, by its name."""
    return _NAME.fullmatch(path.name) is not None


def shards(folder: Path) -> list[Path]:
    """The files of shards in their order, without a gap."""
    found = sorted(filter(is_shard, folder.iterdir()))
    for number, path in enumerate(found):
        if path.name != f"shard-{number:06d}.safetensors":
            raise StoreError(
                f"{folder} has no shard-{number:06d}.safetensors and has {path.name}. Expected every shard: delete those "
                "after it, and collect again, which goes on from there."
            )
    return found


def counted(folder: Path) -> dict[str, int]:
    """How many shards a folder has, and how many rows are in them."""
    found = shards(folder)
    return {"shards": len(found), "rows": sum(pieces(path)[INDEX].shape[0] for path in found)}


def part_of(folder: Path, number: int, of: int) -> Path:
    """The folder of one of several processes, in a folder that holds what as many have collected, or nothing."""
    names = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if odd := next((name for name in names if (at := _PART.fullmatch(name)) is None or int(at[2]) != of), None):
        raise StoreError(
            f"{folder} holds {odd}, and {number_of(of, 'process', 'processes')} would collect into it. Expected an empty "
            "folder, a new one, or one that as many collected into."
        )
    return folder / _part(number, of)


def _part(number: int, of: int) -> str:
    """The name of that folder."""
    return f"part-{number}-of-{of}"


def parts(folder: Path) -> list[Path]:
    """The folders of the processes that collected into this one, in their order; itself, where it was one."""
    found = {path.name: match for path in folder.iterdir() if (match := _PART.fullmatch(path.name))}
    if not found:
        return [folder]
    worlds = {int(match[2]) for match in found.values()}
    missing = [_part(n, of) for of in worlds for n in range(of) if _part(n, of) not in found]
    if len(worlds) > 1 or missing:
        told = f"has no {missing[0]}" if missing else f"holds parts of {' and of '.join(map(str, sorted(worlds)))}"
        raise StoreError(f"{folder} {told}. Expected the parts of as many processes as collected into it.")
    return [folder / _part(n, next(iter(worlds))) for n in range(len(found))]


def pieces(path: Path) -> dict[str, Piece]:
    """The tensors of a shard by name."""
    with understood(str(path)):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("a header longer than the file")
            header = json.loads(file.read(length))
        said = header.pop("__metadata__", {})
        found = {}
        for name, one in header.items():
            dtype = getattr(torch, _CODES[one["dtype"]])
            begin, end = one["data_offsets"]
            shape = tuple(int(many) for many in one["shape"])
            if 8 + length + end > size or end - begin != int(np.prod(shape)) * dtype.itemsize:
                raise ValueError(f"{name} is cut short")
            found[name] = Piece(path, name, dtype, shape, 8 + length + begin, said.get(name))
    return found


def write_about(folder: Path, body: Mapping[str, Any]) -> None:
    """Write what a folder was made of."""
    with _room_for(folder / ABOUT):
        write_whole(folder / ABOUT, seal("corpus", dict(body)))


def read_about(folder: Path) -> dict[str, Any]:
    """What a folder was made of."""
    return unseal("corpus", read_whole(folder / ABOUT, "a folder that fmr.collect wrote"), os.fspath(folder / ABOUT))


def differs(was: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of some settings in which two folders differ, in words; empty for none."""
    return next(
        (f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in names if was.get(name) != now.get(name)), ""
    )
