"""TransformerLens: its bridge around the model; it asks for a tokenizer, which none of this work uses."""

from collections.abc import Iterator
from typing import Any

from engine import Case
from peer_table import EVERYTHING, PATTERNS
from peer_work import Sample, Work, main, twin
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are numbers, so that nothing is downloaded."""
    inner = Tokenizer(models.WordLevel({str(word): word for word in range(vocabulary)}, unk_token="0"))
    special = {"bos_token": "0", "eos_token": "0", "pad_token": "0"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, add_bos_token=True, name_or_path="numbers", **special)


def works(case: Case) -> Iterator[Work]:
    model = twin(case)
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.config.n_layer)]
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=words(model.config.vocab_size)).eval()

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


if __name__ == "__main__":
    main("transformer-lens", works)
