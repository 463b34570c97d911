"""Positions count real tokens wherever padding is told: masks of any form, calls inside, caches; else an error says why."""

import warnings
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import EditError, Site, edits

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
IDS = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(0)).where(LEFT.bool(), 2)
STEPS = 4


@lru_cache(maxsize=8)
def model(name: str) -> Any:
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    made: Any
    kinds: Any = {
        "full": (LlamaForCausalLM, LlamaConfig, {}),
        "window": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
        "mixed": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 4, "head_dim": 8}),
    }
    kind, config, more = kinds[name]
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = kind(config(vocab_size=32, intermediate_size=24, **shape, **more)).eval()
    made.generation_config.eos_token_id = None
    return made


def generated(name: str, site: Site, ids: Tensor, mask: Tensor, static: bool) -> tuple[list[Tensor], fmr.Run]:
    """The scores of a generation with what a site holds tripled."""
    given: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "output_scores": True, "pad_token_id": 2}
    given |= {"cache_implementation": "static", "disable_compile": True} if static else {}
    with warnings.catch_warnings(), fmr.track(model(name), keep=(), edits={site: edits.Scale(3.0)}) as run:
        warnings.simplefilter("ignore")
        out = model(name).generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **given)
    return list(out.scores), run


@pytest.mark.parametrize("position", [1, 5, -1])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["full", "window", "mixed"])
def test_a_padded_batch_with_a_cache_of_any_kind_is_each_example_alone(name: str, static: bool, position: int) -> None:
    site = Site("model.layers.0", positions=position)
    both, run = generated(name, site, IDS, LEFT, static)
    assert run.receipts[site].changed
    for row in range(2):
        real = LEFT[row].bool()
        alone, _ = generated(name, site, IDS[row : row + 1, real], LEFT[row : row + 1, real], False)
        for a, b in zip(alone, both, strict=True):
            torch.testing.assert_close(a[0], b[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "static"), [("window", False), ("mixed", True), ("window", True)])
def test_keys_in_a_window_or_a_buffer_have_no_positions_that_anything_tells(name: str, static: bool) -> None:
    with fmr.track(model(name)) as run:
        model(name)(IDS[1:], use_cache=False)
    keys = fmr.locate(run).attention[0].k
    site = Site(keys.id, positions=-1, passes=3, layout=keys.layout)
    with pytest.raises(
        EditError, match=r"columns where the (pass and its cache|padded inputs of the model) have|does not tell"
    ):
        generated(name, site, IDS, LEFT, static)


# ---- masks of queries and keys, given by the user


CAUSAL = torch.ones(6, 6).tril().bool()
WIDE = CAUSAL & LEFT[:, None, :].bool()


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    "mask",
    [
        WIDE[:, None],
        added(WIDE)[:, None],
        WIDE[:, None].expand(2, 2, 6, 6),
        (WIDE & ~CAUSAL.tril(-3))[:, None],
        (WIDE | ~LEFT[:, :, None].bool())[:, None],
    ],
)
def test_a_mask_that_hides_padding_and_what_is_to_come_tells_which_tokens_are_real(mask: Any) -> None:
    site = Site("model.layers.0", positions=0)
    run = fmr.run(model("full"), IDS, attention_mask=LEFT, edits={site: edits.Zero()}, use_cache=False)
    wide = fmr.run(model("full"), IDS, attention_mask=mask, edits={site: edits.Zero()}, use_cache=False)
    rows = [(one[site.id] == 0).all(-1).nonzero().tolist() for one in (run, wide)]
    assert rows == [[[0, 3], [1, 0]]] * 2


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5,
        torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)),
        torch.stack([WIDE, WIDE.flip(0)], 1),
        torch.eye(6).bool()[None, None].expand(2, 1, 6, 6).logical_or(WIDE[:, None] & (torch.arange(6) == 4)),
    ],
)
def test_a_mask_that_hides_more_is_refused_where_positions_count(mask: Tensor) -> None:
    with pytest.raises(EditError, match=r"counts real tokens, and attention_mask does not tell which these are: .*Expected"):
        fmr.run(model("full"), IDS, attention_mask=mask, edits={Site("model.layers.0", positions=0): edits.Zero()})
    whole = fmr.run(model("full"), IDS, attention_mask=mask, keep=(), edits={"model.layers.0": edits.Zero()})
    assert whole.receipts["model.layers.0"].changed == IDS.numel() * 16


# ---- what the model's own call does not name


class Any_(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Masks(Any_):
    """Makes its own mask."""

    def forward(self, tokens: Tensor) -> Any:
        return self.inner(tokens, attention_mask=(tokens != 2).long())


class Knows(Any_):
    """Makes its own mask where it is given none."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.inner(input_ids, attention_mask=(input_ids != 2).long() if attention_mask is None else attention_mask)


class Named(Any_):
    """Has other names for what it hands on."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.inner(tokens, attention_mask=mask)


class Own(nn.Module):
    """An encoder of torch's own, whose mask says what is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Any:
        return self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 2)


@pytest.mark.parametrize("keep", [(), "all"])
@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: Any_(model("full")), (IDS, LEFT)),
        (lambda: Any_(Any_(model("full"))), (IDS, LEFT)),
        (lambda: Any_(model("full")), (IDS, WIDE[:, None])),
        (lambda: Named(model("full")), (IDS, LEFT)),
        (lambda: Masks(model("full")), (IDS,)),
        (lambda: Masks(model("full").model), (IDS,)),
        (Own, (IDS,)),
    ],
)
def test_calls_inside_tell_what_the_model_does_not_name(make: Any, given: Any, keep: Any) -> None:
    whole = make().eval()
    path = next(name for name, _ in whole.named_modules() if name.endswith("layers.0"))
    seen: list[Any] = []

    def look(value: Tensor, context: Any) -> Tensor:
        seen.append(value)
        return value * 2

    run = fmr.run(whole, *given, keep=keep, edits={Site(path, positions=-2): look, Site(path, positions=0): edits.Zero()})
    assert run.receipts[Site(path, positions=0)].changed == 2 * 16
    value = fmr.run(whole, *given, keep=[path])[path]
    assert torch.equal(seen[0], torch.stack([value[0, -2], value[1, -2]]))
    if keep == "all":
        assert (run[path] == 0).all(-1).nonzero().tolist() == [[0, 3], [1, 0]]


def test_positions_that_were_counted_before_the_padding_was_told_are_an_error() -> None:
    with pytest.raises(EditError, match=r"counted before a call inside it told which of them are padding"):
        fmr.run(Own().eval(), IDS, keep=(), edits={Site("embed", positions=0): edits.Zero()})
    full = torch.ones(2, 6, dtype=torch.long) * 5
    assert fmr.run(Own().eval(), full, keep=(), edits={Site("embed", positions=0): edits.Zero()}).receipts


class Pooled(nn.Module):
    """Means over the tokens that a mask of its own counts."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return ((x * 2) * mask[..., None]).sum(1)


def test_a_mask_of_a_name_that_says_nothing_is_no_guess() -> None:
    x = torch.randn(2, 6, 4)
    with pytest.raises(EditError, match=r"and nothing tells whether mask is true of these or of padding"):
        fmr.run(Pooled(), x, LEFT, edits={Site("/mul#0", positions=0): edits.Zero()})
    for mask in (torch.ones_like(LEFT), LEFT[:, :1]):
        run = fmr.run(Pooled(), x, mask, edits={Site("/mul#0", positions=0): edits.Zero()})
        assert not run["/mul#0"][:, 0].any()


def test_a_source_that_cannot_tell_its_padding_is_refused(tmp_path: Any) -> None:
    whole, path = Knows(model("full")), "inner.model.layers.0"
    source = fmr.run(whole, IDS, keep=[path])
    recorded, site = fmr.run(whole, IDS), Site(path, positions=1)
    for at, kept in enumerate((recorded, source)):
        kept.save(tmp_path / f"{at}.fmr")
    for origin in (recorded, fmr.load(tmp_path / "0.fmr")):
        assert fmr.run(whole, IDS, keep=(), edits={site: edits.Interchange(origin)}).receipts[site].changed == 0
    unpadded = fmr.run(whole, IDS.where(LEFT.bool(), 5))
    assert fmr.run(whole, IDS, keep=(), edits={site: edits.Interchange(unpadded)}).receipts[site].changed
    for origin in (source, fmr.load(tmp_path / "1.fmr"), IDS):
        with pytest.raises(EditError, match=r"source of the Interchange at .* does not know which of its tokens are real"):
            fmr.run(whole, IDS, keep=(), edits={Site(path, positions=1): edits.Interchange(origin)})
    assert fmr.run(whole, IDS, keep=(), edits={path: edits.Interchange(source)}).receipts[path].changed == 0


def test_what_came_before_is_unknown_where_a_cache_is_only_tensors() -> None:
    class Step(nn.Module):
        def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Tensor:
            return input_ids[..., None] * torch.ones(4)

    run = partial(fmr.run, Step(), IDS[:, :1], ((torch.ones(2, 2, 5, 8),),), keep=())
    with pytest.raises(EditError, match=r"nothing tells how many came before this pass"):
        run(edits={Site("/mul#0", positions=5): edits.Zero()})
    assert run(edits={Site("/mul#0", positions=-1): edits.Zero()}).receipts


@pytest.mark.parametrize("make", [lambda: Masks(model("full")), Own])
def test_replays_and_sweeps_count_the_same_tokens(make: Any) -> None:
    whole = make().eval()
    path = next(name for name, _ in whole.named_modules() if name.endswith("layers.0"))
    recorded = fmr.run(whole, IDS)
    sites = [Site(path, positions=n) for n in (0, -2)]

    def metric(output: Any) -> Tensor:
        return torch.as_tensor(output.logits if hasattr(output, "logits") else output)[:, -1, 3]

    found = fmr.sweep(whole, IDS, sites, edits.Zero(), metric, progress=False)
    for row, site in enumerate(sites):
        edited = fmr.run(whole, IDS, keep=(), edits={site: edits.Zero()}).output
        torch.testing.assert_close(found.values[row], metric(edited))
        torch.testing.assert_close(metric(fmr.replay(recorded, {site: edits.Zero()}).output), metric(edited))
