"""A corpus of values that was collected: every site as one array on disk, of which only what is asked for is read."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fmr.corpora.shards import BATCHES, INDEX, Piece, counted, differs, parts, pieces, read_about, shards
from fmr.disk.files import named
from fmr.errors import IdError, StoreError, nearest, number_of, whole_number

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


class Rows(Dataset[Tensor]):
    """One array in several files: `rows[3]`, `rows[10:20]` and `rows[[5, 2]]` read these rows alone, as new tensors.

    It is a torch Dataset, for a DataLoader to draw from; `numpy.asarray(rows)` reads all of it. `rows.site` is what they are
    the values of, as it prints.
    """

    def __init__(self, parts: Sequence[Piece], documents: Sequence[int] = (), site: str = "") -> None:
        self.site = site
        held = [(part, before) for part, before in zip(parts, documents or [0] * len(parts), strict=True) if part.shape[0]]
        self._parts = [part for part, _ in held] or list(parts[:1])
        self._before = [before for _, before in held]
        self._maps = [part.mapped() for part in self._parts]
        self._starts = np.cumsum([0, *(part.shape[0] for part in self._parts)])
        self.dtype = self._parts[0].dtype
        self.shape = (int(self._starts[-1]), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: Any) -> Tensor:
        number = whole_number(at)
        if number is not None:
            if not -len(self) <= number < len(self):
                raise IndexError(f"Row {number} of {len(self)}: expected 0 to {len(self) - 1}.")
            return self._read(np.array([number % len(self)]))[0]
        if isinstance(at, slice):
            return self._read(np.arange(*at.indices(len(self))))
        places = np.asarray(at)
        if places.dtype == bool:
            if places.shape != (len(self),):
                told = "one" if places.ndim == 0 else f"{' x '.join(map(str, places.shape))}"
                raise IndexError(f"rows[...] got {told} of true or false for {len(self)} rows. Expected one for each.")
            places = np.flatnonzero(places)
        if places.ndim != 1 or (places.size and places.dtype.kind not in "iu"):
            raise IndexError(f"rows[{at!r}]: expected a whole number, a slice, or whole numbers in one dimension.")
        if places.size and not (-len(self) <= places.min() and places.max() < len(self)):
            odd = places.max() if places.max() >= len(self) else places.min()
            raise IndexError(f"rows[...] asks for row {odd} of {len(self)}. Expected numbers below {len(self)}.")
        return self._read(places.astype(np.int64) % max(len(self), 1))

    def __getitems__(self, places: list[int]) -> list[Tensor]:
        return list(self[places].unbind())

    def _read(self, places: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        """These rows as a new tensor: of each file its own at once, in the order of the file."""
        out = np.empty((len(places), *self.shape[1:]), self._maps[0].dtype)
        owner = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(owner):
            mine = np.flatnonzero(owner == number)
            mine = mine[np.argsort(places[mine], kind="stable")]
            out[mine] = self._maps[number][places[mine] - self._starts[number]]
            if self._before[number]:
                out[mine, 0] += self._before[number]
        found = torch.from_numpy(out)
        return found.view(torch.bfloat16) if self.dtype == torch.bfloat16 else found

    def blocks(self, size: int = 1 << 16) -> Iterator[Tensor]:
        """All rows in their order, so many at once.

        >>> for block in corpus["transformer.h.2.mlp"].blocks(4096):
        ...     total = block.double().sum(0)
        """
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
        found = self[:]
        return np.asarray((found.float() if found.dtype == torch.bfloat16 else found).numpy(), dtype)

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"Rows {' x '.join(map(str, self.shape))} of {kind}, in {number_of(len(self._parts), 'file')}"


class Corpus:
    """A folder that `fmr.collect` wrote: `corpus[site]` is what a site held, one row a token of the corpus.

    >>> corpus = fmr.collect(model, [inputs], keep=["transformer.h.2.mlp"], to="values", progress=False)
    >>> corpus["transformer.h.2.mlp"]
    Rows 6 x 128 of float32, in 1 file
    >>> corpus.index[0]        # document, position, token; -1 for none
    tensor([0, 0, 1])

    Files are mapped into memory, and what is asked for is read; whether it is what was written, `corpus.check()` tells,
    which reads all. A folder that is still written to shows what it held when it was opened. `corpus.complete` tells
    whether the loader came to its end; a complete one of which a shard is gone is an error.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = named(folder)
        places = parts(self.folder) if self.folder.is_dir() else [self.folder]
        about, *others = map(read_about, places)
        for place, one in zip(places[1:], others, strict=True):
            if told := differs(about, one, ("model", "weights", "sites", "dtype")):
                raise StoreError(f"{place} was collected otherwise than {places[0].name}: {told}. Expected one corpus.")
        self.model: str = about["model"]
        self.weights: str = about["weights"]
        self.sites: tuple[str, ...] = tuple(about["sites"])
        self.complete: bool = all(one["complete"] for one in (about, *others))
        for place, one in zip(places, (about, *others), strict=True):
            if one["complete"] and "shards" in one and (told := differs(one, counted(place), ("shards", "rows"))):
                raise StoreError(
                    f"{place} was complete, and not all is there: {told}. Collect again into it, which goes on."
                )
        self._shards = [(path, place) for place in places for path in shards(place)]
        self._pieces = held = [pieces(path) for path, _ in self._shards]
        if not held:
            raise StoreError(f"{self.folder} holds no shard yet. Expected some: collect into it again, which goes on.")
        self._rows = {
            name: Rows([one[f"values.{name}"] for one in held], site=site) for name, site in about["sites"].items()
        }
        self.index = Rows([one[INDEX] for one in held], self._before(held))

    def _before(self, held: Sequence[Mapping[str, Piece]]) -> list[int]:
        """How many documents are in the parts before that of each shard."""
        ends: dict[Path, int] = {}
        for (_, place), one in zip(self._shards, held, strict=True):
            ends[place] = ends.get(place, 0) + int(one[BATCHES].mapped()[:, 1].sum())
        starts = dict(zip(ends, accumulate([0, *ends.values()]), strict=False))
        self._documents = sum(ends.values())
        return [starts[place] for _, place in self._shards]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, site: Any) -> Rows:
        name = site if isinstance(site, str) else repr(site)
        by_id = getattr(site, "id", name)
        found = self._rows.get(name, self._rows.get(str(by_id)))
        if found is None:
            have = nearest(str(by_id), self.sites) or f" Expected one of {', '.join(map(repr, self.sites))}."
            raise IdError(f"{site!r} was not collected.{have}")
        return found

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self._documents

    def rows(self, document: int) -> slice:
        """Where a document's rows are.

        >>> corpus["transformer.h.2.mlp"][corpus.rows(0)].shape
        torch.Size([6, 128])
        """
        number = whole_number(document)
        if number is None or not 0 <= number < self.documents:
            raise IndexError(
                f"Document {document!r} of {self.documents}: expected a whole number from 0 to {self.documents - 1}."
            )
        column = _Column(self.index)
        start = bisect_right(column, number - 1)
        return slice(start, bisect_right(column, number))

    def check(self) -> None:
        """Read all files, and raise `StoreError` where one is not what was written: a checksum of each stands in it.

        >>> corpus.check()
        """
        for one in self._pieces:
            for piece in one.values():
                piece.check()

    def table(self, rows: slice = slice(None)) -> pd.DataFrame:
        """The index of some rows, all of them by default: document, position, token.

        >>> corpus.table(slice(0, 100)).token.value_counts()
        """
        import pandas as pd

        return pd.DataFrame(self.index[_slice(rows)].numpy(), columns=["document", "position", "token"])

    def arrow(self, rows: slice = slice(None)) -> pa.Table:
        """Some rows as a table of Arrow, all of them by default: document, position, token, and a list of numbers a site.

        >>> corpus.arrow(slice(0, 100)).column_names
        ['document', 'position', 'token', 'transformer.h.2.mlp']

        Whoever reads Arrow reads it: `pyarrow.parquet.write_table`, polars, DuckDB, `datasets.Dataset(corpus.arrow())`. It
        is in memory; numbers of bfloat16, which Arrow has not, are float32. It needs pyarrow (`pip install 'fmr[arrow]'`).
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise StoreError(f"pyarrow is not installed ({error}). Expected it: pip install 'fmr[arrow]'.") from None
        index = self.index[_slice(rows)].numpy()
        columns = {name: pa.array(index[:, place]) for place, name in enumerate(("document", "position", "token"))}
        for name, held in self._rows.items():
            value = held[rows]
            found = pa.array((value.float() if value.dtype == torch.bfloat16 else value).numpy().reshape(-1))
            for size in reversed(value.shape[1:]):
                found = pa.FixedSizeListArray.from_arrays(found, size)
            columns[name] = found
        return pa.table(columns)

    def __repr__(self) -> str:
        size = sum(path.stat().st_size for path, _ in self._shards)
        kinds = "\n".join(
            f"  {name}  {' x '.join(map(str, self._rows[name].shape))}  {str(self._rows[name].dtype)[6:]}"
            for name in self.sites
        )
        more = "" if self.complete else "; not complete: collect again into it, which goes on"
        return (
            f"Corpus of {self.model}: {number_of(len(self), 'row')} of {number_of(self.documents, 'document')}, "
            f"{size / 1e6:.1f} MB{more}\n{kinds}"
        )


def _slice(rows: Any) -> slice:
    """The rows of a table."""
    if not isinstance(rows, slice):
        raise IndexError(f"rows={rows!r}: expected a slice, as slice(0, 100), or corpus.rows(document).")
    return rows


class _Column(Sequence[int]):
    """The documents of an index, one at a time."""

    def __init__(self, index: Rows) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, at: Any) -> Any:
        return int(self._index[at][0])
