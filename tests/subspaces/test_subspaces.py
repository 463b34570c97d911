"""Subspaces: at their limits they are the whole value and nothing of it, and their parts are apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits, subspaces
from fmr.errors import EditError
from fmr.subspaces.space import Space

WIDTH = 6


class Net(nn.Module):
    """Three projections with a tanh between; the middle one, of WIDTH units, is edited."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self.first(x).tanh()).tanh())
        return out


NET = Net().double()
BASE, SOURCE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double(), torch.ones(5, 4).double()
SITE = fmr.Site("middle/linear#0")


def given(edit: Any, model: nn.Module = NET, base: Tensor = BASE, site: fmr.Site = SITE) -> Tensor:
    out: Tensor = fmr.run(model, base, edits={site: edit}).output
    return out


def swapped(space: Any) -> Tensor:
    return given(edits.Interchange(SOURCE, within=space))


def double(space: Space) -> Space:
    return space.double()


WHOLE: dict[str, Callable[[], Any]] = {
    "units": lambda: subspaces.Units(WIDTH, range(WIDTH)),
    "basis": lambda: subspaces.Basis(torch.randn(WIDTH, WIDTH).double()),
    "pca": lambda: subspaces.pca(torch.randn(40, WIDTH).double(), WIDTH),
    "rotation": lambda: double(subspaces.Rotation(WIDTH)),
    "part": lambda: double(subspaces.Rotation(WIDTH))[:],
    "mask": lambda: _at(subspaces.Mask(WIDTH, temperature=0), 1.0),
    "boundless": lambda: _at(subspaces.Boundless(WIDTH, temperature=0), 20.0),
    "latents": lambda: subspaces.Latents(lambda v: v * 2, lambda c: c / 2, WIDTH, WIDTH),
}
NOTHING: dict[str, Callable[[], Any]] = {
    "units": lambda: subspaces.Units(WIDTH, []),
    "rotation": lambda: double(subspaces.Rotation(WIDTH, 0)),
    "part": lambda: double(subspaces.Rotation(WIDTH))[[]],
    "mask": lambda: _at(subspaces.Mask(WIDTH, temperature=0), -1.0),
    "boundless": lambda: _at(subspaces.Boundless(WIDTH, temperature=0), -20.0),
}


def _at(space: Any, start: float) -> Any:
    with torch.no_grad():
        (space.logits if isinstance(space, subspaces.Mask) else space.boundary).fill_(start)
    return space.double()


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_subspace_is_a_plain_interchange(name: str) -> None:
    torch.testing.assert_close(swapped(WHOLE[name]()), swapped(None), rtol=0, atol=1e-12)
    assert not given(edits.Zero()).equal(swapped(None))


@pytest.mark.parametrize("name", NOTHING)
def test_an_empty_subspace_changes_no_bit(name: str) -> None:
    assert swapped(NOTHING[name]()).equal(NET(BASE))


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_read_and_written_back_changes_no_bit(name: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        values = torch.randn(3, 2, WIDTH).to(dtype)
        space = WHOLE[name]()
        assert space.write(values, space.read(values)).equal(values)
        assert space.write(values, space.read(values)).dtype == dtype


def test_disjoint_parts_take_different_sources_in_any_order() -> None:
    rotation, other = double(subspaces.Rotation(WIDTH)), torch.zeros(5, 4).double()
    halves = [edits.Interchange(SOURCE, within=rotation[:2]), edits.Interchange(other, within=rotation[2:])]
    one, two = given(halves), given(halves[::-1])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    same = [edits.Interchange(SOURCE, within=rotation[:2]), edits.Interchange(SOURCE, within=rotation[2:])]
    torch.testing.assert_close(given(same), swapped(None), rtol=0, atol=1e-12)
    assert (one - swapped(None)).abs().max() > 1e-3


@pytest.mark.parametrize("make", [subspaces.Rotation, subspaces.Mask, lambda n: subspaces.Units(n, range(n))])
def test_a_row_for_each_example_means_that_example_alone(make: Callable[[int], Space]) -> None:
    space = _at(make(WIDTH), 3.0) if make is subspaces.Mask else make(WIDTH).double()
    rows = [[0, 1, 2], [3, 4, 5], [1, 3, 5], [0, 2, 4], [5, 0, 1]]
    together = swapped(space[rows])
    for example, row in enumerate(rows):
        source = SOURCE[[example]]
        alone = given(edits.Interchange(source, within=space[row]), base=BASE[[example]])
        torch.testing.assert_close(together[[example]], alone, rtol=0, atol=1e-12)
    assert not together.equal(swapped(space[:3]))


def test_a_row_is_that_of_its_example_where_positions_differ_under_padding() -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return x * 2 * attention_mask[..., None]

    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    rows = subspaces.Units(WIDTH, range(WIDTH))[[[0], [5]]]
    site = fmr.Site("/mul#0", positions=slice(0, 9))
    out = fmr.run(Padded(), torch.ones(2, 3, WIDTH), attention_mask=mask, edits={site: edits.Zero(within=rows)}).output
    assert (out == 0).nonzero()[:, [0, 2]].tolist() == [[0, n] for n in range(WIDTH)] + [[0, 0]] * 2 + [[1, 5]] * 3


def test_a_coordinate_of_a_basis_is_its_vector_once() -> None:
    vectors = torch.randn(WIDTH, 2).double() * 3
    space, values = subspaces.Basis(vectors), torch.randn(4, WIDTH).double()
    torch.testing.assert_close(space.read(vectors.T), torch.eye(2).double())
    run = fmr.run(NET, BASE, keep="all", edits={SITE: edits.Add(torch.tensor([2.0, -1.0]).double(), within=space)})
    plain = fmr.run(NET, BASE)[SITE]
    torch.testing.assert_close(run[SITE], plain + 2 * vectors[:, 0] - vectors[:, 1])
    cleared = space.write(values, torch.zeros(4, 2).double())
    torch.testing.assert_close(cleared @ vectors, torch.zeros(4, 2).double(), rtol=0, atol=1e-10)


def test_edits_act_on_coordinates() -> None:
    space = double(subspaces.Rotation(WIDTH, 2))
    plain = fmr.run(NET, BASE)[SITE]

    def read(edit: Any) -> Tensor:
        return space.read(fmr.run(NET, BASE, edits={SITE: edit})[SITE])

    before = space.read(plain)
    for edit, after in (
        (edits.Zero(within=space), 0 * before),
        (edits.Scale(3.0, within=space), 3 * before),
        (edits.Add(2.0, within=space), before + 2),
        (edits.Subtract(2.0, within=space), before - 2),
        (edits.Replace(1.5, within=space), torch.full_like(before, 1.5)),
        (edits.Clamp(lo=0.0, within=space), before.clamp(0)),
        (edits.Mean(within=space), before.mean(0, keepdim=True).expand_as(before)),
        (edits.Mean(plain * 2, within=space), 2 * before.mean(0, keepdim=True).expand_as(before)),
    ):
        torch.testing.assert_close(read(edit), after, rtol=0, atol=1e-12)
        rest = fmr.run(NET, BASE, edits={SITE: edit})[SITE] - plain
        torch.testing.assert_close(rest, (rest @ space.matrix) @ space.matrix.T, rtol=0, atol=1e-12)


def test_units_may_be_any_dimension_of_the_site() -> None:
    conv = nn.Conv1d(2, WIDTH, 3).double()
    x = torch.randn(2, 2, 8).double()
    site = fmr.Site("/conv1d#0", layout=("examples", "units", "places"))
    out = fmr.run(conv, x, edits={site: edits.Zero(within=subspaces.Units(WIDTH, [1]))}).output
    assert not out[:, 1].any()
    assert out[:, 2].equal(conv(x)[:, 2])


def test_directions_in_data() -> None:
    torch.manual_seed(1)
    spread = torch.randn(200, 2).double() * torch.tensor([5.0, 2.0]).double()
    axes = torch.linalg.qr(torch.randn(WIDTH, 2).double()).Q
    values = spread @ axes.T + 7
    space = subspaces.pca(values, 2)
    torch.testing.assert_close(space.vectors @ space.vectors.T, axes @ axes.T)
    torch.testing.assert_close(space.read(values).mean(0), torch.zeros(2).double(), rtol=0, atol=1e-9)
    one, other = torch.randn(9, WIDTH).double() + 1, torch.randn(7, WIDTH).double()
    toward = subspaces.mean_difference(one, other)
    torch.testing.assert_close(toward.read(one).mean(), torch.tensor(1.0).double())
    torch.testing.assert_close(toward.read(other).mean(), torch.tensor(0.0).double(), rtol=0, atol=1e-12)


def test_latents_keep_what_they_do_not_reconstruct() -> None:
    weight = torch.randn(WIDTH, 9).double()
    space = subspaces.Latents(lambda v: (v @ weight).relu(), lambda c: c @ weight.T / 20, WIDTH, 9)
    values = torch.randn(4, WIDTH).double()
    assert space.write(values, space.read(values)).equal(values)
    changed = space[3].write(values, torch.zeros(4, 1).double())
    torch.testing.assert_close(changed, values - (values @ weight).relu()[:, [3]] * weight[:, 3] / 20)


@pytest.mark.parametrize("temperature", [5.0, 0.1])
def test_weights_of_a_boundary(temperature: float) -> None:
    space = subspaces.Boundless(8, temperature=temperature, share=0.5)
    expected = torch.sigmoid((4 - torch.arange(8) - 0.5) / temperature)
    torch.testing.assert_close(space.weights, expected)
    space.temperature = 0
    assert space.weights.tolist() == [1.0] * 4 + [0.0] * 4
    assert space.directions == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: subspaces.Rotation(WIDTH, 2),
        lambda: subspaces.Mask(WIDTH),
        lambda: subspaces.Boundless(WIDTH),
        lambda: subspaces.Rotation(WIDTH)[1:3],
    ],
)
def test_gradients_of_what_is_trained_are_right(make: Callable[[], Any]) -> None:
    space = make().double()
    names = [name for name, _ in space.named_parameters()]
    values, others = torch.randn(3, WIDTH).double(), torch.randn(3, WIDTH).double()

    def written(*parameters: Tensor) -> Tensor:
        def swap(module: Any) -> Tensor:
            out: Tensor = module.write(values, module.read(others))
            return out

        holder = nn.Module()
        holder.space = space
        wrapped = type("Wrapped", (nn.Module,), {"forward": lambda self: swap(self.space)})()
        wrapped.space = space
        named = {f"space.{name}": one for name, one in zip(names, parameters, strict=True)}
        made: Tensor = torch.func.functional_call(wrapped, named, ())
        return made

    start = tuple((one.detach() + 0.1 * torch.randn_like(one)).requires_grad_() for one in space.parameters())
    assert torch.autograd.gradcheck(written, start)


def test_directions_stay_orthonormal_while_they_are_trained() -> None:
    rotation = subspaces.Rotation(12, 5)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.1)
    target = torch.randn(12, 5)
    before = rotation.matrix.detach().clone()
    for _ in range(50):
        optimizer.zero_grad()
        (rotation.matrix - target).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = rotation.matrix.detach()
    assert (after.T @ after - torch.eye(5)).abs().max() < 1e-5
    assert (after - before).abs().max() > 0.1


def test_a_planted_subspace_is_found() -> None:
    """Interchange of the right two of six rotated coordinates is the whole effect; the search finds their span."""
    torch.manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    base, source = torch.randn(256, WIDTH), torch.randn(256, WIDTH)
    wanted = base @ mixing
    wanted[:, :2] = (source @ mixing)[:, :2]
    rotation = subspaces.Rotation(WIDTH, 2)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (rotation.write(base, rotation.read(source)) - wanted @ mixing.T).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    angles = torch.linalg.svdvals(rotation.matrix.T @ mixing[:, :2]).clamp(max=1).acos().rad2deg()
    assert angles.max() < 1
    wrong = torch.linalg.svdvals(subspaces.Rotation(WIDTH, 2).matrix.T @ mixing[:, :2]).clamp(max=1).acos().rad2deg()
    assert wrong.max() > 30


def test_autocast_does_not_round_coordinates() -> None:
    space = subspaces.Rotation(WIDTH)
    net = Net()
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = fmr.run(net, x)
        same = fmr.run(net, x, edits={SITE: edits.Interchange(plain, within=space)})
    assert same[SITE].equal(plain[SITE])


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: subspaces.Units(4, [1, 1]), "Units(4, [1, 1]): expected numbers from 0 to 3, each once."),
        (lambda: subspaces.Units(4, [4]), "Units(4, [4]): expected numbers from 0 to 3, each once."),
        (
            lambda: subspaces.Rotation(4, 5),
            "Rotation(4, 5): a subspace of vectors of 4 numbers has at most as many directions.",
        ),
        (lambda: subspaces.Rotation(2.5), "Rotation got width=2.5, expected a whole number from 0 on."),  # type: ignore[arg-type]
        (lambda: subspaces.Mask(4, temperature=-1), "Mask got temperature=-1, expected a number from 0 on."),
        (lambda: subspaces.Boundless(4, share=1), "Boundless got share=1, expected a number between 0 and 1."),
        (
            lambda: subspaces.Basis(torch.ones(4, 2)),
            "Basis got 2 vectors of 4 numbers that span 1 dimensions. Expected finite vectors that are independent of one "
            "another.",
        ),
        (
            lambda: subspaces.Basis(torch.ones(4), torch.ones(3)),
            "Basis got a center of shape (3,), expected (4,), as its vectors.",
        ),
        (
            lambda: subspaces.pca(torch.randn(3, 6), 3),
            "pca got size=3, and 3 values of 6 numbers vary in 2 directions. Expected at most these, or more values.",
        ),
        (
            lambda: subspaces.mean_difference(torch.ones(2, 3), torch.ones(4, 3)),
            "mean_difference got values with the same mean, between which lies no direction.",
        ),
        (
            lambda: subspaces.Rotation(4)[4],
            "space[4] of a subspace of 4 coordinates: expected numbers below 4.",
        ),
        (lambda: subspaces.Rotation(4)[[1, 1]], "space[[1, 1]] takes a coordinate twice. Expected each once."),
        (
            lambda: subspaces.Rotation(4)[[[1], [1, 2]]],
            "space[[[1], [1, 2]]] is no part of a subspace. Expected whole numbers: one, a slice, a list, or a list of one "
            "row for each example, all of one length.",
        ),
        (
            lambda: subspaces.Rotation(4).read(torch.ones(2, 5)),
            "A Rotation of vectors of 4 numbers was given values of shape (2, 5). Expected 4 in the last dimension.",
        ),
        (
            lambda: subspaces.Rotation(4)[[[0], [1]]].read(torch.ones(3, 4)),
            "A part of a subspace has 2 rows of coordinates and was given values of shape (3, 4). Expected a row for each "
            "of the 3 examples.",
        ),
        (
            lambda: subspaces.Rotation(4).read(torch.ones(2, 4, dtype=torch.long)),
            "A Rotation was given torch.int64. Expected values with fractions.",
        ),
        (
            lambda: given(edits.Zero(within="all")),  # type: ignore[arg-type]
            "Zero at Site('middle/linear#0') got within='all', expected one of fmr.subspaces, or an object with "
            "read(values) and write(values, coordinates).",
        ),
        (
            lambda: given(edits.Replace(torch.ones(3).double(), within=subspaces.Units(WIDTH, [0, 1]))),
            "Replace at Site('middle/linear#0') brings shape (3,), expected one that broadcasts to (5, 2), its coordinates.",
        ),
    ],
)
def test_bad_input_is_told(made: Callable[[], Any], told: str) -> None:
    with pytest.raises(EditError) as caught:
        made()
    assert str(caught.value) == told
