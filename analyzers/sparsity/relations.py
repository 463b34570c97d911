"""Relations between tokens, read out of the weights: what heads and memories write of a subject, and for which object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers.heads.circuits import Circuits
from analyzers.memories.vocabulary import value_vectors, wordless
from analyzers.memories.written import passage
from analyzers.numbers.embed import Floats
from analyzers.prompts import Prompts, prompts, token_ids
from analyzers.protocol import AnalyzerError, Method, check_eval
from analyzers.sparsity.related import Relations
from fmr.errors import StructureError
from fmr.runs.run import Run
from fmr.structure.parts import Structure

SOURCES = ("token", "stream")


class TokenRelations(Method):
    """For each head and memory, which objects it speaks for where it is given a subject, and by how unlikely a chance.

    >>> found = analyzers.TokenRelations(model, tokenizer).run(world.subjects()[:8], ["Brigost", "Oranby", "Quelm"])
    >>> found.graph(fdr=0.05)
    <networkx.classes.digraph.DiGraph object at ...>

    A head writes `W_O W_V x` of what it looks at, whatever makes it look there; a memory writes its values weighed by the
    coefficients that it has there. `x` is the stream at the last token of the subject, before the first layer (source
    "token", for heads alone) or before the layer (source "stream"). The score of an object is the cosine between what is
    written and what the model's own read-out makes its logit of, both less their means: over subjects, and over objects.

    In the small model that ships with fmr the memories of the last layer speak most for a person's own town for 96 % of the
    people where the prompt has asked for it ("... grew up in"), with exchanged towns for 4 %; at the bare name the best part
    is a head, for 26 %.

    The null turns what is written by a random rotation: then the cosine has a known distribution, with (1 + c) / 2 from a
    beta distribution of (d - 1) / 2 twice, `d` units of the stream. That an object is spoken for does not say that it is
    true: `Relations.against(truth)` compares with facts, and its null exchanges the objects of subjects.

    Source: N. Elhage et al., "A mathematical framework for transformer circuits", 2021 (OV circuits); M. Geva et al.,
    "Transformer feed-forward layers build predictions by promoting concepts in the vocabulary space", 2022 (values).
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def run(self, subjects: Sequence[str], objects: Sequence[str], source: str = "stream") -> Relations:
        """Score every pair of a subject and an object at every head and memory.

        >>> analyzers.TokenRelations(model, tokenizer).run(world.subjects()[:8], ["Brigost", "Oranby"], "token").scores.shape
        (16, 8, 2)

        subjects: texts, each read at its last token. objects: texts of one token each. Two of each at least.
        """
        check_eval(self.model)
        for name, several in (("subjects", subjects), ("objects", objects)):
            if isinstance(several, str) or len(set(several)) < 2 or len(set(several)) < len(several):
                raise AnalyzerError(f"{name}={str(several)[:60]!r}: expected two texts or more, each once.")
        if source not in SOURCES:
            raise AnalyzerError(f"source={source!r}: expected 'token' or 'stream'.")
        given = prompts(list(subjects), self.model, self.tokenizer)
        run = fmr.run(self.model, **given.inputs)
        structure = fmr.locate(run)
        if why := wordless(structure):
            raise AnalyzerError(f"What {structure.model} writes has no words: {why}. Expected pre-norm layers and logits.")
        ids = token_ids(list(objects), self.tokenizer, given)
        with torch.no_grad():
            written = dict(_written(structure, run, given, source))
            towards = _directions(structure, run, ids)
            scores = np.stack([_cosines(one, towards) for one in written.values()])
        return Relations(
            model=structure.model,
            source=source,
            parts=tuple(written),
            subjects=tuple(subjects),
            objects=tuple(objects),
            scores=scores,
            p=rotated(scores, towards.shape[1]),
            width=towards.shape[1],
        )


def rotated(cosines: Floats, width: int) -> Floats:
    """How often the cosine with a vector in a random direction is so large, in so many dimensions.

    >>> rotated(np.array([0.0, 0.5]), 64).round(4)
    array([0.5, 0. ])
    """
    from scipy.stats import beta

    half = (width - 1) / 2
    return np.asarray(beta.sf((1 + cosines) / 2, half, half))


def _written(structure: Structure, run: Run, given: Prompts, source: str) -> Iterator[tuple[str, Tensor]]:
    """What each head and each memory writes of the subjects, (subjects, width)."""
    circuits = Circuits(structure, run)
    for number, block in circuits.numbered():
        try:
            factors = circuits.factors(block)
            _, _, point = circuits.point_of(block.factors(run).v.of)
        except StructureError as refused:
            raise AnalyzerError(f"The heads of layer {number} have no weights of their own: {refused}") from None
        at = structure.layers[0].resid_pre.id if source == "token" else point
        x = run[at][:, -1].float()
        x = x / x.norm(dim=-1, keepdim=True)
        for head in range(block.n_heads):
            yield f"head {number}.{head}", x @ factors.v.matrix[head].float().T @ factors.out.matrix[head].float()
    if source == "token":
        return
    for number, layer in enumerate(structure.layers):
        for place, memory in enumerate(layer.mlps):
            post, values = run[memory.post], value_vectors(memory).float()
            if memory.axis != -1 or len(values) != post.shape[-1]:
                continue
            rows = post.reshape(len(given), -1, post.shape[-1])[:, -1].float()
            name = f"memory {number}" + (f".{place}" if len(layer.mlps) > 1 else "")
            yield name, passage(structure, memory, run).through(rows @ values)


def _directions(structure: Structure, run: Run, ids: Tensor) -> Tensor:
    """What each logit grows with, (objects, width)."""
    end = run[structure.layers[-1].resid_post][:1, -1].float()
    logits = structure.frozen(end)
    weights = torch.zeros(len(ids), *logits.value.shape, dtype=logits.value.dtype)
    weights[torch.arange(len(ids)), 0, ids] = 1
    (found,) = logits.back(weights).values()
    return found[:, 0].float()


def _cosines(written: Tensor, towards: Tensor) -> Floats:
    """The cosines of vectors with directions, both less their means."""
    rows = [one.double() - one.double().mean(0) for one in (written, towards)]
    rows = [one / one.norm(dim=1, keepdim=True).clamp(min=1e-30) for one in rows]
    return (rows[0] @ rows[1].T).cpu().numpy()
