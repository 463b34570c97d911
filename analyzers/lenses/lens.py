"""The logit lens: what the model would say if its stream ended after each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from analyzers.lenses.opening import (
    Reading,
    by_position,
    layout_of,
    mask_of,
    place_of,
    points_of,
    read_by_head,
    readout_of,
    rows_of,
    run_with,
    spelling,
)
from analyzers.lenses.readings import LENS, NULL, TRANSLATED, Lens
from analyzers.lenses.translator import NEAR, Translator
from analyzers.lenses.tuning import States, tuned
from analyzers.prompts import Prompts, token_ids
from analyzers.protocol import AnalyzerError, Given, layer_numbers
from fmr.errors import whole_number
from fmr.ids import Site
from fmr.nodes import Key
from fmr.structure.parts import Structure
from fmr.sweeps.metrics import token_ids as one_each

ROWS = 256
"""How many states are read out at a time."""


class Rows(NamedTuple):
    """The places that are read: of which example, in which column, with the model's logits, an answer and another one;
    `drawn` says whether all others are answers of other places."""

    examples: Tensor
    columns: Tensor
    final: Tensor
    answers: Tensor
    others: Tensor
    drawn: bool

    def split(self) -> Iterator[Rows]:
        """A few at a time."""
        for start in range(0, len(self.answers), ROWS):
            examples, columns, final, answers, others = (one[start : start + ROWS] for one in self[:5])
            yield Rows(examples, columns, final, answers, others, self.drawn)


class LogitLens(Reading):
    """Read the stream out after each layer, through the model's own final norm and unembedding, at every position.

    >>> lens = analyzers.LogitLens(model, tokenizer).run("Junel Dunoth grew up in")
    >>> lens.error
    0.0

    For the stream x (examples, positions, width) after each layer, logits = unembed(norm(x)). Of these: the top tokens, the
    entropy, the rank (0 is the top) and the probability of an answer, and KL(model || lens); all in nats. The last row is
    what the model says, to the bit.

    model: any module with a pre-norm stream and logits, in eval mode. translator: one of `LensTranslator`; then the stream
    is read through its maps, too, and, as a null, through those that were fitted to other tokens. tolerance: how far the
    weights may lie from those that it was fitted to, as a share of them: half precision lies 0.002 away, 8 bits 0.01 to
    0.03, 4 bits 0.1; with 1 any model of this width is read.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020; with translators, N. Belrose et al., "Eliciting latent
    predictions from transformers with the tuned lens", 2023.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, translator: Translator | None = None, *, tolerance: float = NEAR
    ) -> None:
        super().__init__(model, tokenizer)
        if translator is not None and not isinstance(translator, Translator):
            raise AnalyzerError(
                f"translator is a {type(translator).__name__}: expected what LensTranslator(model, tokenizer).over(texts)"
                ".result() or Translator.load(path) returns."
            )
        self.translator, self.tolerance = translator, tolerance

    def run(
        self,
        inputs: Given,
        answers: Any = None,
        *,
        sites: Mapping[str, Key] | None = None,
        position: int | None = None,
        top: int = 5,
        seed: int = 0,
    ) -> Lens:
        """Read prompts layer by layer.

        >>> analyzers.LogitLens(model, tokenizer).run("Junel Dunoth grew up in", "Oskus", position=-1).first()
        {'lens': ...}

        answers: a token for each prompt, or one for all, as text (" Mary", with its blank) or as a number, whose rank and
        probability are told at every position; by default what the model itself says there. sites: other points of the
        stream than the layers, by name. position: of which real token of each prompt; None reads all. top: how many tokens
        to name. Beside the rank of each answer stands that of another prompt's or position's.
        """
        given, structure = self._opened(inputs)
        apart = 0.0 if self.translator is None else self.translator.apart(self.model, self.tolerance)
        readout = readout_of(structure)
        points = self._points(structure, sites)
        if (whole_number(top) or 0) < 1:
            raise AnalyzerError(f"top={top!r}: expected how many tokens to name, from 1 on.")
        run = run_with(self.model, given, [*(p.id for p in points.values()), readout.end, readout.way[-1], *readout.choices])
        laid = partial(rows_of, examples=len(given), model=structure.model, layout=layout_of(structure))
        states = {name: laid(run[site.id].detach()) for name, site in points.items()}
        mask = mask_of(given, laid(run[readout.end]).shape[:2])
        said, own = (
            by_position(logits.detach(), mask, structure.model)
            for logits in (structure.read_out(run, readout.end), run[readout.way[-1]])
        )
        read = read_by_head(structure, run, mask)
        tokenizer = spelling(structure, self.tokenizer, answers)
        rows = _rows(_chosen(mask, place_of(mask, position, read)), said, answers, given, tokenizer, seed)
        readings = Readings(len(points), mask.shape, top)
        for few in rows.split():
            for place, (name, values) in enumerate(states.items()):
                chosen = values[few.examples, few.columns]
                for view, logits in self._views(
                    structure, name, chosen, few.final if points[name].id == readout.end else None
                ):
                    readings.note(view, place, few, logits)
        answered = torch.full(mask.shape, -1).index_put_((rows.examples.cpu(), rows.columns.cpu()), rows.answers.cpu())
        return Lens(
            points=tuple(points),
            tokens=given.tokens,
            **readings.held,
            top=readings.top,
            top_probability=readings.top_probability,
            answers=answered,
            words=_words([answered, *readings.top.values()], tokenizer),
            mask=mask,
            control="the answers of other places" if rows.drawn else "random tokens",
            error=float((said - own).abs().max()),
            seed=seed,
            apart=apart,
        )

    def tune(
        self,
        batches: Iterable[Given],
        held_out: Iterable[Given],
        *,
        layers: Sequence[int] | None = None,
        steps: int = 50,
        learning_rate: float = 1e-4,
        tokens: int = 64,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Translator:
        """Train the translator further, by Adam on KL(model || lens) over texts, and measure that on other texts.

        >>> translator = analyzers.LensTranslator(model, tokenizer).update(texts[:6]).result(ridge=1e-2)
        >>> lens = analyzers.LogitLens(model, tokenizer, translator)
        >>> lens.tune([texts[:6]], [texts[6:]], layers=[1], steps=5, progress=False).table()

        held_out: texts that are not among the others; `kl_before` and `kl_after` are their means over tokens. layers: which
        maps; None takes all. tokens: how many are drawn for each step.
        """
        if self.translator is None:
            raise AnalyzerError("There is no translator to tune. Expected LogitLens(model, tokenizer, translator).")
        self.translator.apart(self.model, self.tolerance)
        known = self.translator.points
        wanted = known if layers is None else tuple(map(str, layer_numbers(layers) or ()))
        if not set(wanted) <= set(known):
            raise AnalyzerError(f"layers={layers!r}: expected some of {', '.join(known)}.")
        texts, held = ([self._states(batch, wanted) for batch in some] for some in (batches, held_out))
        if not texts or not held:
            raise AnalyzerError("batches or held_out is empty: expected texts to train on, and others to measure on.")
        return tuned(
            next(iter(self._structures.values())),
            self.translator,
            texts,
            held,
            wanted,
            steps=steps,
            learning_rate=learning_rate,
            tokens=tokens,
            seed=seed,
            progress=progress,
        )

    def _points(self, structure: Structure, sites: Mapping[str, Key] | None) -> dict[str, Site]:
        """The points of the stream that are read, by name."""
        if sites is not None and not isinstance(sites, Mapping):
            raise AnalyzerError(
                f"sites is a {type(sites).__name__}: expected points of the stream by name, as "
                "{'mid': structure.layers[0].resid_mid}."
            )
        graph = readout_of(structure).graph
        points = points_of(structure) if sites is None else {name: Site(graph[key].id) for name, key in sites.items()}
        if not points:
            raise AnalyzerError("sites is empty: expected points of the stream by name, or None for every layer.")
        if self.translator is not None and not points.keys() & {*self.translator.points}:
            raise AnalyzerError(
                f"The translator has maps for {', '.join(self.translator.points)}, and what is read is {', '.join(points)}. "
                "Expected one that was fitted to this model, at points of the same names."
            )
        return points

    def _states(self, batch: Given, layers: Sequence[str]) -> States:
        """The stream after some layers and at its end, at all real tokens of a batch."""
        given, structure = self._opened(batch)
        points, end = points_of(structure), readout_of(structure).end
        run = run_with(self.model, given, [*(points[layer].id for layer in layers), end])
        laid = partial(rows_of, examples=len(given), model=structure.model, layout=layout_of(structure))
        ends = laid(run[end].detach())
        mask = mask_of(given, ends.shape[:2]).to(ends.device)
        states = {layer: laid(run[points[layer].id].detach())[mask] for layer in layers}
        return states, ends[mask]

    def _views(self, structure: Structure, name: str, states: Tensor, said: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """The logits of states after a layer by every way of reading; at the end of the stream, those are what was said."""
        yield LENS, structure.read_out(states) if said is None else said
        if self.translator is None:
            return
        for view, null in ((TRANSLATED, False), (NULL, True)):
            if said is not None:
                yield view, said
            elif name in self.translator.points:
                yield view, structure.read_out(self.translator(name, states, null))


def _chosen(mask: Tensor, columns: Tensor | None) -> Tensor:
    """Which places are read, (examples, positions): all real ones, or a column of each example."""
    return mask if columns is None else mask & (torch.arange(mask.shape[1]) == columns[:, None])


def _words(held: Sequence[Tensor], tokenizer: Any) -> dict[str, str]:
    """The text of every token, by its number; the number itself without a tokenizer."""
    ids = torch.cat([one.flatten() for one in held]).unique().tolist()
    return {str(one): str(one) if tokenizer is None else str(tokenizer.decode([one])) for one in ids if one >= 0}


def _rows(read: Tensor, said: Tensor, answers: Any, given: Prompts, tokenizer: Any, seed: int) -> Rows:
    """The places to read, in order, each with its answer and another one: that of a place with another answer, else a
    random token."""
    examples, columns = (one.to(said.device) for one in read.nonzero(as_tuple=True))
    final = said[examples, columns if said.shape[1] == read.shape[1] else 0]
    draw = torch.Generator().manual_seed(seed)
    if answers is None:
        own = final.argmax(-1)
    else:
        own = one_each(token_ids(answers, tokenizer, given), said[:, -1]).expand(len(read)).to(said.device)[examples]
    drawn = own[torch.randint(len(own), (len(own), 16), generator=draw).to(own.device)]
    differs = drawn != own[:, None]
    others = drawn.gather(1, differs.int().argmax(1, keepdim=True))[:, 0]
    random = torch.randint(final.shape[-1], (len(own),), generator=draw).to(own.device)
    return Rows(examples, columns, final, own, torch.where(differs.any(1), others, random), bool(differs.any(1).all()))


class Readings:
    """What was read so far, by measure and way, (layers, examples, positions)."""

    def __init__(self, points: int, shape: torch.Size, top: int) -> None:
        self.points, self.shape, self.k = points, shape, top
        self.held: dict[str, dict[str, Tensor]] = {
            name: {} for name in ("entropy", "kl", "rank", "probability", "other_rank")
        }
        self.top: dict[str, Tensor] = {}
        self.top_probability: dict[str, Tensor] = {}

    def note(self, view: str, place: int, rows: Rows, logits: Tensor) -> None:
        """Keep what the logits of some places say, (rows, vocabulary), after a layer."""
        log_p, said = logits.float().log_softmax(-1), rows.final.float().log_softmax(-1)
        p, at = log_p.exp(), (place, rows.examples.cpu(), rows.columns.cpu())
        found = {
            "entropy": torch.special.entr(p).sum(-1),
            "kl": torch.where(said.isinf(), 0.0, said.exp() * (said - log_p)).sum(-1),
            "rank": _rank(logits, rows.answers),
            "probability": p.gather(1, rows.answers[:, None])[:, 0],
            "other_rank": _rank(logits, rows.others),
        }
        for name, values in found.items():
            self.held[name].setdefault(view, self._empty())[at] = values.float().cpu()
        best = p.topk(min(self.k, p.shape[-1]))
        last = best.indices.shape[-1:]
        self.top.setdefault(view, torch.full((self.points, *self.shape, *last), -1))[at] = best.indices.cpu()
        self.top_probability.setdefault(view, self._empty(last))[at] = best.values.cpu()

    def _empty(self, last: tuple[int, ...] = ()) -> Tensor:
        return torch.full((self.points, *self.shape, *last), float("nan"))


def _rank(logits: Tensor, tokens: Tensor) -> Tensor:
    """How many logits lie above that of a token."""
    return (logits > logits.gather(1, tokens[:, None])).sum(-1)
