"""Where edits take their values from: runs one beside another, one after another, saved ones, inputs, other sites."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import Site, edits
from tests.models import build
from tests.promises.test_edits import padded

A, B = "transformer.h.0.mlp", "transformer.h.1.ln_1/layer_norm#0"
BLOCKS = "transformer.h.0", "transformer.h.1"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("gpt2")[0]


@pytest.fixture(scope="module")
def inputs() -> list[Tensor]:
    return list(torch.randint(3, 32, (3, 2, 6), generator=torch.Generator().manual_seed(1)))


def logits(run: fmr.Run) -> Tensor:
    return run.output.logits  # type: ignore[no-any-return]


def hooked(model: nn.Module, ids: Tensor, changes: dict[str, tuple[int, Tensor]]) -> Tensor:
    """The logits where hooks put values at one position of module outputs."""
    handles = []
    for path, (position, value) in changes.items():

        def change(m: Any, a: Any, out: Tensor, position: int = position, value: Tensor = value) -> Tensor:
            out = out.clone()
            out[:, position] = value
            return out

        handles.append(model.get_submodule(path).register_forward_hook(change))
    with torch.no_grad():
        found: Tensor = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found


def test_several_sources_in_one_run_are_what_hooks_would_do_in_any_order(model: nn.Module, inputs: list[Tensor]) -> None:
    base, *others = inputs
    one, two = (fmr.run(model, ids, use_cache=False) for ids in others)
    first, second = Site(A, positions=2), Site(BLOCKS[1], positions=4)
    expected = hooked(model, base, {A: (2, one[first]), BLOCKS[1]: (4, two[second])})
    asked = {first: edits.Interchange(one), second: edits.Interchange(two)}
    for order in (asked, dict(reversed(asked.items()))):
        assert torch.equal(logits(fmr.run(model, base, use_cache=False, edits=order)), expected)


def test_sources_in_series_compose(model: nn.Module, inputs: list[Tensor]) -> None:
    base, middle, start = inputs
    first, second = Site(A, positions=2), Site(BLOCKS[1], positions=4)
    source = fmr.run(model, start, keep=[A])
    through = fmr.run(model, middle, keep=[BLOCKS[1]], edits={first: edits.Interchange(source)})
    run = fmr.run(model, base, use_cache=False, edits={second: edits.Interchange(through)})

    taken: list[Tensor] = []
    handle = model.get_submodule(BLOCKS[1]).register_forward_hook(lambda m, a, out: taken.append(out))
    hooked(model, middle, {A: (2, source[first])})
    handle.remove()
    assert torch.equal(logits(run), hooked(model, base, {BLOCKS[1]: (4, taken[0][:, 4])}))


def test_a_series_of_one_stage_is_one_source_beside_the_run(model: nn.Module, inputs: list[Tensor]) -> None:
    base, source, _ = inputs
    sites = [Site(A, positions=1), Site(BLOCKS[0], units=slice(4))]
    beside = fmr.run(model, base, keep=(), edits={site: edits.Interchange(source) for site in sites})
    before = fmr.run(model, source, keep=[A, BLOCKS[0]], edits={A: edits.Interchange(None)})
    after = fmr.run(model, base, keep=(), edits={site: edits.Interchange(before) for site in sites})
    assert torch.equal(logits(beside), logits(after))


def test_a_source_that_is_missing_leaves_its_site_alone(model: nn.Module, inputs: list[Tensor]) -> None:
    base, source, _ = inputs
    given = fmr.run(model, source, keep=[A])
    asked = {A: edits.Interchange(given), BLOCKS[1]: edits.Interchange(None)}
    run = fmr.run(model, base, keep=(), edits=asked)
    assert torch.equal(logits(run), logits(fmr.run(model, base, keep=(), edits={A: edits.Interchange(given)})))
    assert (run.receipts[BLOCKS[1]].fired, run.receipts[BLOCKS[1]].changed) == (1, 0)
    nothing = fmr.run(model, base, keep=(), edits=dict.fromkeys(asked, edits.Interchange(None)))
    assert torch.equal(logits(nothing), logits(fmr.run(model, base, keep="none")))


def test_inputs_as_a_source_run_once_for_all_sites_and_passes(model: nn.Module, inputs: list[Tensor]) -> None:
    base, source, _ = inputs
    calls: list[Tensor] = []
    counting = model.register_forward_pre_hook(lambda m, args: calls.append(args[0]))
    sites = [Site(A, positions=1), BLOCKS[0], Site(BLOCKS[1], positions=-1)]
    with fmr.track(model, keep=(), edits={site: edits.Interchange(source) for site in sites}) as run:
        model(base)
        model(base)
    counting.remove()
    assert [call is source for call in calls] == [True, False, False]
    assert {receipt.fired for receipt in run.receipts.values()} == {2}


class Noisy(nn.Module):
    """A model that draws random numbers, counts, and updates statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.calls, self.last = 0, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.last = self.calls + 1, x
        return self.drop(self.norm(self.linear(x)))  # type: ignore[no-any-return]


def test_inputs_as_a_source_leave_the_model_and_the_random_numbers_as_they_were() -> None:
    model, base, other = Noisy(), torch.randn(3, 4), torch.randn(3, 4)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    run = fmr.run(model, base, keep=(), edits={Site("linear", examples=0): edits.Interchange(other)})
    drawn = torch.rand(1)
    torch.manual_seed(1)
    source = fmr.run(copy.deepcopy(twin), other, keep=["linear"])
    torch.manual_seed(1)
    again = fmr.run(twin, base, keep=(), edits={Site("linear", examples=0): edits.Interchange(source)})
    assert torch.equal(run.output, again.output)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert model.norm.num_batches_tracked == 1
    assert model.calls == 0  # as what is kept of an edited run itself, too
    assert model.last.shape == ()


def test_a_cache_among_the_inputs_of_a_source_is_as_before(model: nn.Module, inputs: list[Tensor]) -> None:
    from transformers import DynamicCache

    with torch.no_grad():
        cache: Any = model(inputs[0], past_key_values=DynamicCache(), use_cache=True).past_key_values
    before = cache.layers[0].keys.clone()
    given = {"input_ids": inputs[1], "past_key_values": cache, "use_cache": True}
    fmr.run(model, inputs[2], keep=(), edits={Site(A, examples=0): edits.Interchange(given)})
    assert cache.get_seq_length() == 6
    assert torch.equal(cache.layers[0].keys, before)


def test_a_pass_is_a_source_and_one_example_serves_all(model: nn.Module, inputs: list[Tensor]) -> None:
    base, one, two = inputs
    with fmr.track(model, keep=[A]) as both:
        model(one)
        model(two)
    for number, ids in enumerate((one, two)):
        run = fmr.run(model, base, keep=[A], edits={A: edits.Interchange(both.passes[number])})
        assert torch.equal(run[A], fmr.run(model, ids, keep=[A])[A])
    single = fmr.run(model, one[:1], keep=[A])
    run = fmr.run(model, base, keep=[A], edits={A: edits.Interchange(single)})
    assert torch.equal(run[A], single[A].expand_as(run[A]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_source_counts_its_own_real_tokens_whatever_it_kept(side: str, tmp_path: Any) -> None:
    model, given, ids = padded(side)
    path = "model.layers.0"
    few, whole = fmr.run(model, keep=[path], **given), fmr.run(model, **given)
    few.save(tmp_path / "few.fmr")
    for position in (0, -1, [1, 3], slice(1, 3)):
        site = Site(path, positions=position)
        for source in (few, whole, dict(given), fmr.load(tmp_path / "few.fmr"), fmr.run(model, keep="*layers.0*", **given)):
            run = fmr.run(model, keep=(), edits={site: edits.Interchange(source)}, **given)
            assert run.receipts[site].changed == 0
    short = fmr.run(model, input_ids=ids, keep=[path])
    site = Site(path, positions=-1, examples=[0])
    run = fmr.run(model, keep=[path], edits={site: edits.Interchange(short)}, **given)
    assert torch.equal(run[path][0, 7 if side == "left" else 4], short[path][0, -1])


@pytest.mark.parametrize("sites", [(A, B), (Site(BLOCKS[0], units=0), Site(BLOCKS[0], units=slice(4, 9)))])
def test_edits_of_disjoint_sites_have_no_order(model: nn.Module, inputs: list[Tensor], sites: tuple[Any, Any]) -> None:
    base = inputs[0]
    asked: dict[Any, Any] = {sites[0]: edits.Scale(0.5), sites[1]: edits.Add(1.0)}
    one = fmr.run(model, base, keep=(), edits=asked)
    two = fmr.run(model, base, keep=(), edits=dict(reversed(asked.items())))
    assert torch.equal(logits(one), logits(two))
    both = fmr.run(model, base, keep=(), edits={sites[0]: [edits.Scale(0.5), edits.Add(1.0)]})
    turned = fmr.run(model, base, keep=(), edits={sites[0]: [edits.Add(1.0), edits.Scale(0.5)]})
    assert not torch.equal(logits(both), logits(turned))  # of one site they have


def test_an_empty_selection_changes_nothing(model: nn.Module, inputs: list[Tensor]) -> None:
    site = Site(BLOCKS[0], units=[])
    run = fmr.run(model, inputs[0], keep=(), edits={site: edits.Zero()}, optional=True)
    assert (run.receipts[site].fired, run.receipts[site].changed) == (0, 0)
    assert torch.equal(logits(run), logits(fmr.run(model, inputs[0], keep="none")))
