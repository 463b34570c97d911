"""Where sites say what their dimensions count: an edit changes the elements that are meant, or is refused in words."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from fmr.structure.parts import Structure


class Pair(nn.Module):
    """A residual memory of two projections, with what lays its input out before and back after."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Flattened(Pair):
    """The tokens of all examples in one row."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x.view(-1, x.shape[-1])).relu()).view(x.shape)


class Windows(nn.Module):
    """Attention within windows of four tokens, each head and each window for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(x.shape[0], -1, 4, 8).reshape(-1, 4, 8)
        q, k, v = (one(parts).view(-1, 4, 2, 4).transpose(1, 2) for one in (self.q, self.k, self.v))
        z = (q @ k.mT * 0.5).softmax(-1) @ v
        return x + self.out(z.transpose(1, 2).reshape(-1, 4, 8)).view(x.shape)


class Encoder(nn.Module):
    """Two layers of torch's own."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def located(model: nn.Module, x: Tensor) -> tuple[fmr.Run, Structure]:
    run = fmr.run(model.eval(), x, keep="all")
    return run, fmr.locate(run)


def changed(model: nn.Module, x: Tensor, run: fmr.Run, site: fmr.Site) -> Tensor:
    """Which elements of a value an edit at a site changes."""
    edited = fmr.run(model, x, keep=[site.id], edits={site: edits.Add(torch.ones(()))})
    return edited[site.id] != run[site.id]


def only(shape: tuple[int, ...], *index: Any) -> Tensor:
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[index] = True
    return expected


def test_units_of_channels_first() -> None:
    x = torch.rand(2, 4, 5)
    model = Pair(nn.Conv1d(4, 6, 1), nn.Conv1d(6, 4, 1))
    run, found = located(model, x)
    block = found.mlps[0]
    assert torch.equal(changed(model, x, run, block.post.at(units=2)), only((2, 6, 5), slice(None), 2))
    assert torch.equal(changed(model, x, run, block.out.at(units=3, positions=1)), only((2, 4, 5), slice(None), 3, 1))
    post = found.layers[0].resid_post
    assert torch.equal(changed(model, x, run, post.at(units=3, examples=1)), only((2, 4, 5), 1, 3))


def test_units_of_images() -> None:
    x = torch.rand(2, 4, 5, 3)
    model = Pair(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1))
    run, found = located(model, x)
    block = found.mlps[0]
    assert torch.equal(changed(model, x, run, block.post.at(units=1)), only((2, 6, 5, 3), slice(None), 1))
    assert torch.equal(changed(model, x, run, block.pre.at(units=1, examples=0)), only((2, 6, 5, 3), 0, 1))
    with pytest.raises(fmr.FmrError, match=r"selects positions, but .* with axes"):
        run[block.post.at(positions=0)]


def test_sequence_first() -> None:
    x = torch.rand(5, 3, 8)
    model = Encoder(batch_first=False)
    run, found = located(model, x)
    block = found.layers[0].attention
    assert block is not None
    assert block.out is not None
    for site in (found.layers[0].resid_post, found.layers[1].resid_pre, found.mlps[0].post, found.mlps[0].out, block.out):
        shape = tuple(run[site.id].shape)
        assert torch.equal(changed(model, x, run, site.at(positions=0)), only(shape, 0)), site
        assert torch.equal(changed(model, x, run, site.at(examples=1)), only(shape, slice(None), 1)), site


def test_what_is_read_as_its_number_tells_says_nothing() -> None:
    _, found = located(Encoder(batch_first=True), torch.rand(3, 5, 8))
    sites = [found.layers[0].resid_post, found.mlps[0].pre, found.mlps[0].post, found.attention[0].out]
    assert [site.layout for site in sites if site is not None] == [None] * 4
    _, found = located(Pair(nn.Linear(4, 6), nn.Linear(6, 4)), torch.rand(3, 4))
    assert found.mlps[0].post.layout is None


@pytest.mark.parametrize("examples", [1, 2])
def test_flattened_tokens_are_refused(examples: int) -> None:
    x = torch.rand(examples, 5, 4)
    run, found = located(Flattened(nn.Linear(4, 6), nn.Linear(6, 4)), x)
    post = found.mlps[0].post
    assert post.layout == ("rows", "units")
    with pytest.raises(fmr.FmrError, match=r"selects examples, but .* with axes \('rows', 'units'\)"):
        run[post.at(examples=0)]
    assert torch.equal(run[post.at(units=1)], run[post.id][:, 1])
    assert found.layers[0].resid_post.layout == ("axis 0", "axis 1", "units")


class Table(nn.Module):
    """Attention over the columns of each row, and over the rows of each column: a table, or a batch that looks at itself."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(4)) for _ in range(2))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        for over, parts in enumerate(self.parts):
            read = x if self.product or not over else x.transpose(0, 1)
            q, k, v = (one(read).unflatten(-1, (2, 4)) for one in list(parts)[:3])
            if self.product and over:
                z = torch.einsum("phab,bphd->aphd", torch.einsum("aphd,bphd->phab", q, k).softmax(-1), v)
            else:
                z = ((q.transpose(1, 2) @ k.transpose(1, 2).mT).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
            z = parts[3](z.flatten(2))
            x = x + (z if read is x else z.transpose(0, 1))
        return x


@pytest.mark.parametrize("product", [False, True])
def test_what_another_attention_is_over_counts_no_examples(product: bool) -> None:
    run, found = located(Table(product), torch.rand(3, 5, 8))
    assert [tuple(one.maps(run).shape) for one in found.attention] == [(3, 2, 5, 5), (5, 2, 3, 3)]
    for one in found.attention:
        sites = (one.q, one.k, one.v, one.scores, one.pattern, one.z)
        assert [sorted(site.layout or ()) for site in sites] == [["heads", "positions", "rows", "units"]] * 6
        assert one.check(run)
    assert found.layers[0].resid_post.layout == ("axis 0", "axis 1", "units")


class Beside(nn.Module):
    """Attention over the first dimension, something else along the second, and a memory."""

    def __init__(self, along: nn.Module) -> None:
        super().__init__()
        self.parts, self.along = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), along
        self.pair = Pair(nn.Linear(8, 6), nn.Linear(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x.transpose(0, 1)).unflatten(-1, (2, 4)).transpose(1, 2) for one in list(self.parts)[:3])
        z = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.parts[3](z).transpose(0, 1)
        made = self.along(x)
        return self.pair(x + (made[0] if isinstance(made, tuple) else made))  # type: ignore[no-any-return]


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.value(x).cumsum(1) * self.gate(x).sigmoid())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [lambda: nn.GRU(8, 8, batch_first=True), Summed, lambda: Transposed(nn.Linear(5, 5))])
def test_what_is_gone_along_beside_an_attention_counts_no_examples(kind: Any) -> None:
    _, found = located(Beside(kind()), torch.rand(3, 5, 8))
    assert [one.pattern.layout for one in found.attention] == [("rows", "heads", "positions", "units")]
    assert [one.axis for one in found.mixers] == [1]
    for site in (found.mlps[0].post, found.layers[-1].resid_post):
        assert site.layout == ("axis 0", "axis 1", "units")


def test_windows_are_no_examples() -> None:
    run, found = located(Windows(), torch.rand(2, 8, 8))
    block = found.attention[0]
    assert block.pattern.layout == ("rows", "heads", "positions", "units")
    with pytest.raises(fmr.FmrError, match="selects examples"):
        run[block.pattern.at(examples=1)]
    assert block.maps(run).shape == (4, 2, 4, 4)
    assert found.layers[0].resid_post.layout == ("axis 0", "axis 1", "units")


class Shared(nn.Module):
    """One key for all heads, which is repeated for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = (one(x).unflatten(-1, (-1, 4)).transpose(1, 2) for one in (self.q, self.kv))
        kv = kv[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)
        return x + self.out(((q @ kv.mT).softmax(-1) @ kv).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("examples", [1, 3])
def test_a_key_that_is_repeated_for_heads_leaves_examples_what_they_are(examples: int) -> None:
    _, found = located(Shared(), torch.rand(examples, 5, 8))
    assert (found.attention[0].n_heads, found.attention[0].n_kv_heads) == (2, 1)
    assert found.attention[0].k.layout == ("examples", "heads", "positions", "units")
    assert found.layers[0].resid_post.layout is None


class Mixing(nn.Module):
    """A memory behind something that goes along the positions, and is no attention."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        self.mix, self.pair = mix, Pair(nn.Linear(4, 6), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x)
        return self.pair(x + (mixed[0] if isinstance(mixed, tuple) else mixed))  # type: ignore[no-any-return]


class Transposed(nn.Module):
    """A layer over the second dimension."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("mix", "first"),
    [
        (nn.GRU(4, 4), True),
        (nn.GRU(4, 4, batch_first=True), False),
        (nn.LSTM(4, 2, 2, bidirectional=True), True),
        (lambda x: x.cumsum(0), True),
        (lambda x: x.cumsum(1), False),
        (lambda x: x - x.mean(0, keepdim=True), True),
        (lambda x: torch.stack([x, x.flip(1)]).sum(0), False),
        (Transposed(nn.Conv1d(4, 4, 3, padding=1)), False),
        (Transposed(nn.AvgPool1d(3, 1, 1)), False),
        (Transposed(nn.Linear(5, 5)), False),
    ],
)
def test_positions_are_what_ops_go_along(mix: Any, first: bool) -> None:
    x = torch.rand(5, 3, 4) if first else torch.rand(3, 5, 4)
    model = Mixing(mix)
    run, found = located(model, x)
    for site in (found.layers[-1].resid_post, found.mlps[0].post, found.mlps[0].out):
        assert site.layout == (("positions", "examples", "units") if first else None)
        shape = tuple(run[site.id].shape)
        expected = only(shape, 1) if first else only(shape, slice(None), 1)
        assert torch.equal(changed(model, x, run, site.at(positions=1)), expected)


def test_positions_that_nothing_tells_from_examples_are_refused() -> None:
    run, found = located(Pair(nn.Linear(4, 6), nn.Linear(6, 4)), torch.rand(3, 5, 4))
    for site in (found.layers[0].resid_post, found.mlps[0].post):
        for axis in ("positions", "examples"):
            with pytest.raises(fmr.FmrError, match=rf"selects {axis}, but .* axes \('axis 0', 'axis 1', 'units'\)\. Pass"):
                run[site.at(**{axis: 0})]
        assert torch.equal(run[site.at(units=1)], run[site.id][..., 1])
