"""Where attributions go: the place that is meant, what kind of value stands there, and what it is drawn on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

import fmr
from analyzers.images.counts import PLACES, UNITS, counts_of
from analyzers.prompts import Prompts
from analyzers.protocol import AnalyzerError, real_tokens
from fmr.edits.frames import Frames
from fmr.errors import nearest, number_of
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.interventions.roles import sites_by_role
from fmr.nodes import Key, id_of
from fmr.runs.run import Run
from fmr.structure.normal.vocabulary import MOVES, SAME

_ROLE = re.compile(r"^(?:(?:layers|attention|mlps|streams)\[-?\d+\]\.\S+|embedding|final_norm|unembedding)$")


PICTURE = ("examples", "units", "rows", "columns")
"""How pictures lie."""

_CARRIED = MOVES | SAME | {"embedding"}
"""Ops through which token ids go as they are, and what looks them up."""


def is_role(text: str) -> bool:
    """Whether text is written as a role."""
    return _ROLE.match(text) is not None


def place_of(at: Key | None, model: nn.Module, inputs: Mapping[str, Any], run: Callable[[], Run]) -> Site:
    """The site that attributions go to: what is asked for, the embedding of tokens, or the first floating-point input.

    run: makes a run of the model on these inputs, for what is located.
    """
    if isinstance(at, str) and is_role(at) and at not in dict(model.named_modules()):
        known = sites_by_role(fmr.locate(run()))
        if at not in known:
            raise AnalyzerError(f"fmr.locate found no {at} in {type(model).__name__}.{nearest(at, known)}")
        return known[at]
    if at is not None:
        site = at if isinstance(at, Site) else Site(id_of(at))
        inner = not site.layout and not site.id.startswith("input:")
        return _seen(site, run()) if inner and any(map(_is_picture, inputs.values())) else site
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        embedding = _looked_up(run(), "input_ids")
        if embedding is None:
            raise AnalyzerError(
                f"fmr.locate found no embedding of tokens in {type(model).__name__}. Say where attributions go: at=, an ID "
                "or the path of the module that looks them up."
            )
        return embedding
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return Site(TensorId(f"input:{name}"))
    whole = [name for name, one in inputs.items() if isinstance(one, Tensor) and one.dtype in (torch.int32, torch.int64)]
    found = [one for name in whole for one in _embeddings(run().graph, name)]
    if len(found) == 1:
        return Site(found[0])
    raise AnalyzerError(
        f"None of the inputs, {', '.join(inputs)}, holds floating-point numbers, none is called input_ids, and "
        f"{number_of(len(found), 'place')} in {type(model).__name__} look them up. Say where attributions go: at=, an ID or "
        "the path of a module."
    )


def _seen(site: Site, run: Run) -> Site:
    """A site that says so where its value is a picture of many colours, as far as the operations tell."""
    if site not in run.graph or len((node := run.graph[site]).shape) != 4:
        return site
    counts = counts_of(run.graph).get(node.id, ())
    return replace(site, layout=PICTURE) if counts[1:] == (UNITS, PLACES, PLACES) else site


def _embeddings(graph: Graph, name: str) -> list[TensorId]:
    """Where whole numbers that a model is given are looked up."""
    reached = [graph[f"input:{name}"]] if f"input:{name}" in graph else []
    for node in reached:
        reached += [one for one in graph.readers(node.id) if one.op in _CARRIED and one not in reached]
    return [node.id for node in reached if node.op == "embedding"]


def _looked_up(run: Run, name: str) -> Site | None:
    """Where the token ids of a run are looked up: the one place where they are, or of several that of the logits."""
    found = _embeddings(run.graph, name)
    if len(found) == 1:
        return Site(found[0])
    made = fmr.locate(run).embedding
    return made if made is not None and (made.id in found or not found) else None


AXES = {4: ("units",), 3: ("positions", "units")}
"""Of pictures and tokens, what the dimensions behind that of examples count, as far as a site may say it."""


def kind_of(value: Tensor, inputs: Mapping[str, Any], place: Site) -> str:
    """Whether a value (1, ...) is a picture, or made of one; tokens, or their ids; or plain numbers.

    A site that says that its value lies in another way has plain numbers.
    """
    own, told = AXES.get(value.dim(), ()), names_of(place, value)
    if told and told[1 : len(own) + 1] != own:
        return "values"
    if value.dim() == 4 and any(map(_is_picture, inputs.values())):
        return "image" if told or place.id.startswith("input:") else "values"
    ids = inputs.get("input_ids")
    are_ids = isinstance(ids, Tensor) and not value.is_floating_point() and value.shape == ids.shape and value.dim() == 2
    return "tokens" if value.dim() == 3 or are_ids else "values"


def strange_layout(place: Site, value: Tensor, kind: str) -> str:
    """What is to be said of an input whose colours seem to lie last; nothing of others."""
    colours = (1, 3, 4)
    if kind != "image" or not place.id.startswith("input:") or value.shape[1] in colours or value.shape[3] not in colours:
        return ""
    return (
        f"{place!r} {list(value.shape)} is read as (examples, colours, height, width), and colours seem to lie last: layout="
    )


def assumed_layout(place: Site, value: Tensor, kind: str, inputs: Mapping[str, Any]) -> str:
    """What is to be said of three dimensions that are taken for those of tokens where nothing says so; else nothing."""
    by_ids = any(isinstance(one, Tensor) and one.shape == value.shape[:2] for one in inputs.values())
    if kind != "tokens" or value.dim() != 3 or place.layout or by_ids:
        return ""
    return (
        f"{place!r} {list(value.shape)} is taken for (examples, positions, units), with a score for each position; where it "
        "lies otherwise, say layout="
    )


def _is_picture(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 4 and (value.is_floating_point() or value.dtype == torch.uint8)


def names_of(place: Site, value: Tensor) -> tuple[str, ...]:
    """What a site says that the dimensions of a value (1, ...) count, "" for one in front; nothing where it says nothing."""
    told = tuple(name for name in place.layout or () if not isinstance(place.selection.get(name), int))
    return told if len(told) == value.dim() else ("", *told) if told and len(told) == value.dim() - 1 else ()


def real_in(value: Tensor, inputs: Mapping[str, Any], place: Site, frames: Frames) -> Tensor:
    """At which positions of a value (1, ...) tokens stand and no padding, (1, ..., positions, ..., 1) along their dimension.

    True where nothing says which dimension that is. frames: what the pass tells of its columns.
    """
    names, tokens = names_of(place, value), kind_of(value, inputs, place) == "tokens"
    axis = 1 if tokens else names.index("positions") if "positions" in names else None
    if axis is None:
        return torch.ones([1] * value.dim(), dtype=torch.bool)
    mask, many = inputs.get("attention_mask"), value.shape[axis]
    told = [mask] if isinstance(mask, Tensor) and mask.shape == (1, many) else []
    told += [torch.ones(1, many) if one.mask is None else one.mask[:, -many:] for length, one in frames if length == many]
    found = {tuple(real_tokens(one, 1, many)[0].tolist()) for one in told}
    if len(found) > 1:
        raise AnalyzerError(
            f"{place!r} has {many} positions, and so have several inputs of the model that are padded differently. Expected "
            "inputs of different lengths: pad one of them further."
        )
    real = torch.tensor(found.pop() if found else [True] * many)
    return real.view([many if n == axis else 1 for n in range(value.dim())])


def without_padding(value: Tensor, real: Tensor) -> Tensor:
    """A value, or several, (..., positions, ...), of which what is padding is left out."""
    if bool(real.all()):
        return value
    axis = max(range(real.dim()), key=lambda n: real.shape[n])
    return value.index_select(axis - real.dim(), real.flatten().nonzero()[:, 0].to(value.device))


def tokens_of(given: Prompts, real: Tensor) -> tuple[tuple[str, ...], ...]:
    """The tokens of each example, which stand at `real` (examples, positions), as text or ids; else the numbers of these."""
    ids = given.inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.shape == real.shape and list(given.lengths) == real.sum(1).tolist():
        return given.tokens
    if ids is None and given.ids is not None and given.ids.shape == real.shape:
        return tuple(tuple(map(str, row[kept].tolist())) for row, kept in zip(given.ids.cpu(), real, strict=True))
    return tuple(tuple(map(str, row.nonzero()[:, 0].tolist())) for row in real)


def images_of(given: Prompts) -> Tensor | None:
    """The pictures among the inputs, (examples, height, width, 3) from 0 to 1, as drawn; None where there are none."""
    found = next(
        (one for one in given.inputs.values() if _is_picture(one) and one.shape[1] in (1, 3)),
        None,
    )
    if found is None:
        return None
    pictures = found.detach().float().cpu().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
    return ((pictures - low) / (high - low).clamp(min=1e-12)).contiguous()
