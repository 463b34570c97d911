"""Edits while a model generates: an edit that changes nothing changes no bit, and positions mean the same tokens anyhow."""

import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import EditError, Site, edits
from tests.models import build

LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
STEPS = 4


class Generator(NamedTuple):
    """A model that generates, its inputs, two of its blocks, and whether an encoder runs before."""

    model: nn.Module
    inputs: dict[str, Tensor]
    blocks: tuple[str, str]
    encoder: str = ""

    def run(self, **more: Any) -> Any:
        given = {"max_new_tokens": STEPS, "do_sample": False, "output_scores": True, "return_dict_in_generate": True, **more}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model.generate(**self.inputs, **given)  # type: ignore[operator]


@lru_cache(maxsize=16)
def generator(name: str) -> Generator:
    model, _, given = build(name)
    model.config.use_cache = True
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    padded = {"input_ids": ids.where(LEFT.bool(), 2), "attention_mask": LEFT}
    if name == "whisper":
        return Generator(
            model, {"input_features": given["input_features"]}, ("model.decoder.layers.0",) * 2, "model.encoder.layers.0"
        )
    if name == "t5":
        padded = {"input_ids": ids.where(LEFT.flip(1).bool(), 2), "attention_mask": LEFT.flip(1)}
        return Generator(model, padded, ("decoder.block.0:0", "decoder.block.1:0"), "encoder.block.0:0")
    if name == "mamba":
        return Generator(model, {"input_ids": ids}, ("backbone.layers.0", "backbone.layers.1"))
    path = "transformer.h" if name.startswith("gpt2") else "model.layers"
    return Generator(model, padded, (f"{path}.0", f"{path}.1"))


NAMES = ["gpt2", "gpt2_eager", "llama", "mixtral", "mamba", "t5", "whisper"]
WAYS = [
    (name, cache, beams) for name in NAMES for cache in (True, False) for beams in (1, 3) if (name, beams) != ("mamba", 3)
]
"""Mamba's cache cannot be put in another order, which beams need."""


def copied(value: Tensor, context: edits.Context) -> Tensor:
    return value.clone()


@pytest.mark.parametrize(("name", "cache", "beams"), WAYS)
def test_an_edit_that_changes_nothing_changes_no_token_and_no_score(name: str, cache: bool, beams: int) -> None:
    one = generator(name)
    asked: dict[Any, Any] = {
        one.blocks[0]: copied,
        Site(one.blocks[1], positions=1): copied,
        Site(one.blocks[1], positions=-1): copied,
    }
    asked |= {one.encoder: copied, Site(one.encoder, positions=2): copied} if one.encoder else {}
    plain = one.run(use_cache=cache, num_beams=beams)
    with fmr.track(one.model, keep=(), edits=asked) as run:
        edited = one.run(use_cache=cache, num_beams=beams)
    assert torch.equal(plain.sequences, edited.sequences)
    assert len(plain.scores) == len(edited.scores) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, edited.scores, strict=True))
    assert run.receipts[one.blocks[0]].fired == STEPS
    assert run.receipts[Site(one.blocks[1], positions=1)].fired == (1 if cache else STEPS - bool(one.encoder))
    if one.encoder:
        assert run.receipts[one.encoder].fired == run.receipts[Site(one.encoder, positions=2)].fired == 1
        assert len(run.passes) == STEPS + 1


@pytest.mark.parametrize("name", NAMES)
def test_absolute_positions_mean_the_same_tokens_with_a_cache_and_without(name: str) -> None:
    one, told = generator(name), {}
    first, last = (0, 3) if one.encoder else (2, 6)
    for cache in (True, False):
        scaled = {Site(one.blocks[0], positions=position): edits.Scale(3.0) for position in (first, last)}
        with fmr.track(one.model, keep=(), edits=scaled) as run:
            told[cache] = one.run(use_cache=cache)
        assert all(run.receipts[site].changed for site in scaled)
    assert torch.equal(told[True].sequences, told[False].sequences)
    for a, b in zip(told[True].scores, told[False].scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not torch.equal(one.run().scores[0], told[True].scores[0])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_positions_in_a_left_padded_batch_are_those_of_each_example_alone(name: str) -> None:
    one = generator(name)
    for positions in (1, 5, -1):
        scaled = {Site(one.blocks[0], positions=positions): edits.Scale(3.0)}
        with fmr.track(one.model, keep=(), edits=scaled):
            both = one.run()
        for row in range(2):
            alone = {"input_ids": one.inputs["input_ids"][row : row + 1, LEFT[row].bool()]}
            with fmr.track(one.model, keep=(), edits=scaled):
                single = one._replace(inputs=alone).run()
            assert torch.equal(single.sequences[0, -STEPS:], both.sequences[row, -STEPS:])
            for a, b in zip(single.scores, both.scores, strict=True):
                torch.testing.assert_close(a[0], b[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("passes", "fired"), [(None, STEPS), (0, 1), (2, 1), ([1, 3], 2), (slice(1, None), STEPS - 1)])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_prompt_step_and_every_step_fire_that_often(name: str, passes: Any, fired: int) -> None:
    one = generator(name)
    site = Site(one.blocks[1], passes=passes)
    plain = one.run()
    with fmr.track(one.model, keep=(), edits={site: edits.Scale(2.0)}) as run:
        edited = one.run()
    assert run.receipts[site].fired == fired
    moved = [not torch.equal(a, b) for a, b in zip(plain.scores, edited.scores, strict=True)]
    first = {0: 0, 2: 2}.get(passes, 1) if isinstance(passes, int) else 0 if passes is None else 1
    assert moved.index(True) == first  # the edited step is the first that changes


def test_an_encoder_is_edited_in_its_own_pass_and_read_by_cross_attention() -> None:
    one = generator("t5")
    plain = one.run()
    with fmr.track(one.model, edits={one.encoder: edits.Zero()}) as run:
        edited = one.run()
    assert not run.passes[0][one.encoder].any()
    assert not torch.equal(plain.scores[0], edited.scores[0])
    step = run.passes[1]
    cross = next(block for block in fmr.locate(step).attention if block.kind == "cross")
    for site in (cross.pattern.at(heads=1), cross.k.at(positions=0), cross.v.at(positions=-1)):
        with fmr.track(one.model, keep=(), edits={site: edits.Zero()}, optional=True) as run:
            edited = one.run()
        assert run.receipts[site].changed
        assert not torch.equal(plain.scores[0], edited.scores[0])


def test_keys_of_a_padded_encoder_count_real_tokens_in_every_pass() -> None:
    one = generator("t5")
    with fmr.track(one.model) as run:
        one.run()
    keys = next(block for block in fmr.locate(run.passes[1]).attention if block.kind == "cross").k
    site = keys.at(positions=-1)
    with fmr.track(one.model, keep=[keys], edits={site: edits.Zero()}) as edited:
        one.run()
    changed = (edited.passes[1][keys.id] != run.passes[1][keys.id]).any(1).any(-1)
    assert changed.nonzero().tolist() == [[0, 3], [1, 5]]  # the last real token of each


def test_keys_of_a_cache_count_the_tokens_before_them() -> None:
    one = generator("llama")
    with fmr.track(one.model) as run:
        one.run()
    keys = fmr.locate(run.passes[2]).attention[1].k
    assert run.passes[2][keys.id].shape[2] == 8
    site = keys.at(positions=1)
    with fmr.track(
        one.model, keep=[keys], edits={Site(keys.id, positions=1, passes=2): edits.Zero()}, optional=True
    ) as edited:
        one.run()
    changed = (edited.passes[2][keys.id] != run.passes[2][keys.id]).any(1).any(-1)
    assert site.id == keys.id
    assert changed.nonzero().tolist() == [[0, 3], [1, 1]]


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_a_generation_is_the_source_of_another_step_by_step(name: str, tmp_path: Any) -> None:
    one = generator(name)
    site = Site(one.blocks[0], positions=3 if one.encoder else 7)
    with fmr.track(one.model, keep=[one.blocks[0]]) as source:
        plain = one.run()
    source.save(tmp_path / "source.fmr")
    for origin in (source, fmr.load(tmp_path / "source.fmr")):
        with fmr.track(
            one.model, keep=(), edits={site: edits.Interchange(origin), one.blocks[0]: edits.Interchange(origin)}
        ) as run:
            again = one.run()
        assert torch.equal(plain.sequences, again.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.scores, again.scores, strict=True))
        assert run.receipts[site].changed == 0
        assert run.receipts[site].fired


def test_positions_after_a_cache_that_tells_no_length_are_refused_not_guessed() -> None:
    one = generator("mamba")
    ids = one.inputs["input_ids"]
    with torch.no_grad():
        cache = one.model(ids, use_cache=True).cache_params
    site = Site(one.blocks[0], positions=7)
    with pytest.raises(EditError, match=r"counts positions from the first token, but nothing tells how many came before"):
        fmr.run(one.model, ids[:, :1], cache_params=cache, use_cache=True, keep=(), edits={site: edits.Zero()})
    last = Site(one.blocks[0], positions=-1)
    run = fmr.run(one.model, ids[:, :1], cache_params=cache, use_cache=True, keep=(), edits={last: edits.Zero()})
    assert run.receipts[last].changed == 2 * 16
