"""What a probe is given of one batch: labels, what each is a label of, and vectors at sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.lenses.opening import mask_of
from analyzers.probes.rows import Hashes, Rows, by_position, digests
from analyzers.prompts import Prompts, prompts
from analyzers.protocol import AnalyzerError, Batch, asked_tokens, real_tokens
from fmr.edits.places import kept
from fmr.ids import Site
from fmr.nodes import called, sites_by_name
from fmr.runs.run import Run
from fmr.structure.parts import Structure

NONE = -100
"""The label of what is not labelled, as torch's losses have it."""


def opened(batch: Batch, labels: str, types: str | None, model: nn.Module, tokenizer: Any) -> tuple[Prompts, Tensor, Any]:
    """The inputs of a model, the labels, and the types that were given of a batch."""
    if not isinstance(batch, Mapping):
        raise AnalyzerError(
            f"A batch is a {type(batch).__name__}, expected a mapping with the model's arguments and its labels: "
            f"{{'input_ids': ids, {labels!r}: labels}}."
        )
    inputs = dict(batch)
    if labels == types:
        raise AnalyzerError(f"labels={labels!r} and types={types!r}: expected two keys of the batch, or types=None.")
    for name in (labels, types):
        if name is not None and name not in inputs:
            raise AnalyzerError(
                f"The batch holds {', '.join(inputs) or 'nothing'}, and no {name!r}. Expected it beside the model's "
                f"arguments, {{..., {name!r}: one for each example or token}}; Probe(..., labels=) names another key."
            )
    found = as_labels(inputs.pop(labels), labels)
    kinds = as_labels(inputs.pop(types), types) if types is not None else None
    texts = next(
        (value for value in inputs.values() if isinstance(value, list) and value and isinstance(value[0], str)), None
    )
    if texts is not None and len(inputs) > 1:
        raise AnalyzerError(
            f"The batch holds texts beside {' and '.join(name for name in inputs if inputs[name] is not texts)}. Expected "
            "texts alone, or the model's arguments, as a tokenizer returns them."
        )
    given = prompts(inputs if texts is None else texts, model, tokenizer)
    mask = given.inputs.get("attention_mask")
    padding = mask.to(found.device) == 0 if isinstance(mask, Tensor) and mask.shape == found.shape else None
    if texts is not None and padding is not None and bool(((found != NONE) & padding).any()):
        raise AnalyzerError(
            f"{labels!r} has a label on padding: texts are padded in front. Expected {NONE} there, and behind it as many "
            "labels as tokens."
        )
    for name, one in ((labels, found), (types, kinds)):
        if one is not None and (one.dim() not in (1, 2) or len(one) != len(given)):
            raise AnalyzerError(
                f"{name!r} has shape {tuple(one.shape)}, and the batch has {len(given)} examples. Expected one for each, "
                f"({len(given)},), or one for each token, ({len(given)}, positions), with {NONE} for none."
            )
    if kinds is not None and kinds.shape != found.shape:
        raise AnalyzerError(f"{types!r} has shape {tuple(kinds.shape)}, expected {tuple(found.shape)}, as {labels!r} has.")
    return given, found, kinds


def as_labels(given: Any, name: str) -> Tensor:
    """Whole numbers as a tensor."""
    try:
        found = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise AnalyzerError(
            f"{name!r} is a {type(given).__name__} of what are no numbers, expected the number of a class for each example "
            "or token."
        ) from None
    if found.numel() and (found.is_floating_point() or found.is_complex()):
        raise AnalyzerError(
            f"{name!r} holds {str(found.dtype).removeprefix('torch.')}, expected whole numbers, one for each class. Cut "
            "quantities into classes first."
        )
    return found.long()


def named(sites: Any) -> dict[str, Site]:
    """Sites by name, as they are given, or one clear error."""
    found = sites_by_name(sites)
    if found is None:
        raise AnalyzerError(
            f"sites={sites!r}: expected sites, IDs or paths of modules, each once, as sites=[layer.resid_post for layer in "
            "structure.layers], or a mapping from names to them."
        )
    return found


def states(structure: Structure, run: Run) -> dict[str, Site]:
    """The stream after each layer of the stack that ends last; where it has none, the states that it passes on."""
    if not structure.streams:
        raise AnalyzerError(f"{structure.model} has no stream to read. Expected sites, as Probe(model, sites=[...]).")
    last = structure.streams[-1]
    own = {*last.points, *(write.after for write in last.writes)}
    layers = {f"layers[{n}].resid_post": layer.resid_post for n, layer in enumerate(structure.layers)}
    found = {name: site for name, site in layers.items() if site.id in own}
    points = {str(point): Site(point) for point in last.points}
    return found or {name: site for name, site in points.items() if run[site].is_floating_point()}


def read(run: Run, given: Prompts, sites: Mapping[str, Site], labels: Tensor, types: Any, position: int) -> Rows:
    """The labelled vectors of a batch."""
    examples, by_token = len(given), labels.dim() == 2
    found = {name: vectors(run, site, position, by_token, examples) for name, site in sites.items()}
    for name, value in found.items():
        if by_token and value.shape[1] != labels.shape[1]:
            raise AnalyzerError(
                f"The labels have {labels.shape[1]} positions, and {name!r} has {value.shape[1]}. Expected one label for "
                f"each column of the inputs, {NONE} on padding."
            )
    real = real_of(given, labels.shape)
    chosen = real & (labels != NONE) if by_token else labels != NONE
    at = chosen.nonzero(as_tuple=True)
    content = digests(given.inputs, real if real.dim() == 2 else real[:, None])
    if types is not None:
        kinds: Hashes = types.numpy().astype(np.uint64)
    else:
        kinds = _tokens(given, labels) if by_token else content
    places = real.long().cumsum(1) - 1 if by_token else torch.zeros_like(labels)
    where = tuple(one.numpy() for one in at)
    return Rows(
        content[where[0]],
        kinds[where],
        places[at].numpy(),
        labels[at].numpy(),
        {name: value[tuple(one.to(value.device) for one in at)] for name, value in found.items()},
    )


def real_of(given: Prompts, shape: Sequence[int]) -> Tensor:
    """Which tokens are no padding, (examples, positions), where that is the shape; of inputs without any, one an example."""
    if len(shape) == 2:
        return mask_of(given, shape, real_tokens)
    ids = given.inputs.get("decoder_input_ids", given.inputs.get("input_ids"))
    tokens = ids.shape if isinstance(ids, Tensor) and ids.dim() == 2 else (len(given), 1)
    return mask_of(given, tokens, asked_tokens)


def _tokens(given: Prompts, labels: Tensor) -> Hashes:
    """What stands at each position: its token."""
    others = (name for name in given.inputs if not name.endswith("mask") and name not in ("position_ids", "token_type_ids"))
    ids = (given.inputs.get(name) for name in ("decoder_input_ids", "input_ids", *others))
    fits = (one for one in ids if isinstance(one, Tensor) and one.dim() > 1 and one.shape[:2] == labels.shape)
    if (found := next(fits, None)) is None:
        raise AnalyzerError(
            f"No input holds one thing for each of {labels.shape[1]} positions, so that what is labelled has no type. "
            "Expected types=, a key of the batch with the type of each."
        )
    return by_position(found)


def vectors(run: Run, site: Site, position: int, by_token: bool, examples: int) -> Tensor:
    """What a site holds as (examples, width), or (examples, positions, width) where labels are of tokens."""
    whole = run[Site(site.id)]
    if not isinstance(whole, Tensor) or not whole.is_floating_point():
        what = f"{str(whole.dtype)[6:]} numbers" if isinstance(whole, Tensor) else f"a {type(whole).__name__}"
        raise AnalyzerError(f"{called(site)!r} holds {what}, expected a tensor of floats, such as a layer's output.")
    axes = site.axes(whole)
    if not by_token and "positions" in axes and site.positions is None:
        site = site.at(positions=position)
    value, names = run[site], kept(site, whole)
    front = ["examples", *(["positions"] if "positions" in names else [])]
    if "examples" not in names or len(names) < len(front) + 1 or value.shape[names.index("examples")] != examples:
        raise AnalyzerError(
            f"{called(site)!r} has shape {tuple(value.shape)} with axes {names}, expected those of {examples} examples and "
            f"of units. Where it is laid out otherwise, say so: fmr.Site({str(site.id)!r}, layout=(...))."
        )
    rest = [axis for axis in names if axis not in front]
    value = value.permute([names.index(axis) for axis in (*front, *rest)]).flatten(len(front))
    if not bool(value.isfinite().all()):
        raise AnalyzerError(f"{called(site)!r} holds numbers that are not finite. Expected finite ones; narrow the site.")
    if not by_token and len(front) == 2:
        if value.shape[1] != 1:
            raise AnalyzerError(
                f"{called(site)!r} selects {value.shape[1]} positions, and there is one label for each example. Expected "
                "one position, as site.at(positions=-1)."
            )
        return value[:, 0]
    if by_token and len(front) == 1:
        raise AnalyzerError(
            f"The labels are one for each token, and {called(site)!r} has axes {names}, without positions. Expected one "
            "label for each example."
        )
    return value
