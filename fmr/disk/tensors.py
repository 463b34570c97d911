"""Tensors in one safetensors file, written and read one at a time; what a checksum does not confirm is not returned.

The file is read with plain reads, not mapped into memory: where a mapped file is cut short behind a reader's back, the
system ends the process, and a write into one mapped tensor would show in the next reading of it.
"""

import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
from torch import Tensor

from fmr.disk.files import decode, digest, opened, read_text, understood, unreadable
from fmr.errors import StoreError

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The dtypes that safetensors names; a value of any other is stored as its bytes."""

_FORMAT = {"format": "fmr"}


class Entry(NamedTuple):
    """One tensor of a file: its name, what its bytes mean, and their checksum."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        size: int = decode({"torch": ["dtype", self.dtype]}).itemsize
        return size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize

    @property
    def stored(self) -> tuple[str, list[int]]:
        """The dtype and the shape that the file's header states."""
        code = _CODES.get(self.dtype)
        return (code, list(self.shape)) if code else ("U8", [self.nbytes])


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The order of writing: wide elements first, so that each tensor begins at a multiple of its element's size."""
    return sorted(entries, key=lambda entry: -entry.itemsize)


def header_of(entries: Iterable[Entry], digests: bool = False) -> dict[str, Any]:
    """The header of the file that holds these tensors in this order, and with `digests` their checksums."""
    entries = list(entries)
    said = {entry.name: entry.digest for entry in entries} if digests else {}
    header: dict[str, Any] = {"__metadata__": _FORMAT | said}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        code, shape = entry.stored
        header[entry.name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    return header


def write_tensors(
    file: BinaryIO, entries: Iterable[Entry], contents: Iterable[bytes | memoryview], digests: bool = False
) -> None:
    """Write a safetensors file; `contents` gives the bytes of each entry in turn, so that only one is held at a time.

    digests: whether the checksums of the entries stand in the header.
    """
    head = json.dumps(header_of(entries, digests), separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for content in contents:
        file.write(content)


def bytes_of(elements: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory."""
    line = elements.as_strided((elements.numel(),), (1,))  # a dimension of one element may have any stride
    return line.view(torch.uint8).numpy().data


class TensorFile:
    """A safetensors file that stays open, so that what it holds can be read although the path is saved over.

    >>> value = torch.arange(3.0)
    >>> entry = Entry("places", "float32", (3,), digest(bytes_of(value)))
    >>> with open("values.safetensors", "wb") as target:
    ...     write_tensors(target, [entry], [bytes_of(value)])
    >>> file = TensorFile(Path("values.safetensors"), "the values of a run")
    >>> file.expect([entry])
    >>> file.elements(entry)
    tensor([0., 1., 2.])
    """

    def __init__(self, path: Path, expected: str) -> None:
        self.path = path
        self._file = opened(path, expected)
        weakref.finalize(self, self._file.close)
        self._lock = Lock()
        self.entries: dict[str, Entry] = {}
        with understood(str(path)):
            try:
                self._header, self._base = self._read_header()
            except OSError as error:
                raise StoreError(unreadable(path, expected, error)) from None

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(read_text(self._file, length))
        end = max((row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes where {8 + length + end} were written")
        return header, 8 + length

    def content(self, name: str) -> Tensor:
        """The bytes of a tensor as the header places them, not verified."""
        with self._at(name) as length:
            data = torch.empty(length, dtype=torch.uint8, device="cpu")
            found = self._file.readinto(bytes_of(data))  # type: ignore[attr-defined]
        return data if found == length else self._cut_short(name, found, length)

    def text(self, name: str) -> bytes:
        """The same for a tensor that holds a text."""
        with self._at(name) as length:
            text = read_text(self._file, length)
        return text if len(text) == length else self._cut_short(name, len(text), length)

    @contextmanager
    def _at(self, name: str) -> Iterator[int]:
        """The length of a tensor in bytes, the file at its begin and what goes wrong in reading it one error."""
        with self._lock, understood(str(self.path)):
            begin, end = self._header[name]["data_offsets"]
            if not 0 <= begin <= end:
                raise ValueError(f"{name!r} from byte {begin} to {end}")
            try:
                self._file.seek(self._base + begin)
                yield end - begin
            except OSError as error:
                raise StoreError(unreadable(self.path, f"the values of {name!r}", error)) from None

    def _cut_short(self, name: str, found: int, length: int) -> NoReturn:
        raise StoreError(f"{self.path} was cut short: {name!r} has {found} of {length} bytes. Save it again.")

    def expect(self, entries: Sequence[Entry]) -> None:
        """Raise unless the file's header states exactly these tensors; from then on they are its `entries` by name."""
        with understood(str(self.path)):
            expected = header_of(entries)
        if self._header != expected:
            wrong = [n for n in {**expected, **self._header} if self._header.get(n) != expected.get(n)]
            raise StoreError(
                f"{self.path} is damaged: its header differs from what was saved, first at {wrong[0]!r}. "
                f"Save it again from the run."
            )
        self.entries = {entry.name: entry for entry in entries}

    def elements(self, entry: Entry) -> Tensor:
        """The elements of a tensor in the order of memory, read now and verified; a new tensor each time."""
        data = self.content(entry.name)
        if digest(bytes_of(data)) != entry.digest:
            raise StoreError(
                f"{self.path} is damaged: the checksum of {entry.name!r} does not match its bytes. Other values may "
                f"still be whole; save it again from the run."
            )
        return data.view(decode({"torch": ["dtype", entry.dtype]}))
