"""What a vision transformer does at each patch: against its weights by hand, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor, nn

from analyzers import AnalyzerError, Patches, PatchMaps
from analyzers.inputs.rollout import rollout
from tests.analyzers.images.models import Looker
from tests.residue import model_state, random_state, torch_state

matplotlib.use("Agg")
GIVEN = torch.rand(2, 1, 8, 12, generator=torch.Generator().manual_seed(0))


def looker() -> Looker:
    torch.manual_seed(0)
    return Looker((8, 12)).eval()


def patches(model: nn.Module | None = None) -> Patches:
    return Patches(looker() if model is None else model, size=(8, 12), channels=1)


@torch.no_grad()
def by_hand(model: Looker, given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The patterns of all layers, and the logits of all positions after each."""
    x = model.embed(given).flatten(2).mT
    x = torch.cat([model.first.expand(len(x), -1, -1), x], 1) + model.places
    maps, logits = [], []
    for layer in model.layers:
        q, k, v = (
            one.unflatten(2, (layer.heads, -1)).transpose(1, 2) for one in layer.joint(layer.before(x)).chunk(3, dim=2)
        )
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        x = x + layer.out((maps[-1] @ v).transpose(1, 2).flatten(2))
        x = x + layer.down(torch.relu(layer.up(layer.behind(x))))
        logits.append(model.head(model.norm(x)))
    return maps, logits


def test_they_are_what_the_weights_make() -> None:
    model = looker()
    found, (maps, logits) = patches(model).run(GIVEN), by_hand(model, GIVEN)
    assert (found.grid, found.first) == ((2, 3), 1)
    for layer, (pattern, said) in enumerate(zip(maps, logits, strict=True)):
        torch.testing.assert_close(found.attention[str(layer)], pattern)
        chances = said[:, 1:].softmax(-1)
        for image, (answer, other) in enumerate(zip(found.answers, found.others, strict=True)):
            assert answer != other
            torch.testing.assert_close(found.probability[layer, image].flatten(), chances[image, :, answer])
            torch.testing.assert_close(found.other[layer, image].flatten(), chances[image, :, other])
        assert torch.equal(found.top[layer].flatten(1), chances.argmax(-1))
    assert found.answers == tuple(logits[-1][:, 0].argmax(-1).tolist())
    torch.testing.assert_close(found.rollout.flatten(1), rollout(maps)[:, 0, 1:])
    torch.testing.assert_close(found.seen_from(1, (1, 2)).flatten(2), maps[1][:, :, 6, 1:])
    torch.testing.assert_close(found.seen_from(-1), found.seen_from(1, 0))


def test_one_image_is_what_it_is_among_others() -> None:
    whole, alone = patches().run(GIVEN, [1, 2]), patches().run(GIVEN[1], 2)
    torch.testing.assert_close(whole.probability[:, 1:], alone.probability)
    torch.testing.assert_close(whole.attention["0"][1:], alone.attention["0"])


def test_a_head_that_looks_everywhere_alike_is_at_its_null() -> None:
    model = looker()
    with torch.no_grad():
        model.layers[0].joint.weight[:16].zero_()  # all queries and keys
        model.layers[0].joint.bias[:16].zero_()
    row = patches(model).run(GIVEN).table().query("layer == '0' and head == 0").iloc[0]
    assert row["distance"] == pytest.approx(row["distance alike"], rel=1e-5)
    assert row["elsewhere"] == pytest.approx(1 / 7, rel=1e-5)
    assert row["bits"] == pytest.approx(torch.tensor(7.0).log2().item(), rel=1e-5)


def test_it_is_drawn_and_kept(tmp_path: Path) -> None:
    found = patches().run(GIVEN)
    assert len(found.plot(query=(0, 1)).axes) == 2 + 1  # heads, and a bar
    assert len(found.plot("classes", example=1).axes) == 2 + 1
    assert len(found.plot("rollout").axes) == 1 + 1
    _, ax = matplotlib.pyplot.subplots()
    assert found.plot(ax=ax) is ax.figure
    found.save(tmp_path / "maps")
    again = PatchMaps.load(tmp_path / "maps")
    assert repr(again) == repr(found)
    assert torch.equal(again.attention["1"], found.attention["1"])


def test_without_a_head_there_are_maps_and_a_reason() -> None:
    model = looker()
    model.head = nn.Identity().eval()
    found = patches(model).run(GIVEN)
    assert found.attention["0"].shape == (2, 2, 7, 7)
    assert "no class is read in patches" in repr(found)
    with pytest.raises(AnalyzerError, match="No class was read in the patches: "):
        found.plot("classes")
    with pytest.raises(AnalyzerError, match="Patches speak for no class: "):
        patches(model).run(GIVEN, 1)


class Unfolded(Looker):
    """Patches that a linear layer makes of pixels which were taken apart before."""

    def patched(self, given: Tensor) -> Tensor:
        pixels = nn.functional.unfold(given, 4, stride=4).mT
        weight = self.embed.weight.flatten(1)
        return nn.functional.linear(pixels, weight, self.embed.bias)


class Blended(Unfolded):
    """Patches of which each hears all others before any attention."""

    def patched(self, given: Tensor) -> Tensor:
        found = super().patched(given)
        return found + found.mean(1, keepdim=True)


class Turned(Looker):
    """Patches that stand column by column."""

    def patched(self, given: Tensor) -> Tensor:
        return self.embed(given).mT.flatten(2).mT


class Behind(Unfolded):
    """A class token behind the patches."""

    def forward(self, given: Tensor) -> Tensor:
        x = self.patched(given)
        x = torch.cat([x, self.first.expand(len(x), -1, -1)], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, -1])


class Beside(Behind):
    """As many registers in front as there are patches, of a picture whose corners no patch reads."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size)
        self.edges = nn.ZeroPad2d(-1)
        self.registers = nn.Parameter(torch.randn(1, 6, self.first.shape[-1]))

    def forward(self, given: Tensor) -> Tensor:
        x = torch.nn.functional.pad(self.edges(given), (1, 1, 1, 1))
        x = self.embed(x).flatten(2).mT
        x = torch.cat([self.registers.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def test_patches_beside_as_many_other_tokens_are_those_of_the_picture() -> None:
    torch.manual_seed(0)
    found = patches(Beside((8, 12)).eval()).run(GIVEN)
    assert (found.grid, found.first) == ((2, 3), 6)


def like_looker(kind: type[Looker]) -> Looker:
    model = kind((8, 12)).eval()
    model.load_state_dict(looker().state_dict())
    return model


def test_where_patches_are_is_measured_where_the_graph_does_not_tell() -> None:
    found, wanted = patches(like_looker(Unfolded)).run(GIVEN), patches().run(GIVEN)
    assert (found.grid, found.first) == ((2, 3), 1)
    torch.testing.assert_close(found.probability, wanted.probability)
    behind = patches(like_looker(Behind)).run(GIVEN)
    assert (behind.grid, behind.first) == ((2, 3), 0)


def test_where_patches_are_is_said_where_nothing_tells() -> None:
    model = like_looker(Blended)
    with pytest.raises(AnalyzerError, match=r"Which of 7 positions are patches, the graph does not tell. Expected grid="):
        patches(model).run(GIVEN)
    found = patches(model).run(GIVEN, grid=(2, 3))
    assert (found.grid, found.first) == ((2, 3), 1)


@pytest.mark.parametrize("kind", [Looker, Unfolded])
@pytest.mark.parametrize("grid", [(3, 2), (1, 6), (2, 2), (1, 7)])
def test_a_grid_that_is_not_that_of_the_patches_is_refused(kind: type[Looker], grid: tuple[int, int]) -> None:
    with pytest.raises(AnalyzerError, match=r"has 2 rows of 3 patches, from position 1 on. Leave grid= out."):
        patches(like_looker(kind)).run(GIVEN, grid=grid)


def test_patches_that_stand_column_by_column_are_refused() -> None:
    with pytest.raises(AnalyzerError, match=r"of Turned do not stand row by row: .* at positions 1, 5, 2, 6"):
        patches(like_looker(Turned)).run(GIVEN)


def test_convolutions_have_no_patches() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 10, 3)).eval()
    with pytest.raises(AnalyzerError, match=r"no self-attention in Sequential, so that there are no patches .* TopImages"):
        patches(model).run(GIVEN)


class Windowed(Looker):
    """Attention within windows of two patches."""

    def forward(self, given: Tensor) -> Tensor:
        x = self.patched(given)
        for layer in self.layers:
            x = layer(x.unflatten(1, (-1, 2)).flatten(0, 1)).view_as(x)
        return self.head(self.norm(x).mean(1))


def test_windows_are_no_whole_pictures() -> None:
    with pytest.raises(AnalyzerError, match=r"of Windowed are within windows of 2 positions, expected some over a whole"):
        patches(Windowed((8, 12)).eval()).run(GIVEN, grid=(1, 2))


def test_nothing_is_left_behind() -> None:
    model = looker()
    before = model_state(model), random_state(), torch_state()
    patches(model).run(GIVEN)
    assert (model_state(model), random_state(), torch_state()) == before


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: patches().run(GIVEN * 255), "images holds float32 from .*, expected numbers from 0 to 1"),
        (lambda: patches().run(GIVEN[..., :8]), r"images has shape \(2, 1, 8, 8\), expected \(1, 8, 12\)"),
        (lambda: patches().run(GIVEN, 4), "answers=4: expected the number of a class from 0 to 3, or one for each of 2"),
        (lambda: patches().run(GIVEN, [1]), r"answers=\[1\]: expected the number of a class"),
        (lambda: patches().run(GIVEN, "cat"), "answers='cat': expected the number of a class"),
        (
            lambda: patches().run(GIVEN, grid=(3, 3)),
            r"grid=\(3, 3\): expected rows and columns of patches, at most 7 in all",
        ),
        (lambda: patches().run(GIVEN, grid=6), "grid=6: expected rows and columns of patches"),
        (lambda: patches().run(GIVEN).seen_from(2), "layer=2: expected 0 to 1"),
        (lambda: patches().run(GIVEN).seen_from(0, (2, 0)), r"query=\(2, 0\): expected a row and a column of 2 x 3 patches"),
        (lambda: patches().run(GIVEN).plot(example=2), "example=2: expected 0 to 1"),
        (lambda: patches().run(GIVEN).plot("heads"), "kind='heads': expected one of 'attention', 'rollout', 'classes'"),
        (lambda: patches(looker().train()).run(GIVEN), "Looker is in train mode"),
        (lambda: patches(nn.Conv2d(1, 3, 3).eval()).run(GIVEN), "fmr.locate found no self-attention in Conv2d"),
    ],
)
def test_a_mistake_is_told_what_was_expected(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        mistake()
