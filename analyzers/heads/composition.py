"""Which heads and memories read what others wrote, from the weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers.heads.circuits import Circuits, Part
from analyzers.heads.compositions import Compositions
from analyzers.numbers.embed import Floats
from analyzers.prompts import prompts
from analyzers.protocol import AnalyzerError, Given, Method, check_eval
from fmr.errors import whole_number
from fmr.runs.run import Run
from fmr.structure.parts import Structure
from fmr.sweeps.bars import bar

ROLES = ("q", "k", "v", "in")


class Composition(Method):
    """How much of what one head or memory writes another one reads, by their weights: Q-, K- and V-composition.

    >>> reads = Composition(model).run(inputs)
    >>> reads.strongest(1, role="k")[0][:2]
    ('2.0', '0.2')

    model: any module whose layers normalise what they read of a residual stream (pre-norm). tokenizer: for inputs as text.

    A head moves `OV = W_O W_V` of one token to another, where `x_query^T QK x_key` with `QK = W_Q^T W_K` is large. Head b
    reads by its queries, keys or values what head a wrote as far as a product of their circuits is large:

        q: |QK_b^T OV_a| / (|QK_b| |OV_a|)      k: |QK_b OV_a| / (|QK_b| |OV_a|)      v: |OV_b OV_a| / (|OV_b| |OV_a|)

    in Frobenius norms: between 0 and 1, and `1 / sqrt(width)` in the mean square where one of the two is turned at random.
    A memory (all units of a layer, or of one expert) reads by the rows of its first projections ("in") and writes by its
    values; how much of it a router takes does not turn what it writes. No circuit is
    multiplied out: each is two factors of the rank of a head, of which the triangular parts have the same norms.

    The weights of norms are folded in, their division by the size of a token is not, nor are biases. Queries and keys are
    those before the rotation by their positions: what is measured is how a token sees its own place. A head that shares keys
    and values with others is one with its own queries and output. What has no such weights (its values are not reproduced by
    them) is left out, and `refused` says why.

    Source: N. Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer

    def run(
        self,
        inputs: Given,
        into: int | Sequence[int] | None = None,
        *,
        memories: bool = True,
        progress: bool | None = None,
    ) -> Compositions:
        """The composition of every earlier part with every later one.

        >>> Composition(model, tokenizer).run("Alice gave", into=3, memories=False).rank("2.1", "3.0", "k")
        (9, 12)

        inputs: any, of which the graph is made: a few tokens are enough, and the result does not depend on them. into: the
        layers whose parts read; None for all. memories: whether they are counted too.
        """
        check_eval(self.model)
        given = prompts(inputs, self.model, self.tokenizer)
        run = fmr.run(self.model, **given.inputs)
        structure = fmr.locate(run)
        with torch.no_grad():
            return self._measured(structure, run, into, memories, progress)

    def _measured(
        self, structure: Structure, run: Run, into: int | Sequence[int] | None, memories: bool, progress: bool | None
    ) -> Compositions:
        circuits = Circuits(structure, run)
        wanted = _layers(into, circuits)
        last = max(wanted)
        parts = [part for parts in circuits.heads(range(last + 1)) for part in parts]
        parts += list(circuits.memories(range(last + 1))) if memories else []
        if not parts:
            raise AnalyzerError(f"{structure.model} has no head whose weights are known. {_reasons(circuits.refused)}")
        readers = [(part, role) for part in parts if part.layer in wanted for role in ROLES if role in part.reads]
        writers = [part for part in parts if any(_precedes(part, reader) for reader, _ in readers)]
        if not writers:
            raise AnalyzerError(
                f"{structure.model} has no head or memory that writes before layers {sorted(wanted)} read: expected into= a "
                "later layer."
            )
        scores = np.full((len(readers), len(writers)), np.nan)
        for layer in bar(sorted(wanted), "Composition", progress, 4):
            rows = [n for n, (part, _) in enumerate(readers) if part.layer == layer]
            _fill(scores, [(n, *readers[n]) for n in rows], writers)
        width = int(parts[0].writes.shape[0])
        spread = [[_sharpness(part.reads[role]) for part, role in readers], [_sharpness(part.writes.mT) for part in writers]]
        return Compositions(
            scores=scores,
            z=_z(scores, np.array(spread[0]), np.array(spread[1]), width),
            readers=tuple(part.name for part, _ in readers),
            roles=tuple(role for _, role in readers),
            writers=tuple(part.name for part in writers),
            width=width,
            model=structure.model,
            refused=circuits.refused,
        )


def _layers(into: int | Sequence[int] | None, circuits: Circuits) -> frozenset[int]:
    """The layers whose parts read."""
    known = {number for number, _ in circuits.numbered()} | set(range(len(circuits.structure.layers)))
    if not known:
        raise AnalyzerError(f"{circuits.structure.model} has no layers: no attention and no memory on a residual stream.")
    if into is None:
        return frozenset(known)
    one = whole_number(into)
    several = [one] if one is not None else list(into) if isinstance(into, Iterable) and not isinstance(into, str) else []
    if not several or not known.issuperset(several):
        raise AnalyzerError(f"into={into!r}: expected layers of 0 to {max(known)}, as into=[1, 2], or None for all.")
    return frozenset(several)


def _reasons(refused: dict[str, str]) -> str:
    shown = "".join(f"\n  {reason}" for reason in list(refused.values())[:4])
    return f"Expected self-attention or memories on a residual stream. Refused:{shown or ' nothing was found.'}"


def _precedes(writer: Part, reader: Part) -> bool:
    return writer.stream == reader.stream and writer.at < reader.after


def _fill(scores: Floats, readers: list[tuple[int, Part, str]], writers: list[Part]) -> None:
    """Write the rows of these readers: one product for all readers of a shape with all writers of a shape."""
    for places, read in _stacked([(n, part.reads[role], part) for n, part, role in readers]):
        reader = next(part for n, part, _ in readers if n == places[0])
        seen = [(n, part.writes.mT, part) for n, part in enumerate(writers) if _precedes(part, reader)]
        for columns, written in _stacked(seen):
            product = read.flatten(0, 1) @ written.flatten(0, 1).mT
            norms = product.unflatten(0, read.shape[:2]).unflatten(2, written.shape[:2]).square().sum((1, 3)).sqrt()
            scores[np.ix_(places, columns)] = norms.double().cpu().numpy()


def _stacked(items: list[tuple[int, Tensor, Part]]) -> list[tuple[list[int], Tensor]]:
    """Factors of one shape, and of parts in one place, on top of one another, each of norm 1, with their numbers."""
    groups: dict[Any, list[tuple[int, Tensor]]] = {}
    for n, matrix, part in items:
        groups.setdefault((matrix.shape, part.after), []).append((n, matrix / matrix.norm().clamp(min=1e-30)))
    return [([n for n, _ in group], torch.stack([matrix for _, matrix in group])) for group in groups.values()]


def _sharpness(factor: Tensor) -> float:
    """tr P^2 / (tr P)^2 of P = factor^T factor: 1 / rank where all directions count alike, 1 where one alone does."""
    gram = factor.double() @ factor.double().mT
    return float(gram.square().sum() / gram.trace().square().clamp(min=1e-300))


def _z(scores: Floats, read: Floats, written: Floats, d: int) -> Floats:
    """How many standard deviations the squared scores lie above those of parts that are turned at random.

    Of symmetric P and S of trace 1 and a random rotation R in d dimensions, tr(P R S R^T) has the mean 1 / d and the second
    moment ((d + 1) - 2 p - 2 s + 2 d p s) / (d (d + 2) (d - 1)), where p = tr P^2 and s = tr S^2: exactly, for every d > 1.
    """
    p, s = read[:, None], written[None]
    second = ((d + 1) - 2 * p - 2 * s + 2 * d * p * s) / (d * (d + 2) * max(d - 1, 1))
    found: Floats = (scores**2 - 1 / d) / np.sqrt(np.maximum(second - 1 / d**2, 1e-300))
    return found
