"""What a batch tells of memories: their coefficients at each real token, and which prefix each of these ends."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.memories.written import Passage, passage, write_of
from analyzers.protocol import AnalyzerError, check_eval, real_tokens
from analyzers.sites import found_in, read_at
from fmr.errors import number_of
from fmr.ids import Site, TensorId
from fmr.runs.run import Run
from fmr.structure.memories.memory import Memory
from fmr.structure.normal.match import depends_on
from fmr.structure.parts import Structure

_EXAMPLES = 2
"""How many examples of a first batch are tracked in full, to find the memories in."""


@dataclass(frozen=True, eq=False)
class Found:
    """The memories of a model by the number of their layer, their ways into the stream or why there is none, and the
    structure that they are of."""

    layers: tuple[int, ...]
    blocks: tuple[Memory, ...]
    ways: tuple[Passage | str, ...]
    structure: Structure

    def of(self, layers: Sequence[int]) -> "Found":
        """Those of some layers."""
        places = [self.layers.index(number) for number in sorted(set(layers))]
        return Found(
            tuple(self.layers[place] for place in places),
            tuple(self.blocks[place] for place in places),
            tuple(self.ways[place] for place in places),
            self.structure,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many memories each layer has, those of all its experts."""
        routes = map(experts_of, self.blocks)
        return tuple(block.n * (route.number if route else 1) for block, route in zip(self.blocks, routes, strict=True))

    @property
    def gated(self) -> bool:
        """Whether some have a gate, so that coefficients have both signs."""
        return any(block.w_gate is not None or block.fused_gate for block in self.blocks)


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a batch: a number for each, made of what it says, its tokens, and which columns hold these."""

    numbers: Tensor
    tokens: tuple[np.ndarray[Any, np.dtype[np.int32]], ...]
    real: Tensor


def find(model: nn.Module, inputs: Mapping[str, Any], scope: str, tokens: str = "") -> Found:
    """The memories that hold one vector for all tokens, of the layers whose module calls match a glob.

    >>> find(model, inputs, "*").layers
    (0, 1, 2, 3)

    tokens: the argument whose tokens are theirs, if there is one.
    """
    sizes = [len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    few = {
        name: value[:_EXAMPLES] if isinstance(value, Tensor) and value.dim() and len(value) == max(sizes) else value
        for name, value in inputs.items()
    }
    (structure,), run = found_in(model, few, lambda structure: (structure,))
    every = [(number, block) for number, layer in enumerate(structure.layers) for block in layer.mlps]
    chosen = [(number, block) for number, block in every if fnmatchcase(block.scope, scope)]
    if not chosen:
        raise AnalyzerError(_none(structure, every, scope))
    for one, two in pairwise(chosen):
        if one[0] == two[0]:
            raise AnalyzerError(
                f"Layer {one[0]} of {structure.model} has memories at {one[1].scope!r} and {two[1].scope!r}. Expected one a "
                f"layer: choose by a glob, such as scope={one[1].scope.replace(f'.{one[0]}.', '.*.')!r}."
            )
    for number, block in chosen:
        if not _reads(structure, block, tokens):
            raise AnalyzerError(
                f"The memories of layer {number} at {block.scope!r} are at other tokens than {tokens}. {_STACKS}"
            )
    ways = tuple(_way(structure, block, run) for _, block in chosen)
    return Found(tuple(number for number, _ in chosen), tuple(block for _, block in chosen), ways, structure)


_STACKS = (
    "Of a model with several stacks choose one, with its tokens and mask: KeyValueMemories(model, scope='decoder.*', "
    "tokens='decoder_input_ids', mask='decoder_attention_mask')."
)


def _reads(structure: Structure, block: Memory, tokens: str) -> bool:
    """Whether the stream that memories write to begins with the tokens of an argument, as far as that can be told."""
    given = TensorId(f"input:{tokens}")
    if given not in block.graph:
        return True
    try:
        write = write_of(structure, block)
    except AnalyzerError:
        return True
    start = next(stream.points[0] for stream in structure.streams if write in stream.writes)
    return depends_on(block.graph, start, given)


def _way(structure: Structure, block: Memory, run: Run) -> Passage | str:
    """The way of a layer's memories into the stream, or why there is none."""
    try:
        return passage(structure, block, run)
    except AnalyzerError as error:
        return str(error)


def _none(structure: Structure, every: list[tuple[int, Memory]], scope: str) -> str:
    if every:
        scopes = ", ".join(dict.fromkeys(repr(block.scope) for _, block in every[:4]))
        return f"scope={scope!r} matches none of the memories of {structure.model}, which are at {scopes}."
    reasons = [repr(one) for one in structure.rejected if one.what == "memory"][:3]
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return (
        f"{structure.model} has no memories that could be counted{why}. Expected layers of two projections with a "
        "nonlinearity between them, written to a residual stream; fmr.locate(fmr.run(model, ...)) shows what was found."
    )


def coefficients(model: nn.Module, inputs: Mapping[str, Any], found: Found, shape: tuple[int, int] | None) -> list[Tensor]:
    """The coefficients of each layer in one batch, (examples, positions, memories).

    shape: the examples and positions of the tokens, where there are tokens.
    """
    check_eval(model)
    routes = [experts_of(block) for block in found.blocks]
    sites = [block.post for block in found.blocks] + [Site(name) for one in routes if one for name in (one.tokens, one.ends)]
    with torch.no_grad():
        run = read_at(model, inputs, sites)
        return [
            laid(run[block.post.id].detach(), block.post.layout, block, number, shape)
            if route is None
            else _routed(run, block, route, number, shape)
            for number, block, route in zip(found.layers, found.blocks, routes, strict=True)
        ]


class Experts(NamedTuple):
    """How the memories of several experts are read: how many there are, the token of each row, where rows of each end."""

    number: int
    tokens: TensorId
    ends: TensorId


def experts_of(block: Memory) -> Experts | None:
    """The experts of a layer, where one grouped product reads the rows of each behind those of another; None for others.

    >>> experts_of(structure.mlps[2])
    """
    graph = block.graph
    down, source = graph[block.down], graph[block.source]
    if down.op != "grouped_mm" or source.op not in ("getitem", "index_select") or len(source.parents) != 2:
        return None
    ends = next((parent.id for parent in down.parents if parent.at in ("offs", "2")), None)
    return None if ends is None else Experts(len(block.weights[block.values]), source.parents[1].id, ends)


def _routed(run: Run, block: Memory, route: Experts, layer: int, shape: tuple[int, int] | None) -> Tensor:
    """Coefficients of all experts, one after the other; those of an expert that a token does not go to are 0."""
    value, tokens, ends = (run[name].detach() for name in (block.post.id, route.tokens, route.ends))
    if shape is None:
        raise AnalyzerError(f"Layer {layer} has experts, and there are no token ids to tell their rows apart.")
    experts = torch.searchsorted(ends.long(), torch.arange(len(value), device=value.device), right=True)
    made = value.new_zeros(shape[0] * shape[1], route.number, value.shape[-1])
    made[tokens.long(), experts] = value
    return made.view(*shape, -1)


def laid(value: Tensor, layout: Sequence[str] | None, block: Memory, layer: int, shape: tuple[int, int] | None) -> Tensor:
    """Coefficients, or what they make, as (examples, positions, memories or units), whatever order their dimensions have."""
    names = tuple(layout or ()) or {2: ("examples", "units"), 3: ("examples", "positions", "units")}.get(value.dim(), ())
    experts = block.weights[block.values].dim() == 3 if block.weights else False
    made = None
    if experts or len(names) != value.dim():
        made = None
    elif names[-1] == "units" and "positions" not in names and value.shape[:-1] == shape:  # as the tokens lie
        made = value
    elif names[-1] == "units" and "positions" not in names and value.shape[:-1] == (shape or ())[::-1]:
        made = value.transpose(0, 1)
    elif set(names) == {"examples", "positions", "units"}:
        made = value.permute([names.index(name) for name in ("examples", "positions", "units")])
    elif names == ("rows", "units") and shape is not None and len(value) == shape[0] * shape[1]:
        made = value.unflatten(0, shape)
    elif names == ("examples", "units"):
        made = value[:, None]
    elif names == ("positions", "units"):
        made = value[None]
    if made is None:
        what = (
            "one matrix for each of several experts, not read by one grouped product,"
            if experts
            else f"coefficients {tuple(value.shape)} by {names}"
        )
        raise AnalyzerError(
            f"The memories of layer {layer} at {block.scope!r} have {what} so that they are not one for each token. "
            "Expected (examples, positions, memories): leave such layers out with a glob, as scope='*.shared_expert'."
        )
    if shape is not None and tuple(made.shape[:2]) != shape:
        raise AnalyzerError(
            f"The memories of layer {layer} at {block.scope!r} are at {number_of(made.shape[1], 'position')} of "
            f"{number_of(len(made), 'example')}, "
            f"the tokens at {shape[1]} of {shape[0]}. {_STACKS}"
        )
    return made


def texts_of(inputs: Mapping[str, Any], tokens: str, mask: str, shape: Sequence[int]) -> Texts:
    """The texts of a batch; the number of each is a digest of its real tokens and of all that goes in beside them."""
    examples, positions = shape
    real = real_tokens(inputs.get(mask), examples, positions)
    given = inputs.get(tokens)
    ids = given.detach().cpu().numpy().astype(np.int32) if isinstance(given, Tensor) and is_tokens(given) else None
    others = [
        value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name not in (mask, "position_ids") and value.dim() and len(value) == examples
    ]
    numbers, rows = [], []
    for row in range(examples):
        told = hashlib.blake2b(digest_size=8)
        for value in others:
            own = value[row][real[row]] if value.shape[:2] == real.shape else value[row]
            told.update(own.contiguous().numpy().tobytes())
        numbers.append(int.from_bytes(told.digest(), "big") >> 1)
        rows.append(np.zeros(0, np.int32) if ids is None else ids[row][real[row].numpy()])
    return Texts(torch.tensor(numbers), tuple(rows), real)


def token_argument(inputs: Mapping[str, Any], mask: str, asked: str | None = None) -> str:
    """The name of the argument that holds token ids: `input_ids`, or the only one of whole numbers; empty for none.

    asked: the name that they have if there is one.
    """
    if asked and not is_tokens(inputs.get(asked)):
        held = ", ".join(map(repr, inputs))
        raise AnalyzerError(f"tokens={asked!r} and the batch holds {held}: expected token ids (examples, positions) there.")
    if asked is not None:
        return asked
    beside = (mask, "position_ids", "token_type_ids")
    names = [name for name, value in inputs.items() if is_tokens(value) and name not in beside]
    if "input_ids" in names or len(names) == 1:
        return "input_ids" if "input_ids" in names else names[0]
    if names:
        raise AnalyzerError(f"Both {' and '.join(names)} hold whole numbers. Name the tokens: tokens={names[0]!r}.")
    return ""


def is_tokens(given: Any) -> bool:
    """Whether an argument holds token ids, (examples, positions)."""
    return isinstance(given, Tensor) and given.dim() == 2 and not given.is_floating_point()
