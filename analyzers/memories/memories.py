"""What triggers each memory of a model, over a data set, and what each says."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyzers.memories.counted import ONE, Counts, Layer, digest_of, place, same
from analyzers.memories.predictions import Composed, Promotion, composed, promotion
from analyzers.memories.reading import Found, Texts, coefficients, experts_of, find, is_tokens, texts_of, token_argument
from analyzers.memories.result import Memories, made
from analyzers.memories.spelling import glue, spelled
from analyzers.memories.store import Store
from analyzers.memories.vocabulary import Values, Vocabulary, logits_of, value_vectors, wordless
from analyzers.prompts import Prompts, prompts, token_ids
from analyzers.protocol import Analyzer, AnalyzerError, Given, asked_tokens, check_counts, check_other, layer_numbers
from fmr.errors import number_of, whole_number
from fmr.sweeps.bars import hidden
from fmr.weights import fingerprint

if TYPE_CHECKING:
    from typing import Self

K, EVERY = 10, 50
"""How many triggers are kept of each memory; after how many batches a store is written."""


class KeyValueMemories(Analyzer[Memories]):
    """Find the prefixes that trigger each feed-forward memory most, and hold what follows them against what its value says.

    >>> memories = KeyValueMemories(model, tokenizer, k=5).over(texts)
    >>> memories.result().triggers(layer=3, memory=7)

    A layer's output is the sum over its memories of coefficient times value vector; a memory's key makes the coefficient of
    what the layer reads. model: any module whose memories `fmr.locate` finds, in eval mode; None where counts alone are
    read. k: how many triggers are kept of each memory and sign; None: 10, or as many as the store has. signs: 1 for positive
    coefficients alone, 2 for negative ones too; None takes 2 where memories have a gate. position: count this token of each
    text alone (-1: the last); None: all. layers, scope: the numbers of layers, and a glob over module calls, of the memories
    to count; those of experts are counted one expert after the other, as 0 for tokens that went to others. tokens, mask: the
    arguments with token ids and with 0 on padding, (examples, positions); None: the one that holds them.

    store: an SQLite file for all that is counted; with one that is there counting goes on where it ended, and `over` passes
    by the batches that it holds. It is written every so many batches and when a result is asked for.

    Lists are exact in whatever order batches come: of equal coefficients the text of the smaller number comes first, and a
    text's number is a digest of what it says. A text that comes again is a trigger once, and counts again in means.

    Source: M. Geva, R. Schuster, J. Berant, O. Levy, "Transformer feed-forward layers are key-value memories", 2021.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        k: int | None = None,
        signs: int | None = None,
        position: int | None = None,
        layers: Sequence[int] | None = None,
        scope: str = "*",
        tokens: str | None = None,
        mask: str = "attention_mask",
        store: str | os.PathLike[str] | None = None,
        every: int = EVERY,
    ) -> None:
        check_counts(1, k=1 if k is None else k, every=every)
        if signs not in (None, 1, 2):
            raise AnalyzerError(f"signs={signs!r}: expected 1 for positive coefficients, 2 for both signs, or None.")
        if position is not None and whole_number(position) is None:
            raise AnalyzerError(f"position={position!r}: expected the number of a token, such as 0 or -1, or None for all.")
        self.model, self.tokenizer = model, tokenizer
        self.k, self.signs, self.position, self.every = k or K, signs, position, every
        self.layers = layer_numbers(layers)
        self.scope, self.tokens, self.mask = scope, tokens, mask
        self.found: Found | None = None
        self.counts: Counts | None = None
        self.weights = fingerprint(model) if model is not None else ""
        self.store = Store(store) if store is not None else None
        self.vocabulary = Vocabulary(self.store, self._decode)
        self.resumed = 0
        if self.store is not None:
            self._resume(self.store, k)

    # ---- counting

    def update(self, batch: Given) -> Self:
        """Count one batch: texts, token ids, or the model's arguments by name.

        >>> KeyValueMemories(model, tokenizer).update(["Junel Dunoth grew up in Oranby."])
        """
        if self.model is None:
            raise AnalyzerError(
                "This KeyValueMemories has no model to run. Make it with KeyValueMemories(model, tokenizer)."
            )
        inputs = self._inputs(batch)
        self.found = self.found or self._find(inputs)
        given = inputs.get(self.tokens or "")
        shape = (len(given), given.shape[1]) if isinstance(given, Tensor) and is_tokens(given) else None
        values = coefficients(self.model, inputs, self.found, shape)
        names = [str(block.post.id) for block in self.found.blocks]
        self._start([*zip(self.found.layers, names, self.found.sizes, strict=True)])
        return self._count(values, texts_of(inputs, self.tokens or "", self.mask, values[0].shape[:2]))

    def update_coefficients(self, coefficients: Sequence[Any], tokens: Any, mask: Any = None) -> Self:
        """Count coefficients from any source.

        >>> KeyValueMemories(signs=2).update_coefficients([torch.randn(2, 5, 100)], torch.randint(50, (2, 5)))

        coefficients: one tensor or array for each layer, (examples, positions, memories). tokens: (examples, positions).
        mask: the same, 0 on padding; None: no padding.
        """
        values = [torch.as_tensor(value) for value in coefficients]
        tokens = torch.as_tensor(tokens)
        if not is_tokens(tokens) or not values or any(v.dim() != 3 or v.shape[:2] != tokens.shape for v in values):
            shapes = ", ".join(str(tuple(value.shape)) for value in values) or "none"
            raise AnalyzerError(
                f"The coefficients have shapes {shapes} and the tokens {tuple(tokens.shape)}. Expected (examples, "
                "positions, memories) for each layer, and whole numbers (examples, positions)."
            )
        numbers = self.layers or range(len(values))
        self._start([(number, "", value.shape[-1]) for number, value in zip(numbers, values, strict=True)])
        self.tokens = self.tokens or "input_ids"
        inputs = {self.tokens: tokens, **({} if mask is None else {self.mask: torch.as_tensor(mask)})}
        return self._count(values, texts_of(inputs, self.tokens or "", self.mask, (len(tokens), tokens.shape[1])))

    def merge(self, other: Self) -> Self:
        """Add what another analyzer counted on other data, and return this one; the result is that of one pass over all.

        >>> one, two = (KeyValueMemories(model, tokenizer).update(texts[n::2]) for n in (0, 1))
        >>> one.merge(two).result()
        """
        check_other(self, other, weights=False, asked=("layers", "scope") if self.counts is None else ())
        signs, tokens = self.signs or other.signs, self.tokens if self.tokens is not None else other.tokens
        known = {"signs": other.signs or signs, "tokens": tokens if other.tokens is None else other.tokens}
        same({**self._settings(), "signs": signs, "tokens": tokens}, {**other._settings(), **known}, "merge of")
        if other.counts is None:
            return self
        self.signs, self.tokens = signs, tokens
        self.found, self.weights = self.found or other.found, self.weights or other.weights
        self._start([(layer.number, layer.site, layer.n) for layer in other.counts.layers])
        assert self.counts is not None
        if self.counts.repeats(other.counts):
            raise AnalyzerError("merge of the same counts twice: every batch of the other was counted here already.")
        self.counts.merge(other.counts)
        if self.store is not None:
            self.save()
        return self

    def over(self, batches: Iterable[Given], *, ranks: bool = False, progress: bool | None = None) -> Self:
        """Count every batch of a loader, and return the analyzer; strings are put together, 16 a batch.

        >>> KeyValueMemories(model, tokenizer).over(texts, progress=False)

        Batches that the store held when it was opened are passed by. ranks, progress: those of `Analyzer.over`."""
        if ranks and self.store is not None:
            raise AnalyzerError(f"store={self.store.path!r} with ranks=True: several processes would write one file.")
        super().over(batches, ranks=ranks, progress=progress)
        if self.store is not None:
            self.save()
        return self

    def _fresh(self, batches: Iterator[Given]) -> Iterator[Given]:
        """Those that the store did not hold when it was opened; one that is given more often than that, as often more."""
        held = Counter(batch.digest for batch in self.counts.batches[: self.resumed]) if self.counts else Counter[int]()
        self.resumed = 0
        for batch in batches:
            if held and self.model is not None:
                batch = self._inputs(batch)
                digest = self._digest(batch)
                if held[digest]:
                    held[digest] -= 1
                    continue
            yield batch

    def _digest(self, inputs: Mapping[str, Any]) -> int:
        """What a batch is known by in a store."""
        first = next(value for value in inputs.values() if isinstance(value, Tensor) and value.dim())
        return digest_of(texts_of(inputs, self.tokens or "", self.mask, (*first.shape, 1)[:2]))

    def save(self) -> None:
        """Write to the store what was counted since it was written last.

        >>> KeyValueMemories(model, tokenizer, store="memories.sqlite").update(texts[:4]).save()
        """
        if self.store is None:
            raise AnalyzerError(
                "There is no store to write to. Make one with KeyValueMemories(model, store='memories.sqlite')."
            )
        if self.counts is not None:
            self.store.write(self.counts, self._settings(), self._words_of_texts(), self._glue())

    # ---- results

    def result(self, *, words: int = 10, seed: int = 0, draws: int = 1000, progress: bool | None = None) -> Memories:
        """Triggers, moments, the words of values, and how often a trigger is followed by what its value says.

        >>> memories.result(seed=0).agreement.shape
        (4, 1)

        words: how many of each value are kept; 0 reads no values. seed: of the permutations of values over memories, of
        which there are `draws`. Values are read once, in time in proportion to memories times vocabulary.
        """
        if (least := whole_number(words)) is None or least < 0:
            raise AnalyzerError(f"words={words!r}: expected how many words of each value are kept, from 0 on.")
        check_counts(0, draws=draws)
        if self.counts is None or not self.counts.batches:
            raise AnalyzerError("No text has been counted yet. Call update(batch) or over(batches) before result().")
        if self.store is not None:
            self.save()
        values = [] if words == 0 else [*self._values(words, progress)]
        why = "no words were asked for" if words == 0 else "" if values else self._unread()
        return made(self.counts, values, why, self._decode, self._glue(), self._settings(), seed, draws)

    def distribution(self, layer: int, memory: int) -> Tensor:
        """The value of a memory as probabilities of words: a softmax of what it alone adds to the logits, (vocabulary,).

        >>> memories.distribution(3, 7).sum().round()
        tensor(1.)
        """
        found = self._located()
        if layer not in found.layers or not 0 <= memory < found.sizes[found.layers.index(layer)]:
            raise AnalyzerError(f"layer={layer}, memory={memory}: expected one of {found.layers} and a memory in it.")
        place = found.layers.index(layer)
        vector = value_vectors(found.blocks[place])[memory]
        return next(logits_of(found.structure, vector[None], found.ways[place]))[0].softmax(-1)

    @property
    def counted(self) -> str:
        """How many tokens, texts and memories were counted."""
        return "" if self.counts is None else repr(self.counts)

    # ---- given prompts

    def run(self, given: Given, *, seed: int = 0) -> Composed:
        """How the first word of each layer comes of those of its memories, at every token of some prompts.

        >>> memories.run(texts[:4], seed=0).none.shape
        (4,)

        seed: of the order in which coefficients are dealt out to other memories, for comparison. `AnalyzerError` where
        values have no words.
        """
        model, asked, found = self._asked(given)
        real = asked_tokens(asked.inputs.get(self.mask), *asked.inputs[self.tokens or ""].shape)
        vocabulary = self.vocabulary

        def first_words(layer: int) -> Tensor:
            return vocabulary.of(found, layer, 1).tokens[..., 0]

        return composed(model, asked.inputs, found, real, first_words, seed)

    def promotion(self, prompt: Given, token: str | int, *, seed: int = 0, draws: int = 100) -> Promotion:
        """What each memory of all layers adds to the logit of a word after one prompt.

        >>> memories.promotion("Junel Dunoth grew up in", "Oranby").strongest()

        token: the word as text (" Mary", with its blank) or as a number. seed: of the `draws` other words beside it.
        """
        check_counts(0, draws=draws)
        model, asked, found = self._asked(prompt)
        if len(asked) != 1:
            raise AnalyzerError(f"There are {len(asked)} prompts, expected one: a word is promoted at its last token.")
        real = asked_tokens(asked.inputs.get(self.mask), *asked.inputs[self.tokens or ""].shape)
        number = int(token_ids(token, self.tokenizer, asked))
        ids = asked.inputs[self.tokens or ""][0][real[0].to(asked.inputs[self.tokens or ""].device)].tolist()
        between = glue(self.tokenizer, [ids])
        words = [self._decode([one])[one] for one in ids]
        return promotion(model, asked.inputs, found, words, between, real, number, self._decode, seed, draws)

    # ---- inside

    def _asked(self, given: Given) -> tuple[nn.Module, Prompts, Found]:
        """Prompts of tokens, and the memories of the model."""
        if self.model is None:
            raise AnalyzerError(
                "This KeyValueMemories has no model to run. Make it with KeyValueMemories(model, tokenizer)."
            )
        asked = prompts(given, self.model, self.tokenizer)
        self.tokens = token_argument(asked.inputs, self.mask, self.tokens)
        if not is_tokens(asked.inputs.get(self.tokens or "")):
            raise AnalyzerError(f"The prompts have {', '.join(asked.inputs)}, expected token ids (examples, positions).")
        self.found = self.found or self._find(dict(asked.inputs))
        routed = [number for number, block in zip(self.found.layers, self.found.blocks, strict=True) if experts_of(block)]
        if routed:
            raise AnalyzerError(
                f"Layers {routed} have experts, whose shares in one prompt are not told apart. Expected layers of one "
                "matrix: choose them with layers=[...]; counting over texts takes experts too."
            )
        return self.model, asked, self.found

    def _inputs(self, batch: Given) -> dict[str, Any]:
        assert self.model is not None
        inputs = dict(prompts(batch, self.model, self.tokenizer).inputs)
        self.tokens = token_argument(inputs, self.mask, self.tokens)
        return inputs

    def _find(self, inputs: dict[str, Any]) -> Found:
        assert self.model is not None
        found = find(self.model, inputs, self.scope, self.tokens or "")
        wanted = found.layers if self.layers is None else self.layers
        if not wanted or not set(wanted) <= set(found.layers):
            raise AnalyzerError(
                f"layers={list(wanted)}: {found.structure.model} has memories in layers {list(found.layers)}."
            )
        found = found.of(wanted)
        if self.signs is None:
            self.signs = 2 if found.gated else 1
        return found

    def _start(self, layers: list[tuple[int, str, int]]) -> None:
        """Lists for these layers; checked against those that are there."""
        if self.counts is None:
            self.signs = self.signs or 1
            self.counts = Counts([Layer.empty(*one, self.k, self.signs) for one in layers])
        have = [(layer.number, layer.site, layer.n) for layer in self.counts.layers]
        for ours, theirs in zip(have, layers, strict=False):
            if ours != theirs:
                raise AnalyzerError(f"{place(*theirs)} after {place(*ours)}. {ONE}")
        if len(have) != len(layers):
            raise AnalyzerError(f"{number_of(len(layers), 'layer')} of memories after {len(have)}. {ONE}")

    def _count(self, values: Sequence[Tensor], texts: Texts) -> Self:
        assert self.counts is not None
        with torch.no_grad():
            self.counts.add(values, texts, self.position)
        if self.store is not None and len(self.counts.batches) - self.store.batches >= self.every:
            self.save()
        return self

    def _settings(self) -> dict[str, Any]:
        return {"model": self.weights, "k": self.k, "signs": self.signs, "position": self.position, "tokens": self.tokens}

    def _resume(self, store: Store, k: int | None) -> None:
        held = store.read()
        if held is None:
            return
        settings, self.counts = held
        self.k, self.tokens = k or settings["k"], settings["tokens"] if self.tokens is None else self.tokens
        self.signs, self.weights = self.signs or settings["signs"], self.weights or settings["model"]
        same(self._settings(), settings, f"{store.path}:")
        have = tuple(layer.number for layer in self.counts.layers)
        if self.layers is not None and sorted(self.layers) != sorted(have):
            raise AnalyzerError(f"{store.path}: layers={[*have]} where layers={[*self.layers]} was asked for. {ONE}")
        self.resumed = len(self.counts.batches)

    def _located(self) -> Found:
        """The memories in the model, found in a text that was counted where none was since."""
        if self.found is None and self.model is not None and self.counts is not None:
            ids = next((one for one in self.counts.texts.values() if len(one)), None)
            if ids is not None:
                tokens = torch.tensor(ids[None], dtype=torch.long)
                self.found = self._find(self._inputs({self.tokens or "input_ids": tokens}))
        if self.found is None:
            raise AnalyzerError(
                "There is no model whose values could be read. Use KeyValueMemories(model) and update(batch)."
            )
        return self.found

    def _unread(self) -> str:
        return "there is no model" if self.model is None else wordless(self._located().structure)

    def _values(self, top: int, progress: bool | None) -> Iterator[Values]:
        """The words of the values of each layer; none where values have no words."""
        assert self.counts is not None
        numbers = [layer.number for layer in self.counts.layers]
        for number in tqdm(numbers, desc="words of values", unit="layer", disable=hidden(progress)):
            known = self.vocabulary.held(number, top)
            if known is None and self._unread():
                return
            yield self.vocabulary.of(self._located(), number, top) if known is None else known.first(top)

    def _decode(self, ids: Iterable[int]) -> dict[int, str]:
        return spelled(self.tokenizer, ids)

    def _glue(self) -> str:
        assert self.counts is not None
        return glue(self.tokenizer, (ids[:32].tolist() for ids in islice(self.counts.texts.values(), 8)))

    def _words_of_texts(self) -> dict[int, str]:
        assert self.counts is not None
        every: set[int] = set()
        for ids in self.counts.texts.values():
            every.update(ids.tolist())
        return self._decode(every)
