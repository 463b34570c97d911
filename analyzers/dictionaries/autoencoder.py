"""The sparse autoencoder: values as sums of few directions out of many, with three ways to choose the few."""

from __future__ import annotations

import os
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analyzers.dictionaries.axes import spliced
from analyzers.dictionaries.files import read_folder, read_saelens, write_folder
from analyzers.protocol import AnalyzerError, check_counts
from fmr.edits import Add
from fmr.subspaces import Latents

if TYPE_CHECKING:
    from fmr.edits import Context

KINDS = ("relu", "top-k", "jumprelu")

START = 0.1
"""The threshold that a JumpReLU begins with, where values vary by about 1 in each number."""

BANDWIDTH = 0.2
"""How near to its threshold a coefficient moves it, in training."""


class SparseAutoencoder(nn.Module):
    """A dictionary of directions: each value is a bias and a sum of a few of them, with coefficients from 0 on.

    >>> autoencoder = analyzers.SparseAutoencoder(128, 512, "top-k", k=8)
    >>> latents = autoencoder.encode(run[site])
    >>> int((latents > 0).sum(-1).max()), autoencoder.decode(latents).shape
    (8, torch.Size([1, 6, 128]))

    width: how many numbers a value has. size: how many latents. kind: "relu" (few by a price on their sum while training),
    "top-k" (the `k` largest of each value, Gao et al. 2024) or "jumprelu" (those above a threshold of their own,
    Rajamanoharan et al. 2024). centered: whether the encoder reads values less the decoder's bias. seed: of the directions
    it begins with, of length 1.

    encode(v) = act((v - b) E + e), with E of shape (width, size); decode(c) = c D + b, with D of shape (size, width).
    `edits={site: autoencoder.splice}` puts its reconstruction in the place of a value.
    """

    def __init__(
        self, width: int, size: int, kind: str = "relu", k: int | None = None, *, centered: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        check_counts(1, width=width, size=size)
        check_counts(0, seed=seed)
        if kind not in KINDS:
            raise AnalyzerError(f"kind={kind!r}: expected {', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}.")
        if kind == "top-k":
            check_counts(1, k=k)
        if (k is not None) != (kind == "top-k") or (k is not None and k > size):
            raise AnalyzerError(
                f"k={k!r}, kind={kind!r}: expected k from 1 to {size} for 'top-k', and none for other kinds."
            )
        self.width, self.size, self.kind, self.k, self.centered = int(width), int(size), kind, k, bool(centered)
        start = torch.randn(self.size, self.width, generator=torch.Generator().manual_seed(seed))
        self.decoder = nn.Parameter(F.normalize(start, dim=1))
        self.encoder = nn.Parameter(self.decoder.detach().T.contiguous())
        self.encoder_bias = nn.Parameter(torch.zeros(self.size))
        self.bias = nn.Parameter(torch.zeros(self.width))
        self.threshold = nn.Parameter(torch.full((self.size,), START)) if kind == "jumprelu" else None

    @property
    def settings(self) -> dict[str, Any]:
        """What it was made with, but for the seed."""
        return {name: getattr(self, name) for name in ("width", "size", "kind", "k", "centered")}

    def scores(self, values: Tensor) -> Tensor:
        """What latents are chosen by: (values - b) E + e, of shape (..., size)."""
        rows = self._checked(values)
        return (rows - self.bias if self.centered else rows) @ self.encoder + self.encoder_bias

    def encode(self, values: Tensor) -> Tensor:
        """The latents of values (..., width), of shape (..., size); most are 0.

        >>> analyzers.SparseAutoencoder(128, 512, "top-k", k=8).encode(run[site]).shape
        torch.Size([1, 6, 512])
        """
        return self.chosen(self.scores(values))

    def chosen(self, scores: Tensor) -> Tensor:
        """The latents of scores (..., size): those that are chosen, and 0 for all others."""
        if self.k is not None:
            best = scores.topk(self.k, -1)
            return torch.zeros_like(scores).scatter(-1, best.indices, best.values.relu())
        if self.threshold is None:
            return scores.relu()
        held, on, near = self._by_threshold(scores)
        return scores.relu() * on - near * held * (self.threshold - held)  # the last term is 0, and so moves thresholds

    def count(self, scores: Tensor) -> Tensor:
        """How many latents are chosen by scores (..., size), (...); of a JumpReLU with a gradient for its thresholds."""
        if self.threshold is None:
            return (self.chosen(scores) > 0).sum(-1).to(scores.dtype)
        held, on, near = self._by_threshold(scores)
        return (on - near * (self.threshold - held)).sum(-1)

    def _by_threshold(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds without their gradients, which scores lie above them, and a box of area 1 around each."""
        assert self.threshold is not None
        held = self.threshold.detach()
        near = ((scores - held).abs() < BANDWIDTH / 2).to(scores.dtype) / BANDWIDTH
        return held, (scores > held).to(scores.dtype), near

    def decode(self, latents: Tensor) -> Tensor:
        """The values that latents (..., size) stand for, of shape (..., width)."""
        if not isinstance(latents, Tensor) or latents.shape[-1:] != (self.size,):
            told = f"of shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
            raise AnalyzerError(f"The latents are {told}: expected a tensor with {self.size} in the last dimension.")
        return latents @ self.decoder + self.bias

    def forward(self, values: Tensor) -> Tensor:
        """Values (..., width) as they are reconstructed, in their own dtype."""
        return self.decode(self.encode(values)).to(values.dtype)

    def splice(self, value: Tensor, context: Context) -> Tensor:
        """The edit that puts the reconstruction in the place of a value.

        >>> autoencoder = analyzers.SparseAutoencoder(128, 512, "top-k", k=8)
        >>> fmr.run(model, input_ids, edits={site: autoencoder.splice}).receipts
        """
        return spliced(self, value, context.axes)

    def subspace(self) -> Latents:
        """Its latents as a subspace to edit within; what it does not reconstruct is kept.

        >>> autoencoder = analyzers.SparseAutoencoder(128, 512, "top-k", k=8)
        >>> fmr.run(model, input_ids, edits={site: edits.Zero(within=autoencoder.subspace()[7])})
        """
        return Latents(self.encode, self.decode, self.width, self.size, self)

    def direction(self, latent: int) -> Tensor:
        """What a latent adds to a value for each 1 of its coefficient, (width,)."""
        if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < self.size:
            raise AnalyzerError(f"latent={latent!r}: expected a number from 0 to {self.size - 1}.")
        return self.decoder[latent].detach().clone()

    def steering(self, latent: int, strength: float) -> Add:
        """The edit that adds a latent with this coefficient to a value, whatever it holds.

        >>> steered = analyzers.SparseAutoencoder(128, 512).steering(7, 3.0)
        >>> fmr.run(model, input_ids, edits={site: steered})
        """
        if isinstance(strength, bool) or not isinstance(strength, Real) or not isfinite(strength):
            raise AnalyzerError(
                f"strength={strength!r}: expected a finite number, in the units of the latent's coefficient."
            )
        return Add(float(strength) * self.direction(latent))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it to a folder, as JSON and safetensors.

        >>> analyzers.SparseAutoencoder(128, 512).save("dictionary")
        """
        write_folder(folder, self.settings, {name: one.detach() for name, one in self.named_parameters()})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SparseAutoencoder:
        """Read what `save` wrote.

        >>> analyzers.SparseAutoencoder(128, 512).save("dictionary")
        >>> analyzers.SparseAutoencoder.load("dictionary")
        SparseAutoencoder(128, 512, 'relu')
        """
        return cls.of(*read_folder(folder))

    @classmethod
    def from_saelens(cls, folder: str | os.PathLike[str]) -> SparseAutoencoder:
        """Read one from a folder that SAELens wrote: cfg.json and sae_weights.safetensors; the library is not needed.

        folder: with an autoencoder of the architecture "standard", "topk" or "jumprelu", whose inputs are not normalised.
            One of a z, "hook_z", reads all heads of a value as one vector.
        """
        return cls.of(*read_saelens(folder))

    @classmethod
    def of(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> SparseAutoencoder:
        """One with these settings and these parameters, in their dtype."""
        made = cls(**settings)
        own = dict(made.named_parameters())
        if (told := {n: tuple(one.shape) for n, one in tensors.items()}) != {n: tuple(one.shape) for n, one in own.items()}:
            raise AnalyzerError(
                f"The tensors {told} do not fit an autoencoder of {settings}: expected "
                f"{ {name: tuple(one.shape) for name, one in own.items()} }."
            )
        for name, one in tensors.items():
            own[name].data = one.detach().clone()
        return made

    def _checked(self, values: Tensor) -> Tensor:
        """Values in the autoencoder's dtype."""
        if not isinstance(values, Tensor):
            raise AnalyzerError(
                f"The values are {type(values).__name__}, expected a tensor (..., {self.width}), as run[site]."
            )
        if not values.is_floating_point() or values.shape[-1:] != (self.width,):
            raise AnalyzerError(
                f"An autoencoder of {self.width} numbers was given {values.dtype} of shape {tuple(values.shape)}. Expected "
                f"values with fractions and {self.width} in the last dimension, as run[site]."
            )
        return values.to(self.decoder.dtype)

    def __repr__(self) -> str:
        rest = f", k={self.k}" if self.k is not None else ""
        return f"{type(self).__name__}({self.width}, {self.size}, {self.kind!r}{rest})"
