"""The stream taken apart: what was added sums to its end, in any model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, Decomposition, LensTranslator, ResidualDecomposition
from tests.analyzers.lenses.test_attribution import FAMILIES, made
from tests.models import build


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_added_sums_to_the_end(name: str) -> None:
    model, ids = made(name)
    found = ResidualDecomposition(model).run(ids)
    assert found.error < 1e-5
    assert torch.allclose(found.share.sum(0), torch.ones(3, 7), atol=1e-4)
    assert found.names[0] == "embedding"
    parallel = name in ("GPTNeoX", "Phi")
    if name != "Mamba":
        kinds = ["attention", "mlp"]
        names = [f"{kind} {layer}" for layer in (0, 1) for kind in kinds]
        assert sorted(found.names[1:]) == sorted(names) or parallel


@pytest.mark.parametrize("name", ["bert", "vit", "t5", "whisper"])
def test_other_streams_are_taken_apart_too(name: str) -> None:
    """Where norms stand on the stream, what they change is a part."""
    model, args, kwargs = build(name)
    found = ResidualDecomposition(model).run({"pixel_values": args[0]} if name == "vit" else kwargs)
    assert found.error < 1e-5
    assert any(part.startswith("norm") for part in found.names) is (name == "bert")


def test_sizes_and_directions_are_those_of_the_values() -> None:
    model, ids = made("Llama")
    found = ResidualDecomposition(model).run(ids)
    run = fmr.run(model, ids)
    layers = fmr.locate(run).layers
    before, after = (run[site].detach().double() for site in (layers[1].resid_mid, layers[1].resid_post))
    place = found.names.index("mlp 1")
    change = after - before
    assert torch.allclose(found.norm[place].double(), change.norm(dim=-1), atol=1e-4)
    assert torch.allclose(found.movement[place].double(), change.norm(dim=-1) / before.norm(dim=-1), atol=1e-4)
    assert torch.allclose(found.cosine_before[place].double(), torch.cosine_similarity(change, before, dim=-1), atol=1e-4)
    assert torch.allclose(found.cosine_end[place].double(), torch.cosine_similarity(change, after, dim=-1), atol=1e-4)
    assert torch.allclose(found.state_norm[place].double(), after.norm(dim=-1), atol=1e-4)


class PositionsFirst(nn.Module):
    """A stream whose positions lie before its examples, or after them: the same numbers."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.table, self.norms = first, nn.Embedding(20, 16), nn.ModuleList(nn.LayerNorm(16) for _ in range(5))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=not first) for _ in range(2))
        self.ups, self.downs = (nn.ModuleList(nn.Linear(*size) for _ in range(2)) for size in ((16, 24), (24, 16)))
        self.head = nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids.T if self.first else ids)
        for n, (attention, up, down) in enumerate(zip(self.attentions, self.ups, self.downs, strict=True)):
            y = self.norms[2 * n](x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + down(torch.relu(up(self.norms[2 * n + 1](x))))
        logits: Tensor = self.head(self.norms[4](x))
        return logits.transpose(0, 1) if self.first else logits


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 5)])
def test_positions_may_lie_before_examples_as_many_as_there_are(shape: tuple[int, int]) -> None:
    ids = torch.randint(20, shape, generator=torch.manual_seed(0))
    found, same = (ResidualDecomposition(PositionsFirst(first).eval()).run(ids) for first in (True, False))
    assert found.names == same.names
    assert torch.allclose(found.share, same.share, atol=1e-5)
    maps = [LensTranslator(PositionsFirst(first).eval(), skip=1).update(ids) for first in (True, False)]
    (first, second), (name, *_) = maps, maps[0].sums
    assert torch.allclose(first.sums[name].xy, second.sums[name].xy, atol=1e-4)


def test_padding_changes_nothing_and_is_left_out(loaded: tuple[nn.Module, Any]) -> None:
    texts = ["Junel Dunoth grew up in", "The mother tongue of Velin dal Millwick is"]
    analyzer = ResidualDecomposition(*loaded)
    together, alone = analyzer.run(texts), analyzer.run(texts[0])
    length = alone.mask.shape[1]
    assert bool(together.norm[:, 0, :-length].isnan().all())
    assert torch.allclose(together.norm[:, 0, -length:], alone.norm[:, 0], atol=1e-3)


def test_the_end_at_another_token_has_less_in_common(loaded: tuple[nn.Module, Any]) -> None:
    from fmr.zoo import world

    found = ResidualDecomposition(*loaded).run([fact.prompt for fact in world.facts()[:12]])
    assert np.abs(found.medians("cosine_end")[1:]).mean() > 1.5 * np.abs(found.medians("other_cosine")[1:]).mean()
    again = ResidualDecomposition(*loaded).run([fact.prompt for fact in world.facts()[:12]])
    assert torch.equal(again.other_cosine.nan_to_num(), found.other_cosine.nan_to_num())


def test_half_precision_sums_as_far_as_it_is_precise() -> None:
    model, ids = made("Llama", torch.bfloat16)
    assert ResidualDecomposition(model).run(ids).error < 0.02


def test_a_result_is_told_drawn_and_kept(tmp_path: Path, loaded: tuple[nn.Module, Any]) -> None:
    found = ResidualDecomposition(*loaded).run("Junel Dunoth grew up in")
    assert "Decomposition of the stream of 1 prompt, 6 tokens, 9 parts" in repr(found)
    shares = dict(zip(found.names, found.medians("share"), strict=True))
    first = max(shares, key=lambda name: float(shares[name]))  # as the plot has it
    assert f"shares of its end, medians over tokens: {first} {shares[first]:+.2f}, " in repr(found)
    moved = found.medians("movement")[1:]
    assert f"moved most by {found.names[1 + int(moved.argmax())]} {moved.max():.2f}, " in repr(found)
    assert len(found.table()) == 9
    found.save(tmp_path / "parts.safetensors")
    assert repr(Decomposition.load(tmp_path / "parts.safetensors")) == repr(found)
    for what in ("share", "norm", "movement", "cosine_before", "cosine_end"):
        figure = found.plot(what=what)
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()][1:3] == ["Junel", "Dunoth"]
    with pytest.raises(AnalyzerError, match=r"what='size', example=0: expected one of 'norm', 'movement'"):
        found.plot(what="size")
    cnn, args, _ = build("cnn")
    with pytest.raises(Exception, match=r"has no residual stream"):
        ResidualDecomposition(cnn).run(args[0])
