"""fmr.tensors: safetensors files that any reader of the format reads, in single tensors, verified."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fmr import StoreError
from fmr.disk.files import digest
from fmr.disk.tensors import _CODES, Entry, TensorFile, bytes_of, in_order, write_tensors

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "wide": torch.arange(5, dtype=torch.float64),
    "scalar": torch.tensor(7, dtype=torch.int16),
    "empty": torch.empty(0, 3),
    "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "pair": torch.tensor([1 + 2j, -3j]),
    "wide pair": torch.tensor([1 + 2j, -3j], dtype=torch.complex128),
}


def entry_of(name: str, value: Tensor) -> Entry:
    return Entry(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), digest(bytes_of(value)))


@pytest.fixture
def entries() -> list[Entry]:
    return in_order(entry_of(name, value) for name, value in TENSORS.items())


@pytest.fixture
def path(tmp_path: Path, entries: list[Entry]) -> Path:
    with open(tmp_path / "file", "wb") as file:
        write_tensors(file, entries, (bytes_of(TENSORS[entry.name]) for entry in entries))
    return tmp_path / "file"


def opened(path: Path, entries: list[Entry]) -> TensorFile:
    file = TensorFile(path, "a test file")
    file.expect(entries)
    return file


def test_elements_come_back_in_their_dtype(path: Path, entries: list[Entry]) -> None:
    file = opened(path, entries)
    for name, value in TENSORS.items():
        back = file.elements(file.entries[name])
        assert back.dtype == value.dtype
        assert torch.equal(back, value.reshape(-1))


def test_the_safetensors_library_reads_the_file(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(TENSORS)
        for name, value in TENSORS.items():
            expected = value.view(torch.uint8) if name == "wide pair" else value
            assert torch.equal(file.get_tensor(name), expected)


@pytest.mark.parametrize("dtype", _CODES)
def test_the_safetensors_library_reads_every_dtype(tmp_path: Path, dtype: str) -> None:
    value = torch.arange(16, dtype=torch.uint8).remainder(2).view(getattr(torch, dtype))
    entries = [entry_of("value", value)]
    with open(tmp_path / "file", "wb") as file:
        write_tensors(file, entries, [bytes_of(value)])
    with safe_open(tmp_path / "file", "pt") as reader:
        back = reader.get_tensor("value")
    assert back.dtype == value.dtype
    assert torch.equal(back.view(torch.uint8), value.view(torch.uint8))
    assert opened(tmp_path / "file", entries).elements(entries[0]).dtype == value.dtype


def test_each_reading_is_a_tensor_of_its_own(path: Path, entries: list[Entry]) -> None:
    file = opened(path, entries)
    file.elements(file.entries["wide"]).add_(1)
    assert torch.equal(file.elements(file.entries["wide"]), TENSORS["wide"])


def test_an_open_file_outlives_its_path(path: Path, entries: list[Entry]) -> None:
    file = opened(path, entries)
    path.unlink()
    assert torch.equal(file.elements(file.entries["wide"]), TENSORS["wide"])


def test_a_file_cut_short_while_open_is_an_error(tmp_path: Path) -> None:
    value = torch.zeros(1 << 18, dtype=torch.uint8)
    entries = [entry_of("value", value)]
    with open(tmp_path / "file", "wb") as file:
        write_tensors(file, entries, [bytes_of(value)])
    reader = opened(tmp_path / "file", entries)
    os.truncate(tmp_path / "file", 1 << 17)
    with pytest.raises(StoreError, match=r"was cut short: 'value' has \d+ of 262144 bytes"):
        reader.elements(entries[0])


def test_changed_bytes_are_an_error_when_read(path: Path, entries: list[Entry]) -> None:
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    file = opened(path, entries)
    with pytest.raises(StoreError, match=r"the checksum of 'flags' does not match its bytes"):
        file.elements(file.entries["flags"])
    assert torch.equal(file.elements(file.entries["wide"]), TENSORS["wide"])


@pytest.mark.parametrize("change", [("dtype", "int64"), ("shape", (5, 1)), ("name", "other")])
def test_another_header_is_an_error(path: Path, entries: list[Entry], change: tuple[str, object]) -> None:
    other = [entry._replace(**dict([change])) if entry.name == "wide" else entry for entry in entries]
    with pytest.raises(StoreError, match="its header differs from what was saved, first at"):
        TensorFile(path, "a test file").expect(other)


def test_a_file_without_room_for_its_header_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(StoreError, match=r"a header of 1152921504606846976 bytes in a file of 10"):
        TensorFile(tmp_path / "file", "a test file")
