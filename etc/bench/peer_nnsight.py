"""nnsight: module outputs, and the operations in a module's forward where their source is asked for.

A trace takes the lines of its block out of the function and runs them elsewhere: a value is returned after the block.
"""
# ruff: noqa: RET504

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import nnsight
from engine import Case
from peer_edits import GREEDY
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


if __name__ == "__main__":
    main("nnsight", works, Traces)
