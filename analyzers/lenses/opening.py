"""What every reading of the stream begins with: prompts, the model's structure, the points of the last stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from analyzers.causal.opening import first_run
from analyzers.prompts import Prompts, prompts
from analyzers.protocol import AnalyzerError, Given, Method, asked_tokens, check_eval
from fmr.errors import number_of, whole_number
from fmr.ids import Site, TensorId
from fmr.runs.run import Run
from fmr.structure.logits import Readout
from fmr.structure.parts import Structure

Layout = tuple[str, ...] | None
"""What each dimension of a value counts; None where nobody knows."""


class Reading(Method):
    """A method that reads what a model writes to its stream; the model is located once, and again where a batch has one
    example or one position and others had not: then its values are laid out in another way."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._structures: dict[tuple[bool, bool], Structure] = {}

    def _opened(self, inputs: Given) -> tuple[Prompts, Structure]:
        """The prompts, and the structure of the model in a run of the first two: its IDs hold for any number."""
        check_eval(self.model)
        given = prompts(inputs, self.model, self.tokenizer)
        shape = len(given) > 1, max(given.lengths) > 1
        if shape not in self._structures:
            with torch.no_grad():
                self._structures[shape] = fmr.locate(first_run(self.model, given))
        return given, self._structures[shape]


def run_with(model: nn.Module, given: Prompts, wanted: Iterable[TensorId]) -> Run:
    """A run of prompts that keeps these values, and the graph, whose sizes are those of this batch."""
    names = set(wanted)
    with torch.no_grad():
        return fmr.run(model, keep=lambda node: node.id in names, **given.inputs)


def readout_of(structure: Structure) -> Readout:
    """The way of a model's stream to its logits; `AnalyzerError` where there is none to read earlier points by."""
    if isinstance(structure.readout, str):
        raise AnalyzerError(
            f"Nothing can be read out of {structure.model}: {structure.readout}. Expected pre-norm layers and logits."
        )
    return structure.readout


def spelling(structure: Structure, tokenizer: Any, *answers: Any) -> Any:
    """The tokenizer where logits are of words; None where they are of classes, whose answers are numbers."""
    readout = readout_of(structure)
    if readout.of_words:
        return tokenizer
    every = [one for some in answers for one in (some if isinstance(some, list | tuple) else [some])]
    text = next((one for one in every if isinstance(one, str)), None)
    if text is not None:
        last = readout.graph[readout.way[-1]].shape[-1] - 1
        raise AnalyzerError(
            f"The answer {text!r} is text, and the logits of {structure.model} are of classes: expected numbers from 0 to "
            f"{last}."
        )
    return None


def points_of(structure: Structure) -> dict[str, Site]:
    """The stream after each layer of the last stream and at its end, by the name of the layer.

    >>> list(points_of(structure))
    ['0', '1', '2', '3']
    """
    stream, layout = structure.residual, layout_of(structure)
    posts = _posts(structure)
    if not posts:  # layers of neither attention nor memories: each write is one
        posts = [Site(write.after, layout=layout) for write in stream.writes]
    found = {str(number): site for number, site in enumerate(posts)}
    end = stream.writes[-1].after
    if not posts or posts[-1].id != end:
        found["end"] = Site(end, layout=layout)
    return found


def layout_of(structure: Structure) -> Layout:
    """What the dimensions of the last stream count, where its layers tell."""
    return next((site.layout for site in _posts(structure)), None)


def _posts(structure: Structure) -> list[Site]:
    stream = structure.residual
    own = {*stream.points, *(write.after for write in stream.writes)}
    return [layer.resid_post for layer in structure.layers if layer.resid_post.id in own]


def mask_of(given: Prompts, shape: Iterable[int], tokens: Callable[..., Tensor] = asked_tokens) -> Tensor:
    """Which tokens of a batch are real, (examples, positions): those of the decoder, where there are two kinds."""
    name = "decoder_attention_mask" if "decoder_input_ids" in given.inputs else "attention_mask"
    mask = given.inputs.get(name)
    fits = isinstance(mask, Tensor) and tuple(mask.shape) == tuple(shape)
    return tokens(mask if fits else None, *shape)


def read_by_head(structure: Structure, run: Run, mask: Tensor) -> Tensor | None:
    """The column of each example that its logits are made of; None where each column has logits of its own."""
    read = readout_of(structure).columns(run)
    if read is None:
        return None
    if read.shape != mask.shape or bool((read.sum(1) != 1).any()):
        raise AnalyzerError(
            f"The logits of {structure.model} are made of {int(read.sum(1).max())} positions of each example at once, "
            "expected one: read_out(run, site) of fmr.locate(run) reads a point of the stream as a whole."
        )
    columns = read.int().argmax(1)
    padding = (~mask[torch.arange(len(mask)), columns]).nonzero()[:, 0].tolist()
    if padding:
        raise AnalyzerError(
            f"The logits of {structure.model} are those of column {int(columns[padding[0]])} alone, which is padding in "
            f"example {', '.join(map(str, padding[:4]))}. Expected padding on the left."
        )
    return columns


def place_of(mask: Tensor, position: int | None, read: Tensor | None) -> Tensor | None:
    """The column of each example at a position, None for every one; `read` is the one that its logits are made of."""
    if position is None:
        return read
    columns = columns_of(mask, position)
    if read is not None and not torch.equal(columns, read):
        raise AnalyzerError(
            f"position={position}: this model gives the logits of one column of each example alone, "
            f"{', '.join(map(str, read.unique().tolist()))}, which is another. Expected position=None."
        )
    return columns


def columns_of(mask: Tensor, position: int) -> Tensor:
    """The column of the real token at a position of each example."""
    if whole_number(position) is None:
        raise AnalyzerError(f"position={position!r}: expected the number of a token, such as 0 or -1.")
    lengths = mask.sum(1)
    if not bool(((position < lengths) & (-position <= lengths)).all()):
        raise AnalyzerError(
            f"position={position}: the shortest prompt has {number_of(int(lengths.min()), 'token')}, expected "
            f"{-int(lengths.min())} to "
            f"{int(lengths.min()) - 1}."
        )
    place = torch.where(torch.tensor(position) < 0, lengths + position, torch.tensor(position))
    return (mask.cumsum(1) - 1 - place[:, None]).abs().masked_fill(~mask, mask.shape[1]).argmin(1)


def rows_of(states: Tensor, examples: int, model: str, layout: Layout = None) -> Tensor:
    """Values of a stream as (examples, positions, width), also where it holds all tokens as rows, or positions first."""
    if states.dim() == 3 and (layout == ("positions", "examples", "units") or examples == states.shape[1] == 1):
        states = states.transpose(0, 1)
    if states.dim() == 2 and len(states) % examples == 0:
        states = states.unflatten(0, (examples, -1))
    if states.dim() != 3 or len(states) != examples:
        raise AnalyzerError(
            f"The stream of {model} has shape {list(states.shape)}, expected ({examples}, positions, width)."
        )
    return states


def by_position(logits: Tensor, mask: Tensor, model: str) -> Tensor:
    """Logits as (examples, positions, vocabulary), or of the last position alone."""
    examples, positions = mask.shape
    found = logits.reshape(examples, -1, logits.shape[-1])
    if found.shape[1] not in (positions, 1):
        raise AnalyzerError(
            f"The logits of {model} have shape {list(logits.shape)}, expected one distribution for each of {positions} "
            f"positions of {examples} examples."
        )
    return found


def labelled(tokens: Sequence[Sequence[str]], mask: Tensor) -> list[list[str]]:
    """The token at each column of each example, its number where tokens are not those of the mask; nothing on padding.

    >>> labelled([["a", "b"]], torch.tensor([[False, True, True]]))
    [['', 'a', 'b']]
    """
    found = []
    for own, real in zip(tokens, mask.tolist(), strict=True):
        left = iter(own if len(own) == sum(real) else map(str, range(sum(real))))
        found.append([next(left) if one else "" for one in real])
    return found
