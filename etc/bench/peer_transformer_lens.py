"""TransformerLens: its bridge around the model; it asks for a tokenizer, which none of this work uses."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine import Case
from peer_table import EVERYTHING, PATTERNS
from peer_work import Sample, Work, main, twin, words
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge


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


def stream(layer: int) -> str:
    """The hook point of the residual stream after a layer."""
    return f"blocks.{layer}.hook_resid_post"


if __name__ == "__main__":
    main("transformer-lens", works, Hooks)
