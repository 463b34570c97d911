"""The values of one batch as rows, each with its document, its position and its token; padding has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmr.corpora.tokens import Tokens
from fmr.edits.places import kept
from fmr.errors import StoreError
from fmr.ids import Site
from fmr.nodes import sites_by_name
from fmr.runs.run import Run

NOTHING = -1
"""The token of a row where the inputs have no token ids."""


def named_sites(keys: Any) -> dict[str, Site]:
    """Sites by name, as they are asked for, or one clear error."""
    found = sites_by_name(keys)
    if found is None:
        raise StoreError(
            f"keep={keys!r}: expected sites, IDs or paths of modules, each once, as keep=[layer.resid_post for layer in "
            "structure.layers], or a mapping from names to them."
        )
    if glob := next((name for name, site in found.items() if "*" in str(site.id)), None):
        raise StoreError(
            f"keep={glob!r} is a glob, and what a corpus holds is named before. Expected sites one by one, as "
            'keep=[f"transformer.h.{n}" for n in range(12)].'
        )
    return found


def named_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a model's call: a tensor is the only one, a mapping has them by name."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping) and batch and all(isinstance(name, str) for name in batch):
        return (), dict(batch)
    raise StoreError(
        f"A batch is {'empty' if isinstance(batch, Mapping) else f'a {type(batch).__name__}'}, expected a tensor or the "
        "model's arguments by name, as a tokenizer returns them: tokenizer(texts, return_tensors='pt', padding=True)."
    )


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch, by name; one that stands alone has the empty name."""
    args, kwargs = named_inputs(batch)
    found = {"": args[0]} if args else {name: one for name, one in sorted(kwargs.items()) if isinstance(one, Tensor)}
    if not found or not all(one.dim() for one in found.values()):
        raise StoreError("A batch holds no tensor with a dimension of examples. Expected the inputs of several examples.")
    return found


def rows_of(run: Run, sites: Mapping[str, Site], batch: Any, first: int, names: Tokens) -> dict[str, Tensor]:
    """What the sites hold, one row a token or one an example, and under the empty name their index (rows, 3).

    first: the number of the batch's first example among all documents.
    """
    tensors = tensors_of(batch)
    examples = len(next(iter(tensors.values())))
    found = {name: _by_axes(run, site, examples, name) for name, site in sites.items()}
    lengths = {name: value.shape[1] for name, (value, by_token) in found.items() if by_token}
    if lengths and (len(lengths) < len(found) or len({*lengths.values()}) > 1):
        told = ", ".join(f"{name!r} {lengths.get(name, 'none')}" for name in found)
        raise StoreError(
            f"The sites have other numbers of positions: {told}. Expected sites with as many: collect the others apart."
        )
    positions = next(iter(lengths.values()), 0)
    if not lengths:
        index = torch.tensor([[first + row, NOTHING, NOTHING] for row in range(examples)])
        return {"": index, **{name: value.flatten(0, 1) for name, (value, _) in found.items()}}
    ids, real = names.read(tensors, (examples, positions))
    at = real.nonzero()
    places = real.long().cumsum(1)[tuple(at.T)] - 1
    tokens = torch.full_like(places, NOTHING) if ids is None else ids[tuple(at.T)].long()
    index = torch.stack([at[:, 0] + first, places, tokens], 1)
    return {"": index, **{name: value[tuple(at.T.to(value.device))] for name, (value, _) in found.items()}}


def _by_axes(run: Run, site: Site, examples: int, name: str) -> tuple[Tensor, bool]:
    """What a site holds as (examples, positions, ...), and whether it has positions; one position where it has none."""
    whole = run[Site(site.id)]
    if not isinstance(whole, Tensor):
        raise StoreError(f"{name!r} holds a {type(whole).__name__}, expected a tensor, such as a layer's output.")
    value, axes = run[site], kept(site, whole)
    if "examples" not in axes or value.shape[axes.index("examples")] != examples:
        raise StoreError(
            f"{name!r} has shape {tuple(value.shape)} with axes {axes}, and the batch has {examples} examples. Expected "
            f"these in a dimension; where it is another, name all: fmr.Site({str(site.id)!r}, layout=(...))."
        )
    if "positions" in axes and site.positions is not None:
        raise StoreError(f"{name!r} selects several positions. Expected all of them, or one, as site.at(positions=-1).")
    front = [axes.index(axis) for axis in ("examples", "positions") if axis in axes]
    value = value.permute([*front, *(dim for dim in range(value.dim()) if dim not in front)])
    return (value, True) if "positions" in axes else (value[:, None], False)
