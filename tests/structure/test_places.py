"""A located site is read only where its value is made in the same place: another branch may give its ID to another value."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.errors import DrawError, IdError, TrackError
from tests.small import Fn

WIDTH, HEADS = 8, 2


class Forked(nn.Module):
    """One attention over one key head, which is repeated by a reshape where a mask is given and broadcast elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, size) for size in (WIDTH, 4, 4, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2), self.k(x)[:, None], self.v(x)[:, None]
        if mask is not None:
            k = k[:, :, None].expand(-1, 1, HEADS, -1, -1).reshape(len(x), HEADS, -1, 4)
            v = v[:, :, None].expand(-1, 1, HEADS, -1, -1).reshape(len(x), HEADS, -1, 4)
        pattern = (q @ k.mT / 2).softmax(-1)
        z = (pattern @ v).transpose(1, 2).reshape(len(x), -1, WIDTH)
        return x + self.o(z)


X, MASK = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0)), torch.ones(1)


@pytest.fixture
def forked() -> tuple[Forked, Any]:
    torch.manual_seed(0)
    model = Forked()
    return model, fmr.locate(fmr.run(model, X, MASK)).attention[0]


REFUSED = (
    r"found as the value that .*test_places.py:\d+ makes. In this pass .*test_places.py:\d+ makes '/reshape#0'.*another"
)


def test_a_site_of_another_branch_is_refused_in_a_recorded_run(forked: tuple[Forked, Any]) -> None:
    model, block = forked
    run = fmr.run(model, X)
    assert block.k.id in run
    with pytest.raises(IdError, match=REFUSED + r" value.*Locate it in this run or pass: fmr.locate"):
        run[block.k]
    with pytest.raises(IdError, match=REFUSED):
        run[block.head(1).k]
    with pytest.raises(IdError, match=REFUSED):
        run.last[block.k]


def test_a_site_of_another_branch_is_refused_by_plan(forked: tuple[Forked, Any]) -> None:
    model, block = forked
    later = fmr.run(model, X, keep=[block.k, block.pattern])
    with pytest.raises(IdError, match=REFUSED):
        later[block.k]
    assert torch.equal(later[block.pattern], fmr.run(model, X)[block.pattern.id])
    assert torch.equal(later[block.k.id], fmr.run(model, X)[block.k.id])


def test_a_site_of_the_same_branch_is_read(forked: tuple[Forked, Any]) -> None:
    model, block = forked
    full = fmr.run(model, 2 * X, MASK)
    assert torch.equal(fmr.run(model, 2 * X, MASK, keep=[block.k])[block.k], full[block.k])
    assert block.check(full).ok


def test_the_site_of_a_head_knows_the_place(forked: tuple[Forked, Any]) -> None:
    _, block = forked
    assert block.head(1).v.where == block.v.where
    assert "test_places.py" in block.v.where


def test_a_check_of_another_branch_is_refused(forked: tuple[Forked, Any]) -> None:
    model, block = forked
    with pytest.raises(IdError, match=REFUSED):
        block.check(fmr.run(model, X))


def test_a_gradient_of_another_branch_is_refused(forked: tuple[Forked, Any]) -> None:
    model, block = forked
    with fmr.track(model, grad=True) as run:
        model(X).sum().backward()
    assert run.grad[block.k.id].shape[-1] == WIDTH
    with pytest.raises(IdError, match=REFUSED):
        run.grad[block.k]


@pytest.mark.parametrize("keep", [lambda block: "all", lambda block: [block.k]], ids=["all", "plan"])
def test_a_loaded_run_and_a_copy_know_the_places(
    keep: Callable[[Any], Any], forked: tuple[Forked, Any], tmp_path: Path
) -> None:
    model, block = forked
    for number, given in enumerate([(X,), (X, MASK)]):
        run = fmr.run(model, *given, keep=keep(block))
        run.save(tmp_path / f"{number}.fmr")
        for one in (fmr.load(tmp_path / f"{number}.fmr"), deepcopy(run)):
            if number:
                assert torch.equal(one[block.k], run[block.k.id])
            else:
                with pytest.raises(IdError, match=REFUSED):
                    one[block.k]


def test_the_last_pass_that_has_the_id_is_asked_alone(forked: tuple[Forked, Any]) -> None:
    model, block = forked
    with fmr.track(model, keep=[block.k]) as run:
        model(X, MASK)
        model(X)
    with pytest.raises(IdError, match=REFUSED):
        run[block.k]
    assert run.passes[0][block.k].shape == (3, HEADS, 5, 4)


def test_a_module_of_torch_may_be_called_from_anywhere() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True).eval()
    block = fmr.locate(fmr.run(layer, X)).attention[0]
    later = fmr.run(layer, X, keep=[block.pattern, block.z])
    assert block.maps(later).shape == (3, HEADS, 5, 5)
    assert torch.equal(later[block.z], fmr.run(layer, X)[block.z])


class Late(Forked):
    """One attention whose softmax is the third cast where a first call fills something, as a cache does."""

    def forward(self, x: Tensor, fills: bool = False) -> Tensor:
        q, k, v = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2), self.k(x)[:, None], self.v(x)[:, None]
        if fills:
            k = k.to(torch.float64).float()
        pattern = (q @ k.mT / 2).softmax(-1, dtype=torch.float64).to(q.dtype)
        return x + self.o((pattern @ v).transpose(1, 2).reshape(len(x), -1, WIDTH))


@pytest.mark.parametrize(
    ("fills", "words"),
    [
        (True, r"'/to#2'\) was found as .*In this pass nothing has this ID: .*What is made there has the ID '/to#0' now"),
        (False, r"'/to#0'\) was found as .* makes '/to#0', which is another.*What is made there has the ID '/to#2' now"),
    ],
)
def test_a_value_that_goes_by_another_number_is_named(fills: bool, words: str) -> None:
    model = Late()
    pattern = fmr.locate(fmr.run(model, X, fills)).attention[0].pattern
    for keep in ("all", "none"):
        with pytest.raises(IdError, match=words):
            fmr.run(model, X, not fills, keep=keep)[pattern]


class Layer(nn.TransformerEncoderLayer):
    """A layer of torch under a name of its own."""


class Layers(nn.Sequential):
    """Layers of torch in a sequence under a name of its own."""


@pytest.mark.parametrize("nested", [False, True])
def test_a_root_without_a_forward_of_its_own_may_be_called_from_anywhere(nested: bool) -> None:
    layer = Layer(WIDTH, HEADS, 16, batch_first=True).eval()
    root = Layers(layer, nn.Linear(WIDTH, WIDTH)) if nested else layer
    structure = fmr.locate(fmr.run(root, X))
    sites = [structure.attention[0].pattern, structure.attention[0].out, structure.mlps[0].post]
    with fmr.track(root, keep=sites) as planned, torch.no_grad():
        root(X)
    whole = fmr.run(root, X)
    assert [node.where for node in whole.graph] == [""] * len(whole.graph)
    assert all(torch.equal(planned[site], whole[site]) for site in sites)
    assert fmr.run(root, X, edits={sites[2]: fmr.edits.Zero()}).receipts[sites[2]].fired == 1


def test_an_op_of_torch_is_called_where_the_models_own_code_calls_it() -> None:
    run = fmr.run(Fn(lambda self, x: self.layer(x), layer=Layers(nn.Linear(2, 2))), torch.randn(2))
    assert run.graph["layer.0/linear#0"].where.partition(":")[0].endswith("test_places.py")


def test_sites_are_compared_and_printed_without_the_place(forked: tuple[Forked, Any]) -> None:
    _, block = forked
    plain = fmr.Site(block.k.id, layout=block.k.layout)
    assert (plain, hash(plain), repr(plain)) == (block.k, hash(block.k), repr(block.k))


def test_parts_that_are_no_keys_name_their_sites(forked: tuple[Forked, Any], tmp_path: Path) -> None:
    model, block = forked
    run = fmr.run(model, X, MASK)
    layer = fmr.locate(run).layers[0]
    sites = r"Attention has several values and is no key: expected one of its sites, .*\.pattern, .*or \.scope for the path"
    for wrong in (block, (block,), [block]):
        with pytest.raises(TrackError, match=sites):
            fmr.run(model, X, keep=wrong)
    with pytest.raises(IdError, match=sites):
        run[block]
    with pytest.raises(IdError, match=sites):
        run.graph.save_dot(tmp_path / "a.dot", around=block)
    with pytest.raises(IdError, match=r"Layer has several values and is no key: .*\.resid_pre, \.resid_post\.$"):
        run[layer]
    with pytest.raises(IdError, match=r"Head has several values and is no key: expected one of its sites, \.q, \.k"):
        run[block.head(0)]
    with pytest.raises(IdError, match=r"^Linear is a module, not a key: expected its path"):
        run.graph.save_dot(tmp_path / "a.dot", around=model.q)
    with pytest.raises(DrawError, match=r"^structure=Forked names no roles"):
        run.graph.save_dot(tmp_path / "a.dot", structure=model)


@pytest.mark.parametrize("keep", ["all", ()], ids=["recorded", "by plan"])
def test_an_edit_of_another_branch_is_refused(keep: Any, forked: tuple[Forked, Any]) -> None:
    model, block = forked
    assert fmr.run(model, X, MASK, keep=keep, edits={block.k: fmr.edits.Zero()}).receipts[block.k].fired == 1
    with pytest.raises(IdError, match=REFUSED):
        fmr.run(model, X, keep=keep, edits={block.k: fmr.edits.Zero()})
