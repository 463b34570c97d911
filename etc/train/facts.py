"""Train the zoo's "facts": a small GPT-2 that knows a made-up world, repeats what it saw, and tells who receives.

python etc/train/facts.py [--out FOLDER] [--steps N]
"""

import random
from collections.abc import Iterator

import torch
from common import Task, arguments, optimised, seeded, write
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fmr.zoo import measure, world

SEED = 0
ROWS, LENGTH = 32, 48
REPEATS_FIRST, REPEATS_LATER = 0.75, 0.3
"""The share of rows that repeat random words: at first most, so that induction forms, later enough to keep it."""

CONFIG = GPT2Config(
    n_layer=4, n_embd=128, n_head=4, n_positions=64, vocab_size=len(world.SPECIAL) + len(world.words()),
    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=1,
)  # fmt: skip


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a prompt begins with <bos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate((*world.SPECIAL, *world.words()))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<bos>", unk_token="<unk>",
        model_max_length=CONFIG.n_positions, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


# ---- what the model reads


class Rows:
    """Batches of token rows, and for each token how much it counts: answers in full, chance a little, padding not."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.draw = random.Random(f"rows {SEED}")
        self.number = tokenizer.get_vocab()
        self.words = world.words()
        self.facts = self.endless([(fact.prompt, fact.answer) for fact in world.facts()])
        self.gifts = self.endless([(gift.prompt, gift.answer) for gift in world.ioi(20_000, seed=1, trained=True)])

    def endless(self, sentences: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        while True:
            yield from self.draw.sample(sentences, len(sentences))

    def sentences(self) -> tuple[list[str], list[float]]:
        """Facts and gifts one after the other, sometimes after a sentence that says nothing."""
        words, weights = ["<bos>"], [0.0]
        while len(words) < LENGTH:
            if self.draw.random() < 0.2:
                opening = self.draw.choice(world.OPENINGS).split()
                words += opening
                weights += [0.1] * len(opening)
            prompt, answer = next(self.gifts if self.draw.random() < 0.2 else self.facts)
            words += [*prompt.split(), answer, "."]
            weights += [0.1] * len(prompt.split()) + [1.0, 0.1]
        return words[:LENGTH], weights[:LENGTH]

    def repeated(self) -> tuple[list[str], list[float]]:
        """A few different words again and again: known from the second word of the second time on."""
        length = self.draw.randint(3, LENGTH // 2)
        text = self.draw.sample(self.words, length)
        words = ["<bos>", *text * (LENGTH // length + 1)][:LENGTH]
        return words, [0.0] * (length + 2) + [1.0] * (LENGTH - length - 2)

    def batch(self, share: float) -> tuple[Tensor, Tensor]:
        rows = [self.repeated() if self.draw.random() < share else self.sentences() for _ in range(ROWS)]
        ids = [[self.number[word] for word in words] for words, _ in rows]
        return torch.tensor(ids), torch.tensor([weights for _, weights in rows])


def loss_of(model: GPT2LMHeadModel, ids: Tensor, weights: Tensor) -> Tensor:
    logits = model(ids[:, :-1]).logits
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counts = weights[:, 1:].flatten()
    return (each * counts).sum() / counts.sum()


def main() -> None:
    given = arguments(__doc__, "facts", steps=4000)
    seeded(SEED)
    tokenizer, model = word_tokenizer(), GPT2LMHeadModel(CONFIG)
    rows = Rows(tokenizer)

    def loss(done: float) -> Tensor:
        return loss_of(model, *rows.batch(REPEATS_FIRST if done < 0.15 else REPEATS_LATER))

    def look() -> dict[str, float]:
        return measure("facts", model, tokenizer, seed=7)

    optimised(model, loss, steps=given.steps, rate=1e-3, decay=0.01, look=look, every=500)
    people, relations = len(world.subjects()), len(world.relations())
    write(
        given.out, model, tokenizer,
        Task(
            name="facts", script="etc/train/facts.py", seed=SEED, steps=given.steps, metrics=look(),
            knows=f"{people * relations} facts about {people} people of a made-up world, each in several phrasings; "
            "who receives what another gives; to continue what is repeated",
            world=world.fingerprint(),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
