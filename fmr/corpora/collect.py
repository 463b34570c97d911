"""Collecting what sites hold over a corpus: bounded memory, shards on disk, gone on with after a kill."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmr.corpora.corpus import Corpus
from fmr.corpora.ranks import check_ranks, share, together
from fmr.corpora.rows import named_inputs, named_sites, rows_of, tensors_of
from fmr.corpora.shards import (
    ABOUT,
    BATCHES,
    LOCK,
    counted,
    differs,
    is_shard,
    part_of,
    pieces,
    read_about,
    shards,
    write_about,
    write_shard,
)
from fmr.corpora.tokens import Tokens
from fmr.disk.files import named, new_folder
from fmr.disk.tensors import bytes_of
from fmr.errors import StoreError, number_of, whole_number
from fmr.ids import Site
from fmr.runs.track import run
from fmr.sweeps.bars import hidden
from fmr.weights import fingerprint

SHARD = 1 << 28
"""Bytes of a shard, by default."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    keep: Any,
    to: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    shard: int = SHARD,
    tokens: str | None = None,
    mask: str | None = None,
    ranks: bool = False,
    progress: bool | None = None,
) -> Corpus:
    """Write what sites hold over a whole corpus to a folder, and open it.

    >>> corpus = fmr.collect(model, [inputs], keep=["transformer.h.2.mlp"], to="values", progress=False)
    >>> corpus["transformer.h.2.mlp"][:4].shape
    torch.Size([4, 128])

    model: is called with each batch, without gradients, up to the last of the sites. batches: a loader of tensors or of
    arguments by name, in the same order each time. keep: sites, IDs or paths of modules, or a mapping from names to them.
    to: a folder, made where there is none. dtype: of values with fractions on disk, as torch.float16; as they are by
    default. shard: bytes of a file, and about what is held in memory. progress: show a bar; None shows it on a terminal.
    tokens, mask: the names of the arguments that hold the token ids of the sites' positions, and 1 for a token and 0 for
    padding; None takes `input_ids` and `attention_mask`, or those of a decoder, where their lengths tell which they are.

    Tokens that the mask calls padding have no row. What a killed process wrote is whole, up to its last shard: the
    same call goes on from there, and what was collected is read again from the loader and compared, not run again. The same
    call on a complete folder runs nothing. `StoreError` for a folder of something else, for another process that writes to
    it, and for batches that are not the ones of before. Values on disk are not read again: `corpus.check()` does.

    ranks: under torchrun, each process is given all batches, collects its share of them into a part of the folder, and
    opens the whole when all are done. Batches need a length then; what a killed process wrote is gone on with by as many.
    """
    _check(model, dtype, shard)
    asked = _Asked(model, named_sites(keep), dtype, shard, Tokens.of(model, tokens, mask), progress)
    if not ranks:
        with _unless_written(named(to)) as folder:
            return _collected(asked, batches, folder)
    rank, world = check_ranks()
    with _unless_written(named(to)) as folder:
        return _by_ranks(asked, batches, folder, rank, world)


def _by_ranks(asked: _Asked, batches: Iterable[Any], folder: Path, rank: int, world: int) -> Corpus:
    """Write the share of each process to a part of a folder, and open the whole when all are done."""
    parts = together(lambda: (part_of(folder, rank, world), asked.about()))
    if odd := next((n for n, (_, about) in enumerate(parts) if about != parts[0][1]), None):
        told = differs(parts[0][1], parts[odd][1], list(parts[0][1]))
        raise StoreError(f"Process {odd} would collect otherwise than process 0: {told}. Expected the same in each.")
    opened: list[Corpus] = []
    with _unless_written(parts[rank][0]) as part:
        together(lambda: len(_collected(asked, share(batches), part)))
    together(lambda: opened.append(Corpus(folder)))  # before any of them goes on, maybe to collect into it again
    return opened[0]


@dataclass(frozen=True)
class _Asked:
    """What is collected, and how."""

    model: nn.Module
    sites: dict[str, Site]
    dtype: torch.dtype | None
    shard: int
    tokens: Tokens
    progress: bool | None

    def about(self) -> dict[str, Any]:
        """What a folder is made of, as it stands there."""
        return {
            "model": type(self.model).__name__,
            "weights": fingerprint(self.model),
            "sites": {name: repr(site) for name, site in self.sites.items()},
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "tokens": self.tokens.ids,
            "mask": self.tokens.mask,
        }


def _collected(asked: _Asked, batches: Iterable[Any], folder: Path) -> Corpus:
    """Write what sites hold in these batches to a folder of its own, and open it."""
    about = asked.about()
    with _alone(folder):
        done = _begun(folder, about)
        writer = _Writer(folder, asked.shard, asked.dtype, len(shards(folder)), sum(many for _, many in done))
        count = 0
        with writer.kept_after_errors():
            for count, batch in enumerate(tqdm(batches, "collecting", unit="batch", disable=hidden(asked.progress)), 1):
                told = _digest(batch)
                if count > len(done):
                    args, kwargs = named_inputs(batch)
                    held = run(asked.model, *args, keep=list(dict.fromkeys(asked.sites.values())), stop=True, **kwargs)
                    rows = rows_of(held, asked.sites, batch, writer.documents, asked.tokens)
                    if count == len(done) + 1:
                        write_about(folder, about | {"complete": False})
                    writer.add(rows, told, batch)
                elif told != done[count - 1][0]:
                    raise StoreError(f"Batch {count - 1} is another one than {folder} was collected of. {_SAME}")
        if not count:
            raise StoreError(
                f"The loader gave no batches for {folder}. Expected some: a list, or a loader that is not used up, as a "
                "generator is that was gone through before."
            )
        if count < len(done):
            raise StoreError(
                f"The loader gave {number_of(count, 'batch', 'batches')}, and {folder} holds {len(done)}. {_SAME}"
            )
        writer.flush()
        write_about(folder, about | {"complete": True} | counted(folder))
    return Corpus(folder)


_SAME = "Expected the same batches in the same order (a list, or a loader that does not shuffle), or another folder."


def _check(model: Any, dtype: Any, shard: Any) -> None:
    """Raise for what is no model in eval mode, no dtype of fractions, no size."""
    if not isinstance(model, nn.Module):
        raise StoreError(f"fmr.collect got {type(model).__name__}, expected a torch.nn.Module.")
    if model.training:
        raise StoreError(
            "The model is in training mode, so that dropout and running statistics act. Call model.eval() first."
        )
    if dtype is not None and dtype not in _DTYPES:
        raise StoreError(
            f"dtype={dtype!r}: expected torch.float16, bfloat16, float32 or float64, or None for values as they are."
        )
    if (size := whole_number(shard)) is None or size < 1:
        raise StoreError(f"shard={shard!r}: expected a number of bytes, as 1 << 28.")


@contextmanager
def _unless_written(folder: Path) -> Iterator[Path]:
    """A block in which a folder is there; after an error that left nothing in it, it is not, if it was not before."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield new_folder(folder)
    except BaseException:
        with suppress(OSError):  # of a folder that holds something
            for one in made:
                one.rmdir()
        raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A block in which no other process writes to a folder; an error before the first shard leaves nothing of ours in it."""
    new = [folder / name for name in (ABOUT, LOCK) if not (folder / name).exists()]
    try:
        with FileLock(folder / LOCK, timeout=0):
            try:
                yield
            except BaseException:
                if not any(map(is_shard, folder.iterdir())):
                    for one in new:
                        one.unlink(missing_ok=True)  # the lock while it is held, so that it is no other process's
                raise
    except Timeout:
        raise StoreError(
            f"Another process collects into {folder}. Expected one at a time, each into its own folder."
        ) from None


def _begun(folder: Path, about: dict[str, Any]) -> list[tuple[int, int]]:
    """The batches that a folder holds, each with its digest and its number of examples."""
    if (folder / ABOUT).exists():
        was = read_about(folder)
        if shards(folder) and (told := differs(was, about, list(about))):
            raise StoreError(f"{folder} was collected otherwise: {told}. Expected the same, or another folder.")
    elif others := sorted(path.name for path in folder.iterdir() if path.name != LOCK):
        raise StoreError(f"{folder} holds {others[0]} and no corpus. Expected an empty folder, or a new one.")
    found: list[tuple[int, int]] = []
    for path in shards(folder):
        held = pieces(path)[BATCHES]
        held.check()
        found += [(int(told), int(many)) for told, many in held.mapped()]
    return found


def _digest(batch: Any) -> int:
    """A number for what a batch holds."""
    told = hashlib.blake2b(digest_size=7)
    for name, value in tensors_of(batch).items():
        plain = value.detach().cpu().contiguous()
        told.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode() + bytes_of(plain))
    return int.from_bytes(told.digest(), "little")


@dataclass
class _Writer:
    """Rows that gather in memory until they make a shard; `documents` counts the examples so far."""

    folder: Path
    most: int
    dtype: torch.dtype | None
    number: int
    documents: int
    held: list[dict[str, Tensor]] = field(default_factory=list)
    batches: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0

    def add(self, rows: dict[str, Tensor], told: int, batch: Any) -> None:
        """Take the rows of one batch."""
        ready = {name: self._on_disk(name, value) for name, value in rows.items()}
        if self.held and (
            odd := next((name for name in ready if ready[name].shape[1:] != self.held[0][name].shape[1:]), None)
        ):
            raise StoreError(
                f"{odd!r} holds {tuple(ready[odd].shape[1:])} in each row, and {tuple(self.held[0][odd].shape[1:])} in "
                "batches before. Expected one shape."
            )
        many = len(next(iter(tensors_of(batch).values())))
        self.held.append(ready)
        self.batches.append((told, many))
        self.documents += many
        self.size += sum(one.nbytes for one in ready.values())
        if self.size >= self.most:
            self.flush()

    def _on_disk(self, name: str, value: Tensor) -> Tensor:
        """A value as it goes to disk, in memory of its own."""
        kind = self.dtype if self.dtype is not None and value.is_floating_point() else value.dtype
        made = value.detach().to("cpu", kind, copy=True).contiguous()
        if kind != value.dtype and (lost := made.isinf() & value.detach().cpu().isfinite()).any():
            raise StoreError(
                f"{name!r} holds {float(value.detach().cpu()[lost][0]):.3g}, which {str(kind)[6:]} cannot. Expected "
                "dtype=torch.bfloat16, or None for values as they are."
            )
        return made

    @contextmanager
    def kept_after_errors(self) -> Iterator[None]:
        """A block after which what has gathered is written, whatever was raised in it."""
        try:
            yield
        except BaseException:
            with suppress(StoreError):  # where the disk is full, that is what was raised
                self.flush()
            raise

    def flush(self) -> None:
        """Write what has gathered as one shard."""
        if self.batches:
            rows = {name: torch.cat([one[name] for one in self.held]) for name in self.held[0]}
            write_shard(self.folder, self.number, rows, torch.tensor(self.batches))
            self.number, self.size, self.held, self.batches = self.number + 1, 0, [], []
