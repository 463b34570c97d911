"""The keys that a memory reads over a corpus: their second moments, streamed, merged, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from analyzers.editing.memories import memory_of
from analyzers.editing.rows import padded
from analyzers.protocol import Analyzer, AnalyzerError, Batch, check_other, checked, real_tokens
from analyzers.results import Stored
from analyzers.sites import found_in, read_at
from fmr.errors import number_of
from fmr.ids import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

ROWS = 32
"""How many texts go into a batch."""


@dataclass(frozen=True, eq=False)
class Covariance(Stored):
    """The second moments of the keys of a memory, (memories, memories), means over tokens, not centred.

    >>> covariance.condition > 1
    True
    """

    matrix: Tensor = field(repr=False)
    tokens: int
    layer: int
    site: str

    @property
    def condition(self) -> float:
        """The largest eigenvalue over the smallest: from which number on directions are not known well."""
        values = torch.linalg.eigvalsh(self.matrix)
        return float(values[-1] / values[0]) if float(values[0]) > 0 else float("inf")

    def solve(self, key: Tensor) -> Tensor:
        """The direction that answers to a key and as little as can be to all others: the inverse times the key.

        >>> direction = covariance.solve(torch.ones(512))
        """
        factor, failed = torch.linalg.cholesky_ex(self.matrix)
        if int(failed):
            raise AnalyzerError(
                f"The covariance of {number_of(self.tokens, 'key')} of "
                f"{number_of(len(self.matrix), 'memory', 'memories')} has no inverse. Expected several "
                "times as many different tokens: RankOneEdit(model, tokenizer, texts=[...]); or a ridge, such as ridge=1e-3."
            )
        return torch.cholesky_solve(key.to(self.matrix)[:, None], factor)[:, 0]

    def table(self) -> DataFrame:
        """One row an eigenvalue, the largest first, with the share that it has of their sum.

        >>> covariance.table().head()
        """
        import pandas as pd

        values = torch.linalg.eigvalsh(self.matrix).flip(0)
        return pd.DataFrame({"eigenvalue": values.numpy(), "share": (values / values.sum()).numpy()})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the eigenvalues, the largest first; returns the figure.

        >>> covariance.plot().savefig("keys.png")
        """
        import matplotlib.pyplot as plt

        from fmr.pictures.heatmap import returned

        given, ax = ax is not None, ax or plt.subplots(figsize=(4, 3), layout="constrained")[1]
        ax.semilogy(self.table()["eigenvalue"], color="#333333")
        ax.set(
            xlabel="eigenvalue",
            ylabel="mean square of keys",
            title=f"keys of layer {self.layer}, {number_of(self.tokens, 'token')}",
        )
        figure = cast("Figure", ax.figure)
        return figure if given else returned(figure)

    def __repr__(self) -> str:
        return (
            f"Covariance of {number_of(len(self.matrix), 'key')} at {self.site}, layer {self.layer}, over "
            f"{number_of(self.tokens, 'token')}: "
            f"condition number {self.condition:.3g}"
        )


class KeyCovariance(Analyzer[Covariance]):
    """Sum up the keys that the memory of a layer reads, each token's times itself.

    >>> KeyCovariance(model, layer=1).over(batches, progress=False).result().save("keys.safetensors")

    model: any module whose memories `fmr.locate` finds, in eval mode. layer: which one; None takes that of `RankOneEdit`.
    mask: the name of the argument that is 0 on padding, (examples, positions).
    """

    def __init__(self, model: nn.Module, layer: int | None = None, *, mask: str = "attention_mask") -> None:
        self.model, self.layer, self.mask = model, layer, mask
        self.site: Site | None = None
        self.sums: Tensor | None = None
        self.tokens = 0

    def update(self, batch: Batch) -> KeyCovariance:
        """Count the keys of all real tokens of a batch.

        >>> KeyCovariance(model, layer=1).update(inputs).tokens
        6
        """
        inputs = checked(batch)
        with torch.no_grad():
            if self.site is None:
                (found,), _ = found_in(self.model, inputs, lambda structure: (memory_of(structure, self.layer),))
                self.layer, self.site = found[0], found[1].post
            keys = read_at(self.model, inputs, [self.site])[self.site]
            real = real_tokens(inputs.get(self.mask), *keys.shape[:2]).to(keys.device)
            chosen = keys[real].double()
            self.sums = chosen.mT @ chosen + (0 if self.sums is None else self.sums.to(keys.device))
            self.tokens += len(chosen)
        return self

    @property
    def counted(self) -> str:
        """How many tokens were counted."""
        return number_of(self.tokens, "token") if self.tokens else ""

    def merge(self, other: KeyCovariance) -> KeyCovariance:
        """Add what another analyzer counted of the same memory on other texts, and return this one.

        >>> KeyCovariance(model, 1).update(batches[0]).merge(KeyCovariance(model, 1).update(batches[1])).result()
        """
        check_other(self, other)
        if other.sums is None:
            return self
        if self.sums is None and self.layer in (None, other.layer):
            self.layer, self.site, self.sums, self.tokens = other.layer, other.site, other.sums, other.tokens
            return self
        if (self.layer, self.site) != (other.layer, other.site):
            raise AnalyzerError(
                f"merge of layer {self.layer} at {self.site} with {other.layer} at {other.site}: expected one memory."
            )
        assert self.sums is not None
        self.sums, self.tokens = self.sums + other.sums.to(self.sums.device), self.tokens + other.tokens
        return self

    def result(self, *, ridge: float = 0.0) -> Covariance:
        """The means so far; ridge: a share of the mean diagonal that is added to the diagonal.

        >>> KeyCovariance(model, 1).update(inputs).result(ridge=1e-3)
        """
        if self.sums is None or self.site is None or self.layer is None:
            raise AnalyzerError("No token has been counted yet. Call update(batch) or over(batches) before result().")
        matrix = (self.sums / self.tokens).cpu()
        matrix = matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.double)
        return Covariance(matrix, self.tokens, self.layer, str(self.site.id))


def covariance_of(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], layer: int, ridge: float, cache: Path | None
) -> Covariance:
    """The covariance over texts; read from a folder if it was kept there for these weights, texts and settings."""
    path = None
    if cache is not None:
        path = cache / f"keys-{layer}-{_digest(model, texts, layer, ridge)}.safetensors"
        if path.exists():
            return Covariance.load(path)
    found = KeyCovariance(model, layer).over(_batches(model, tokenizer, texts), progress=False).result(ridge=ridge)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return found


def _batches(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Iterable[dict[str, Any]]:
    rows = [torch.tensor(ids) for ids in tokenizer(list(texts))["input_ids"]]
    rows.sort(key=len)  # rows of like length share a batch
    return [padded(rows[at : at + ROWS], model) for at in range(0, len(rows), ROWS)]


def _digest(model: nn.Module, texts: Sequence[str], layer: int, ridge: float) -> str:
    """A name for the weights, the texts and the settings that keys depend on."""
    told = hashlib.blake2b(f"{layer} {ridge} {len(texts)}".encode(), digest_size=8)
    for text in texts:
        told.update(text.encode() + b"\0")
    for name, value in model.state_dict().items():
        told.update(name.encode())
        told.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return told.hexdigest()
