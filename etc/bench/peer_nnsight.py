"""nnsight: module outputs, and the operations in a module's forward where their source is asked for.

A trace takes the lines of its block out of the function and runs them elsewhere: a value is returned after the block.
"""
# ruff: noqa: RET504

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import nnsight
import torch
from engine import Case
from peer_edits import GREEDY
from peer_methods import REAL, Subject, Trace
from peer_table import EVERYTHING, PATTERNS
from peer_work import Sample, Work, main, tensors_in, twin, words
from torch import Tensor, nn

LINEAR = ("x_view_0", "torch_addmm_0", "x_view_1")
ATTENTION = "attn.source.attention_interface_1.source"
SOFTMAX = f"{ATTENTION}.nn_functional_softmax_0"
SOURCE = (
    "ln_1.source.F_layer_norm_0",
    *(f"attn.c_attn.source.{name}" for name in LINEAR),
    "attn.source.split_1",
    "attn.source.key_states_view_1",
    "attn.source.transpose_2",
    "attn.source.value_states_view_1",
    "attn.source.transpose_3",
    "attn.source.query_states_view_0",
    "attn.source.transpose_4",
    f"{ATTENTION}.key_transpose_0",
    f"{ATTENTION}.torch_matmul_0",
    f"{ATTENTION}.attn_weights_0",
    f"{ATTENTION}.attn_weights_1",
    SOFTMAX,
    f"{ATTENTION}.attn_weights_type_0",
    f"{ATTENTION}.nn_functional_dropout_0",
    f"{ATTENTION}.torch_matmul_1",
    f"{ATTENTION}.attn_output_transpose_0",
    "attn.source.attn_output_reshape_0",
    "attn.source.contiguous_0",
    *(f"attn.c_proj.source.{name}" for name in LINEAR),
    "attn.resid_dropout.source.F_dropout_0",
    "source.hidden_states_1",
    "ln_2.source.F_layer_norm_0",
    *(f"mlp.c_fc.source.{name}" for name in LINEAR),
    "mlp.act.source.torch_pow_0",
    "mlp.act.source.torch_tanh_0",
    *(f"mlp.c_proj.source.{name}" for name in LINEAR),
    "mlp.dropout.source.F_dropout_0",
    "source.hidden_states_5",
)
"""What a GPT-2 block computes that its source names, in the order in which it is computed."""


def works(case: Case) -> Iterator[Work]:
    ids, model, opened = case.ids, nnsight.NNsight(twin(case)), nnsight.NNsight(twin(case))
    blocks, inside = model.transformer.h, opened.transformer.h
    prepare(inside)

    def modules() -> Any:
        with model.trace(ids, use_cache=False) as tracer:
            cache = tracer.cache()
        return cache

    def source() -> Any:
        with opened.trace(ids, use_cache=False):
            values = nnsight.save([at(block, path).output for block in inside for path in SOURCE])
        return values

    def patterns() -> Any:
        with model.trace(ids, use_cache=False):
            values = nnsight.save([block.attn.output[1] for block in blocks])
        return values

    def softmax() -> Any:
        with opened.trace(ids, use_cache=False):
            values = nnsight.save([at(block, SOFTMAX).output for block in inside])
        return values

    yield Work(EVERYTHING, "tracer.cache(), module outputs", modules, cached)
    yield Work(EVERYTHING, ".source, ops in the blocks", source, lambda values: sourced(values, len(blocks)))
    yield Work(PATTERNS, "attn.output[1]", patterns, lambda values: Sample(values, values))
    yield Work(PATTERNS, ".source softmax", softmax, lambda values: Sample(values, values))


def at(block: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), block)


def prepare(blocks: Any) -> None:
    """Open the source of every module once: what is opened while its forward runs comes too late for that run."""
    for block in blocks:
        for path in SOURCE:
            _ = at(block, path.partition("source")[0] + "source")


def cached(cache: Any) -> Sample:
    values = {key: cache[key].output for key in cache.keys()}  # noqa: SIM118
    patterns = [value[1] for key, value in values.items() if key.endswith(".attn")]
    return Sample(list(tensors_in(list(values.values()))), patterns, values["model"].logits)


def sourced(values: Any, blocks: int) -> Sample:
    a_block = len(values) // blocks
    return Sample(list(tensors_in(values)), values[SOURCE.index(SOFTMAX) :: a_block])


class Traces:
    """Edits by assignment in a trace."""

    how: Mapping[str, str] = {
        "add": "block.output = ...",
        "put": "block.output[...] = ...",
        "heads": "attn.c_proj.input = ...",
        "interchange": "two traces",
        "steer": "generate, tracer.iter",
    }

    def __init__(self, model: nn.Module) -> None:
        self.model = nnsight.LanguageModel(model, tokenizer=words(model.config.vocab_size))  # a plain one cannot generate
        self.blocks = self.model.transformer.h

    def add(self, ids: Tensor, layer: int, vector: Tensor) -> Tensor:
        with self.model.trace(ids, use_cache=False):
            self.blocks[layer].output = self.blocks[layer].output + vector
            logits = nnsight.save(self.model.output.logits)
        return logits

    def put(self, ids: Tensor, layer: int, positions: Sequence[int], values: Tensor) -> Tensor:
        with self.model.trace(ids, use_cache=False):
            self.blocks[layer].output[range(len(positions)), positions] = values
            logits = nnsight.save(self.model.output.logits)
        return logits

    def heads(self, ids: Tensor, values: Mapping[int, Tensor]) -> Tensor:
        with self.model.trace(ids, use_cache=False):
            for layer, given in values.items():
                self.blocks[layer].attn.c_proj.input = given
            logits = nnsight.save(self.model.output.logits)
        return logits

    def interchange(self, ids: Tensor, source: Tensor, layer: int, position: int) -> Tensor:
        with self.model.trace(source, use_cache=False):
            taken = nnsight.save(self.blocks[layer].output[:, position])
        return self.put(ids, layer, [position] * len(ids), taken)

    def steer(self, ids: Tensor, layer: int, vector: Tensor, steps: int) -> Tensor:
        with self.model.generate(ids, min_new_tokens=steps, max_new_tokens=steps, **GREEDY) as tracer:
            for _ in tracer.iter[:steps]:
                self.blocks[layer].output = self.blocks[layer].output + vector
            tokens = nnsight.save(tracer.result)
        return tokens


class Studies:
    """Methods written by hand in traces: it has edits and gradients, and no methods of its own."""

    how: Mapping[str, str] = {
        "attribution": "two traces and backward",
        "cells": "layer.output[...] = ..., 30 cells, 18 times",
        "heads": "o_proj.input[...] = ..., 30 heads, 9 times",
    }

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        for weight in model.parameters():
            weight.requires_grad_(False)
        self.subject, self.model = subject, nnsight.NNsight(model)
        self.layers = self.model.model.layers if subject.name == REAL else ()

    def attribution(self) -> Tensor:
        model, layers, subject = self.model, self.layers, self.subject
        with model.trace(subject.clean, use_cache=False):
            before = nnsight.save([sites(layer) for layer in layers])
        with torch.enable_grad():
            with model.trace(subject.corrupted, use_cache=False):
                model.model.embed_tokens.output.requires_grad_()
                after = nnsight.save([sites(layer) for layer in layers])
                answer = subject.metric(model.output.logits).sum()
                slopes = nnsight.save([])
                with answer.backward():
                    for found in after[::-1]:
                        slopes.append([value.grad for value in found[::-1]])
        with torch.no_grad():
            effects = [
                [(old - new) * slope for old, new, slope in zip(olds, news, those[::-1], strict=True)]
                for olds, news, those in zip(before, after, slopes[::-1], strict=True)
            ]
        heads, pairs = model.config.num_attention_heads, len(subject.clean)
        z = [found[1].unflatten(-1, (heads, -1)).sum((0, 1, 3)) for found in effects]
        return torch.cat([*z, *(found[3].sum((0, 2)) for found in effects)]) / pairs

    def heads(self, heads: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.head(*one) for one in zip(self.layers, heads, values, strict=True)])

    def head(self, layer: Any, head: int, given: Tensor) -> Tensor:
        wide = given.shape[-1]
        with self.model.trace(self.subject.corrupted, use_cache=False):
            layer.self_attn.o_proj.input[:, -1, head * wide : (head + 1) * wide] = given[:, head]
            logits = nnsight.save(self.model.output.logits)
        return self.subject.metric(logits)

    def cells(self, trace: Trace) -> Tensor:
        return torch.stack([self.cell(trace, layer, state) for layer, state in zip(self.layers, trace.states, strict=True)])

    def cell(self, trace: Trace, layer: Any, state: Tensor) -> Tensor:
        with self.model.trace(trace.ids, use_cache=False):
            self.model.model.embed_tokens.output[:, trace.places] += trace.noise
            layer.output[:, trace.position] = state
            logits = nnsight.save(self.model.output.logits)
        return logits[0, -1].softmax(-1)[trace.answer]


def sites(layer: Any) -> list[Tensor]:
    """What is patched in a layer, in the order in which it is computed: stream, z, and what attention and memory write."""
    return [layer.input, layer.self_attn.o_proj.input, layer.self_attn.output[0], layer.mlp.output]


if __name__ == "__main__":
    main("nnsight", works, Traces, Studies)
