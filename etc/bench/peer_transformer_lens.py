"""TransformerLens: its bridge around the model; it asks for a tokenizer, which none of this work uses."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from engine import Case
from peer_methods import Subject, Trace
from peer_table import EVERYTHING, PATTERNS
from peer_work import Sample, Work, main, twin, words
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import (
    AttributionResult,
    EdgeAttributionConfig,
    Node,
    attribution_patch,
)


def around(model: nn.Module) -> TransformerBridge:
    """The bridge around a model."""
    return TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=words(model.config.vocab_size)).eval()


def works(case: Case) -> Iterator[Work]:
    bridge = around(twin(case))
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(case.model.config.n_layer)]

    def read(result: Any) -> Sample:
        logits, cache = result
        return Sample(list(cache.values()), [cache[name] for name in patterns], logits)

    yield Work(EVERYTHING, "run_with_cache", lambda: bridge.run_with_cache(case.ids, use_cache=False), read)
    yield Work(
        PATTERNS,
        "run_with_cache(names_filter)",
        lambda: bridge.run_with_cache(case.ids, names_filter=patterns, use_cache=False),
        read,
    )


class Hooks:
    """Edits by functions at its hook points."""

    how: Mapping[str, str] = {
        "add": "run_with_hooks",
        "put": "run_with_hooks",
        "heads": "run_with_hooks, hook_z",
        "interchange": "run_with_cache, run_with_hooks",
        "steer": "hooks(), generate",
    }

    def __init__(self, model: nn.Module) -> None:
        self.bridge = around(model)

    def run(self, ids: Tensor, hooks: list[tuple[str, Any]]) -> Tensor:
        return self.bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False)

    def add(self, ids: Tensor, layer: int, vector: Tensor) -> Tensor:
        return self.run(ids, [(stream(layer), lambda value, hook: value + vector)])

    def put(self, ids: Tensor, layer: int, positions: Sequence[int], values: Tensor) -> Tensor:
        def patch(value: Tensor, hook: object) -> Tensor:
            value = value.clone()
            value[range(len(positions)), positions] = values
            return value

        return self.run(ids, [(stream(layer), patch)])

    def heads(self, ids: Tensor, values: Mapping[int, Tensor]) -> Tensor:
        def replace(given: Tensor) -> Any:
            return lambda value, hook: given.reshape(value.shape)

        return self.run(ids, [(f"blocks.{layer}.attn.hook_z", replace(given)) for layer, given in values.items()])

    def interchange(self, ids: Tensor, source: Tensor, layer: int, position: int) -> Tensor:
        _, cache = self.bridge.run_with_cache(source, names_filter=[stream(layer)], use_cache=False)
        return self.put(ids, layer, [position] * len(ids), cache[stream(layer)][:, position])

    def steer(self, ids: Tensor, layer: int, vector: Tensor, steps: int) -> Tensor:
        quiet = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        with self.bridge.hooks(fwd_hooks=[(stream(layer), lambda value, hook: value + vector)]):
            return self.bridge.generate(ids, max_new_tokens=steps, **quiet)


class Analysis:
    """Methods by its tools of analysis, and by hooks where it has none."""

    how: Mapping[str, str] = {
        "attribution": "attribution_patch",
        "cells": "run_with_hooks, 30 cells, 18 times",
        "heads": "run_with_hooks, hook_z, 30 heads, 9 times",
        "circuit": "attribution_patch, edges, no test",
    }

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        self.subject, self.bridge = subject, around(model)
        self.layers = self.bridge.cfg.n_layers

    def patched(self, granularity: Any, clean: Tensor, corrupted: Tensor) -> Iterator[AttributionResult]:
        """The scores of each pair by itself: a metric is told nothing but logits."""
        config = EdgeAttributionConfig(granularity=granularity)
        for pair in range(len(clean)):
            one = slice(pair, pair + 1)
            with torch.enable_grad():
                yield attribution_patch(self.bridge, clean[one], corrupted[one], partial(self.answer, one), config)

    def answer(self, pair: slice, logits: Tensor) -> Tensor:
        return self.subject.metric(logits, pair).sum()

    def attribution(self) -> Tensor:
        pairs, length = self.subject.clean.shape
        heads, mlps = torch.zeros(self.layers, self.bridge.cfg.n_heads), torch.zeros(self.layers, length)
        for result in self.patched("node", self.subject.clean, self.subject.corrupted):
            for node, score in result.node_scores.items():
                if node.kind == "attn_head_out":
                    heads[node.layer, node.head] += score / pairs
                elif node.kind == "mlp_out":
                    mlps[node.layer, node.position] += score / pairs
        return torch.cat([heads.flatten(), mlps.flatten()])

    def circuit(self, kept: Tensor) -> Tensor:
        """It has the gradient of the run into which values are put, the other run of fmr's: so the two change places."""
        scores = torch.zeros(kept.shape, dtype=torch.double)
        for result in self.patched("edge", self.subject.corrupted, self.subject.clean):
            for (writer, reader), score in result.edge_scores.items():
                scores[self.writer(writer), self.reader(reader)] -= score / len(self.subject.clean)
        return scores.flatten()

    def writer(self, node: Node) -> int:
        heads = self.bridge.cfg.n_heads
        if node.layer is None:
            return 0
        return 1 + node.layer * (heads + 1) + (heads if node.head is None else node.head)

    def reader(self, node: Node) -> int:
        heads = self.bridge.cfg.n_heads
        kinds = ("q_input", "k_input", "v_input", "mlp_in")
        if node.kind == "logits":
            return -1
        return node.layer * (3 * heads + 1) + kinds.index(node.kind) * heads + (node.head or 0)

    def heads(self, heads: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        def put(head: int, given: Tensor) -> Any:
            def patch(value: Tensor, hook: object) -> Tensor:
                value = value.clone()
                value.view(*value.shape[:2], *given.shape[1:])[:, -1, head] = given[:, head]
                return value

            return patch

        found = []
        for layer, (head, given) in enumerate(zip(heads, values, strict=True)):
            hooks = [(f"blocks.{layer}.attn.hook_z", put(head, given))]
            logits = self.bridge.run_with_hooks(self.subject.corrupted, fwd_hooks=hooks, use_cache=False)
            found.append(self.subject.metric(logits))
        return torch.cat(found)

    def cells(self, trace: Trace) -> Tensor:
        def noised(value: Tensor, hook: object) -> Tensor:
            value = value.clone()
            value[:, trace.places] += trace.noise
            return value

        def put(state: Tensor) -> Any:
            def patch(value: Tensor, hook: object) -> Tensor:
                value = value.clone()
                value[:, trace.position] = state
                return value

            return patch

        found = []
        for layer, state in enumerate(trace.states):
            hooks = [("hook_embed", noised), (stream(layer), put(state))]
            logits = self.bridge.run_with_hooks(trace.ids, fwd_hooks=hooks, use_cache=False)
            found.append(logits[0, -1].softmax(-1)[trace.answer])
        return torch.stack(found)


def stream(layer: int) -> str:
    """The hook point of the residual stream after a layer."""
    return f"blocks.{layer}.hook_resid_post"


if __name__ == "__main__":
    main("transformer-lens", works, Hooks, Analysis)
