"""CircuitKIT: edges scored and circuits tested on its own copy of the model, a HookedTransformer made from a folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from circuitkit.backends.eap.attribute import get_scores_eap
from circuitkit.backends.eap.evaluate import evaluate_graph
from circuitkit.backends.eap.graph import Graph
from circuitkit.quick import load_model
from peer_methods import Subject
from peer_work import main, words
from torch import Tensor, nn


class Pairs:
    """All pairs as one batch of texts, whose words are the numbers of tokens, and no token before them."""

    templated = True

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        texts = [[" ".join(map(str, row)) for row in ids.tolist()] for ids in (self.subject.clean, self.subject.corrupted)]
        yield *texts, torch.stack([self.subject.right, self.subject.wrong], 1)


class Edges:
    """Edge attribution patching, and a run of the circuit of the kept edges."""

    how: Mapping[str, str] = {"circuit": "get_scores_eap, evaluate_graph"}

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        tokenizer, model.config.n_ctx = words(model.config.vocab_size), 1024  # it asks for this name of GPT-2's
        with TemporaryDirectory() as folder:
            place = Path(folder) / "checkpoint"
            model.save_pretrained(place)
            self.model = load_model(str(place), dtype="float32", device="cpu", algorithm="eap", tokenizer=tokenizer)
        self.subject, _ = subject, self.model.eval()

    def metric(self, logits: Tensor, *_: object) -> Tensor:
        return self.subject.metric(logits)

    def circuit(self, kept: Tensor) -> Tensor:
        graph, pairs = Graph.from_model(self.model), Pairs(self.subject)
        with torch.enable_grad():
            scores = -get_scores_eap(self.model, graph, pairs, lambda *given: self.metric(*given).sum(), quiet=True)
        groups = self.groups(kept.shape[1])
        graph.in_graph[:] = kept[:, groups]
        answers = evaluate_graph(self.model, graph, pairs, self.metric, quiet=True)
        return torch.cat([torch.zeros(kept.shape).index_add_(1, groups, scores).flatten(), answers])

    def groups(self, readers: int) -> Tensor:
        """Which reader of fmr each of its readers is part of: it has keys and values of each head, shared or not."""
        layers, heads = self.model.cfg.n_layers, self.model.cfg.n_heads
        shared = self.model.cfg.n_key_value_heads or heads
        here = [
            *range(heads),
            *(heads + kind * shared + head * shared // heads for kind in range(2) for head in range(heads)),
        ]
        wide = heads + 2 * shared + 1
        return torch.tensor([layer * wide + one for layer in range(layers) for one in (*here, wide - 1)] + [readers - 1])


if __name__ == "__main__":
    main("circuitkit", methods=Edges)
