"""What each head of a language model does: its scores on tokens that are drawn for the purpose, each beside a null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers.heads.circuits import Circuits
from analyzers.heads.draws import Draws, draw_people, draw_tokens, pool_of
from analyzers.heads.jobs import COPYING, NAMING, HeadJobs
from analyzers.heads.looks import LOOKS, Looked, look
from analyzers.heads.writes import Words, copying, naming
from analyzers.prompts import prompts
from analyzers.protocol import AnalyzerError, Method
from fmr.edits import Edit
from fmr.errors import FmrError, whole_number
from fmr.nodes import Key
from fmr.runs.run import Run
from fmr.structure.attention.factors import Factors
from fmr.structure.parts import Attention, Structure
from fmr.sweeps.metrics import logits_of

LENGTH = 40


class Heads(Method):
    """Name the job of each attention head: where it looks on random tokens, and what it writes.

    >>> jobs = Heads(model, tokenizer, length=20).run(seed=0)
    >>> [name for name, _ in jobs.best("induction")]
    ['1.3', '1.1', '1.2', '1.0']

    model: one that takes token ids alone. tokenizer: for its special tokens, for names, and to say how long texts may be;
    None draws from all tokens that the model looks up, begins with one of them, and leaves name movers out.
    examples, length: so many sequences of a first token and `length` random ones, each followed by itself; None takes 40, or
    as many as the tokenizer's `model_max_length` allows. ids: the tokens to draw from. least: how far a score must lie above
    its null for a job to be named. writes: whether copying and name movers are scored too.

    The scores, means over queries of sequences `first x1 ... xn x1 ... xn`, each a share of the attention:

        previous token   on the token before           null: on another earlier token (keys permuted)
        duplicate token  on the same token before       null: on the same place, where nothing was said twice
        induction        on the token after that        null: on the same place, where nothing was said twice
        first token      on the first one (a sink)      null: on another earlier token (keys permuted)
        self             on itself                      null: on another earlier token (keys permuted)
        positional       beyond the first token, times the covariance of the pattern with that of another sequence relative
                         to its variance                null: the other sequence's keys permuted

    By the weights: copying, the sum of the eigenvalues of a head's circuit from tokens to logits over the sum of their
    sizes; null: its values before the output of a head elsewhere. On sentences in which one of two people gives: name mover,
    what the head adds at the last token to the logit of who receives, above the mean of all names; null: to that of somebody
    who is not there. A head has a job if its score lies `least` or more above its null, and above it in nine of ten
    examples; a name mover must also look at who receives. Entropies are in bits. Copying is one number a head: of random
    heads of 16 dimensions and more none clears its null, of 8 and fewer about one in ten.

    Source: C. Olsson et al., "In-context Learning and Induction Heads", 2022; N. Elhage et al., "A Mathematical Framework
    for Transformer Circuits", 2021; K. Wang et al., "Interpretability in the Wild", 2022.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        examples: int = 6,
        length: int | None = None,
        ids: Sequence[int] | None = None,
        least: float = 0.25,
        writes: bool = True,
    ) -> None:
        if whole_number(examples) is None or examples < 2:
            raise AnalyzerError(f"examples={examples!r}: expected 2 or more sequences, so that they can be compared.")
        if length is not None and (whole_number(length) is None or length < 3):
            raise AnalyzerError(f"length={length!r}: expected 3 or more tokens before they are said again.")
        if not 0 < least < 1:
            raise AnalyzerError(f"least={least!r}: expected a share of the attention between 0 and 1, such as 0.25.")
        self.model, self.tokenizer = model, tokenizer
        self.examples, self.ids, self.least, self.writes = examples, ids, least, writes
        limit = getattr(tokenizer, "model_max_length", None) or 10**9
        self.length = length if length is not None else int(min(LENGTH, (limit - 1) // 2))

    def run(self, seed: int = 0, *, edits: Mapping[Key, Edit] | None = None) -> HeadJobs:
        """Draw the tokens and score every head.

        >>> silent = {structure.attention[0].head(1).z: fmr.edits.Zero()}  # the head that looks at the token before
        >>> Heads(model, tokenizer).run(edits=silent).best("induction")
        []

        seed: of the tokens, of the names and of the permutations. edits: changes under which the heads are scored; what is
        read off the weights stays as it is.
        """
        special = set(getattr(self.tokenizer, "all_special_ids", ()) or ())
        plain = next(n for n in range(len(special) + 1) if n not in special)
        first = self._run(self._ids(torch.full((2, 8), plain)))
        structure = fmr.locate(first)
        rows = self._rows(structure, first)
        draws = self._draws(pool_of(self.ids, rows, self.tokenizer), seed)
        run = self._run(self._ids(draws.twice[:2, :9]))
        structure = fmr.locate(run)
        blocks = _blocks(structure)
        looked, losses = self._looks([block for _, block in blocks], draws, seed, edits)
        scores = {job: torch.cat([one.scores[job] for one in looked]).cpu().numpy() for job in LOOKS}
        nulls = {job: torch.cat([one.nulls[job] for one in looked]).cpu().numpy() for job in LOOKS}
        absent = self._weights(structure, run, blocks, scores, nulls, seed, edits)
        return HeadJobs(
            heads=tuple((layer, head) for layer, block in blocks for head in range(block.n_heads)),
            scopes=tuple(block.scope for _, block in blocks for _ in range(block.n_heads)),
            scores=scores,
            nulls=nulls,
            entropy=torch.cat([one.entropy for one in looked]).mean(1).cpu().numpy(),
            uniform=float(looked[0].uniform.mean()),
            losses=losses,
            absent=absent,
            model=structure.model,
            examples=self.examples,
            length=self.length,
            least=self.least,
            seed=seed,
        )

    def _ids(self, ids: Tensor) -> Mapping[str, Any]:
        return prompts(ids, self.model).inputs

    def _run(self, inputs: Mapping[str, Any], **settings: Any) -> Run:
        try:
            with torch.no_grad():
                return fmr.run(self.model, **settings, **inputs)
        except FmrError:
            raise
        except Exception as error:
            size = max(value.shape[-1] for value in inputs.values() if isinstance(value, Tensor))
            shorter = f"shorter sequences: Heads(model, length={max(3, size // 4)})."
            alone = "a model that takes these alone, such as the encoder of two stacks."
            raise AnalyzerError(
                f"{type(self.model).__name__} does not take {size} token ids: {error}. "
                f"Expected {shorter if size > 9 else alone}"
            ) from error

    def _rows(self, structure: Structure, run: Run) -> int:
        table = run.graph[structure.embedding.id].parent("weight", 1) if structure.embedding is not None else None
        if table is None:
            raise AnalyzerError(f"{structure.model} looks no tokens up in a table: expected a language model.")
        return int(run.graph[table.id].shape[0])

    def _draws(self, pool: Tensor, seed: int) -> Draws:
        first = getattr(self.tokenizer, "bos_token_id", None)
        return draw_tokens(pool, first, self.examples, self.length, seed)

    def _looks(
        self, blocks: list[Attention], draws: Draws, seed: int, edits: Mapping[Key, Edit] | None
    ) -> tuple[list[Looked], tuple[float, float]]:
        """The scores of each attention, and the losses of the first and the second half."""
        keep = [site for block in blocks for site in block.map_sites]
        twice, once = (self._run(self._ids(ids), keep=keep, edits=edits) for ids in (draws.twice, draws.once))
        causal = all(not bool(block.maps(twice).triu(1).any()) for block in blocks)
        looked = [look(block.maps(twice), block.maps(once), draws, causal, seed) for block in blocks]
        return looked, _losses(twice.output, draws.twice) if causal else (float("nan"), float("nan"))

    def _weights(
        self,
        structure: Structure,
        run: Run,
        blocks: list[tuple[int, Attention]],
        scores: dict[str, Any],
        nulls: dict[str, Any],
        seed: int,
        edits: Mapping[Key, Edit] | None,
    ) -> dict[str, str]:
        """Add the scores of what heads write; why not, where there are none."""
        if not self.writes:
            return dict.fromkeys((COPYING, NAMING), "it was not asked for, writes=False")
        try:
            circuits = Circuits(structure, run)
            known: list[Factors] = [circuits.factors(block) for _, block in blocks]
            words = Words(structure, circuits)
        except FmrError as refused:
            return {COPYING: str(refused), NAMING: str(refused)}
        with torch.no_grad():
            scores[COPYING], nulls[COPYING] = (one[:, None].numpy() for one in copying(known, words.gram()))
            people = draw_people(self.tokenizer, seed)
            if isinstance(people, str):
                return {NAMING: people}
            to, other, weight = naming(self.model, [block for _, block in blocks], known, words, people, edits)
        scores[NAMING], nulls[NAMING] = to.numpy(), other.numpy()
        scores["to receiver"] = weight.numpy()
        return {}


def _blocks(structure: Structure) -> list[tuple[int, Attention]]:
    """The self-attentions, with their layers."""
    by_layer = [(n, one) for n, layer in enumerate(structure.layers) for one in layer.attentions if one.kind == "self"]
    found = by_layer or [(n, one) for n, one in enumerate(structure.attention) if one.kind == "self"]
    if not found:
        reasons = "".join(f"\n  {one!r}" for one in structure.rejected[:4]) or " There was no softmax to consider."
        raise AnalyzerError(
            f"{structure.model} has no self-attention that could be certified, so there are no heads. Run it in eval mode. "
            f"Rejected:{reasons}"
        )
    return found


def _losses(output: Any, ids: Tensor) -> tuple[float, float]:
    """The mean loss of the next token in the first and in the second half."""
    logits = logits_of(output).detach()
    if logits.dim() != 3 or logits.shape[:2] != ids.shape or logits.shape[-1] <= int(ids.max()):
        return float("nan"), float("nan")
    n = (ids.shape[1] - 1) // 2
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].to(logits.device).flatten(), reduction="none"
    ).reshape(len(ids), -1)
    return float(losses[:, :n].mean()), float(np.asarray(losses[:, n + 1 :].mean().cpu()))
