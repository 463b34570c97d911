"""Heat maps show the numbers of the run, one panel per head, with the tokens where there is room for them."""

import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor, nn

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import fmr
from fmr.errors import DrawError, IdError, StructureError
from fmr.pictures.heatmap import Labels, readable
from fmr.structure.attention.maps import maps_of
from fmr.structure.parts import Attention
from tests.models import build

WORDS = ["the", "cat", "sat", "on", "a", "mat"]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def in_order(value: torch.Tensor, layout: tuple[str, ...]) -> torch.Tensor:
    """The maps of three heads."""
    return maps_of(value, fmr.Site("/softmax#0", layout=layout), 3, 3)


def tracked(name: str) -> tuple[fmr.Run, tuple[Attention, ...]]:
    model, args, kwargs = build(name)
    run = fmr.run(model, *args, **kwargs)
    return run, fmr.locate(run).attention


def panels(figure: Figure) -> list[Any]:
    return [ax for ax in figure.axes if ax.images]


def shown(figure: Figure) -> Tensor:
    """The numbers that a figure shows, (panels, queries, keys)."""
    return torch.stack([torch.from_numpy(ax.images[0].get_array().filled(float("nan"))) for ax in panels(figure)])


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


# ---- what is shown


@pytest.mark.parametrize("name", ["gpt2", "gpt2_eager", "attention", "vit"])
def test_the_panels_hold_the_patterns_of_one_example(name: str) -> None:
    run, blocks = tracked(name)
    for example in range(2):
        figure = blocks[0].plot(run, example=example)
        assert torch.equal(shown(figure), run[blocks[0].pattern][example].detach())
        assert [ax.get_title() for ax in panels(figure)] == [f"head {n}" for n in range(blocks[0].n_heads)]


def test_heads_that_lie_in_the_batch_come_apart() -> None:
    run, (block,) = tracked("cross_attention")
    truth = run.output[1]
    assert run[block.pattern].shape == (4, 5, 5)
    assert truth.shape == (2, 2, 5, 5)
    assert torch.equal(shown(block.plot(run, example=1)), truth[1].detach())


def test_heads_are_found_in_any_dimension() -> None:
    maps = torch.rand(2, 3, 4, 5)
    names = {"e": "examples", "h": "heads", "q": "positions", "k": "units", "w": "axis 1"}
    for order in ("ehqk", "eqhk", "eqkh", "ehkq", "heqk"):
        value = maps.permute(*("ehqk".index(letter) for letter in order))
        assert torch.equal(in_order(value, tuple(names[letter] for letter in order)), maps)
    assert torch.equal(in_order(maps.flatten(0, 1), ("examples*heads", "positions", "units")), maps)
    assert torch.equal(in_order(maps.transpose(0, 1).flatten(0, 1), ("heads*examples", "positions", "units")), maps)
    assert torch.equal(in_order(maps.flatten(1, 2), ("examples", "heads*positions", "units")), maps)
    assert torch.equal(in_order(maps.transpose(1, 2).flatten(1, 2), ("examples", "positions*heads", "units")), maps)
    windows = torch.rand(2, 4, 3, 5, 5)
    assert torch.equal(in_order(windows, tuple(names[letter] for letter in "ewhqk")), windows.flatten(0, 1))
    assert torch.equal(in_order(windows.transpose(1, 2), tuple(names[letter] for letter in "ehwqk")), windows.flatten(0, 1))


def test_key_heads_and_their_groups_are_heads_and_a_single_query_has_no_dimension() -> None:
    value = torch.rand(2, 3, 2, 7)
    maps = maps_of(value, fmr.Site("/softmax#0", layout=("examples", "key heads", "groups", "units")), 6, 3)
    assert torch.equal(maps, value.reshape(2, 6, 1, 7))


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((2, 2, 2, 8), ("examples", "heads", "positions", "units"), "2 heads, expected 3 heads as where it was found"),
        ((2, 3, 3, 8), ("examples", "key heads", "groups", "units"), "3 key heads times 3 groups, expected 3 heads"),
        ((4, 5, 5), ("examples*heads", "positions", "units"), "counts examples and heads, expected a multiple of 3 heads"),
        ((2, 3, 5, 5), ("examples", "axis 1", "positions", "units"), "belong to which of its 3 heads cannot be told"),
        ((2, 5, 5), ("examples", "heads", "positions", "units"), "expected 4 dimensions"),
    ],
)
def test_a_pattern_laid_out_otherwise_is_refused(shape: tuple[int, ...], layout: tuple[str, ...], words: str) -> None:
    with pytest.raises(StructureError, match=words):
        maps_of(torch.rand(shape), fmr.Site("/softmax#0", layout=layout), 3, 3)


def test_all_panels_share_one_scale_and_one_bar() -> None:
    run, blocks = tracked("gpt2")
    figure = blocks[1].plot(run)
    assert {ax.images[0].get_clim() for ax in panels(figure)} == {(0.0, 1.0)}
    assert [ax.get_ylabel() for ax in figure.axes if not ax.images] == ["attention"]
    assert figure.get_suptitle() == "attention[1]  transformer.h.1.attn\nself-attention, 2 heads of 8, example 0"


def test_half_precision_and_history_do_not_matter() -> None:
    model, args, kwargs = build("gpt2_eager")
    with fmr.track(model.bfloat16(), grad=True) as run:
        model(*args, **kwargs)
    block = fmr.locate(run.graph).attention[0]
    assert torch.equal(shown(block.plot(run)), run[block.pattern][0].detach().float())


def test_a_row_without_a_key_is_neither_dark_nor_bright() -> None:
    run, blocks = tracked("gpt2_eager")
    run[blocks[0].pattern][0, 0, 2] = float("nan")
    (first, _) = panels(blocks[0].plot(run))
    colours = first.images[0].to_rgba(first.images[0].get_array())
    assert tuple(colours[2, 0]) == tuple(first.images[0].get_cmap().get_bad())
    assert tuple(colours[2, 0]) not in {tuple(colour) for colour in colours[1]}


class Late(nn.Module):
    """Heads lie in the batch of both products and behind the queries in the softmax, as in the Longformer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2).flatten(0, 1) for part in self.qkv(x).chunk(3, -1))
        p = torch.bmm(q, k.mT).view(b, 4, n, n).transpose(1, 2).softmax(-1)
        z = torch.bmm(p.transpose(1, 2).reshape(b * 4, n, n), v)
        return x + self.o(z.view(b, 4, n, 4).transpose(1, 2).reshape(b, n, 16))


@pytest.mark.parametrize("examples", [1, 2, 4])
def test_heads_are_told_though_they_are_folded_into_the_batch_later(examples: int) -> None:
    run = fmr.run(Late(), torch.randn(examples, 6, 16))
    (block,) = fmr.locate(run).attention
    assert block.pattern.layout == ("examples", "positions", "heads", "units")
    assert torch.equal(shown(block.plot(run, example=examples - 1)), run[block.pattern][-1].transpose(0, 1).detach())


# ---- tokens


def test_tokens_stand_at_the_outer_panels_and_at_each_chosen_one() -> None:
    run, blocks = tracked("gpt2")
    left, right = panels(blocks[0].plot(run, WORDS))
    assert (ticks(left.yaxis), ticks(left.xaxis)) == (WORDS, WORDS)
    assert (ticks(right.yaxis), ticks(right.xaxis)) == ([], WORDS)
    for ax in panels(blocks[0].plot(run, WORDS, heads=[1, 0])):
        assert (ticks(ax.yaxis), ticks(ax.xaxis)) == (WORDS, WORDS)
    assert [ax.get_title() for ax in panels(blocks[0].plot(run, heads=[1, 0]))] == ["head 1", "head 0"]
    assert len(panels(blocks[0].plot(run, heads=1))) == 1


def test_queries_and_keys_may_have_tokens_of_their_own() -> None:
    run, blocks = tracked("t5")
    cross = next(block for block in blocks if block.kind == "cross")
    queries, keys = ["un", "chat", "est", "."], WORDS
    (ax, _) = panels(cross.plot(run, (queries, keys)))
    assert (ticks(ax.yaxis), ticks(ax.xaxis)) == (queries, keys)
    assert ax.images[0].get_array().shape == (4, 6)


def test_a_long_text_names_every_nth_token_in_small_panels_and_each_in_large_ones() -> None:
    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.unflatten(-1, (16, 4)).transpose(1, 2)
            return (x @ x.mT).softmax(-1) @ x

    run = fmr.run(Attend(), torch.randn(1, 96, 64))
    (block,) = fmr.locate(run).attention
    words = [f"w{n}" for n in range(96)]
    small, large = block.plot(run, words), block.plot(run, words, heads=[3])
    assert 10 < len(ticks(panels(small)[0].yaxis)) < 48
    assert ticks(panels(large)[0].yaxis) == words
    assert max(small.get_size_inches()) < 18
    small.canvas.draw()


def test_no_label_covers_another() -> None:
    run, blocks = tracked("gpt2")
    figure = blocks[0].plot(run, [f"longer-token-{n}" for n in range(6)])
    figure.canvas.draw()
    assert len(ticks(panels(figure)[0].yaxis)) == 6
    for ax in panels(figure):
        boxes = [label.get_window_extent() for label in ax.yaxis.get_ticklabels()]
        assert all(a.y0 >= b.y1 - 1 for a, b in pairwise(boxes))


@pytest.mark.parametrize(
    ("token", "label"),
    [
        ("cat", "cat"),
        ("\n", r"\n"),
        ("$x$", r"\$x\$"),
        ("x" * 30, "x" * 15 + "…"),
        (7, "7"),
        ("Ġcat", "Ġcat"),
        ("", ""),
        ("中", "<4E2D>"),
    ],
)
def test_a_token_becomes_one_short_line(token: object, label: str) -> None:
    assert readable(token) == label


def test_tokens_with_mathematics_and_new_lines_can_be_drawn() -> None:
    run, blocks = tracked("gpt2")
    blocks[0].plot(run, ["$", "$$", "\n", "a_b^", "\\frac{", "{}"]).canvas.draw()


# ---- runs


def test_a_run_that_kept_only_the_patterns_is_enough() -> None:
    model, args, kwargs = build("gpt2")
    run = fmr.run(model, *args, **kwargs)
    blocks = fmr.locate(run).attention
    later = fmr.run(model, *args, keep=[block.pattern for block in blocks], stop=True, **kwargs)
    assert torch.equal(shown(blocks[1].plot(later, WORDS)), shown(blocks[1].plot(run, WORDS)))
    assert torch.equal(shown(blocks[1].plot(run.passes[0])), shown(blocks[1].plot(run)))


# ---- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": WORDS[:5]}, DrawError, "Got 5 tokens, but the pattern has 6 queries and 6 keys. Expected one each."),
        ({"tokens": (WORDS, WORDS[:2])}, DrawError, "Got 6 for the queries and 2 for the keys, but the pattern has 6"),
        ({"tokens": "the cat"}, DrawError, "tokens='the cat' is one text. Expected one token per position, 6 here"),
        ({"heads": [0, 2]}, StructureError, r"heads=\[0, 2\]: expected some of 0 to 1"),
        ({"heads": []}, StructureError, r"heads=\[\]: expected some of 0 to 1"),
        ({"example": 2}, StructureError, "example=2: this run has 2. Expected 0 to 1."),
    ],
)
def test_a_wrong_question_gets_an_answer_that_teaches(options: dict[str, Any], error: type, message: str) -> None:
    run, blocks = tracked("gpt2")
    with pytest.raises(error, match=message):
        blocks[0].plot(run, **options)


def test_one_list_for_a_pattern_that_is_not_square_says_how_to_give_two() -> None:
    with pytest.raises(DrawError, match=r"pass tokens=\(queries, keys\)"):
        Labels.of(WORDS, 1, 6)


def test_a_run_without_the_values_says_what_to_keep() -> None:
    model, args, kwargs = build("gpt2")
    blocks = fmr.locate(fmr.run(model, *args, **kwargs)).attention
    for keep in ("none", [blocks[0].pattern]):
        with pytest.raises(IdError, match=r"did not keep '.*h.1.attn.*keep=\[block.pattern\]"):
            blocks[1].plot(fmr.run(model, *args, keep=keep, **kwargs))


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    run, blocks = tracked("gpt2")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(DrawError, match=r"pip install 'fmr\[analysis\]'"):
        blocks[0].plot(run)


def test_a_notebook_shows_a_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, blocks = tracked("gpt2")
    blocks[0].plot(run)
    assert len(plt.get_fignums()) == 1
    plt.close("all")
    monkeypatch.setattr(plt, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    assert isinstance(blocks[0].plot(run), Figure)
    assert plt.get_fignums() == []
