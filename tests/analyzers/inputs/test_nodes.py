"""The nodes of a circuit as an attribution: what their edges carry, beside attribution patching, drawn and stored."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import fmr
from analyzers import Attribution, AttributionPatching, Circuit, CircuitSearch
from fmr.sweeps import logit_diff
from fmr.zoo import world

matplotlib.use("Agg")
WORDS = [text.split() for text in world.repeats(3, 6, seed=0)]
OTHERS = WORDS[1:] + WORDS[:1]
CLEAN = [" ".join(words[:9]) for words in WORDS]
CORRUPTED = [" ".join([*words[:3], other[3], *words[4:9]]) for words, other in zip(WORDS, OTHERS, strict=True)]
METRIC = logit_diff([words[3] for words in WORDS], [other[3] for other in OTHERS])


@pytest.fixture(scope="module")
def circuit(loaded: tuple[nn.Module, Any]) -> Circuit:
    search = CircuitSearch(*loaded)
    return search.run(CLEAN, CORRUPTED, METRIC, "eap", edges=0.05, sizes=[], random=0, progress=False)


def test_a_node_has_what_its_edges_carry(circuit: Circuit) -> None:
    found = Attribution.of_circuit(circuit)
    whole = float(circuit.clean.mean() - circuit.corrupted.mean())
    table = found.table().set_index("node").score
    assert list(table.index) == circuit.nodes[:-1]
    for name in circuit.nodes[:-1]:
        own = sum(edge.score for edge in circuit.edges if edge.writer == name)
        assert table[name] == pytest.approx(own * whole, rel=1e-9)
    assert float(found.output - found.base) == pytest.approx(whole)
    assert found.complete is None
    assert found.notes == ()
    assert found.strongest(1) == [table.abs().idxmax()]
    assert "this method promises no complete sum" in repr(found)


def test_all_edges_of_a_node_carry_what_attribution_patching_says(loaded: tuple[nn.Module, Any]) -> None:
    search = CircuitSearch(*loaded)
    whole = search.run(CLEAN, CORRUPTED, METRIC, "eap", edges=1.0, sizes=[], random=0, progress=False)
    found = Attribution.of_circuit(whole).table().set_index("node").score
    run = fmr.run(loaded[0], **loaded[1](CLEAN, return_tensors="pt"))
    blocks = fmr.locate(run).attention
    sites = [block.z.at(heads=head) for block in blocks for head in range(block.n_heads)]
    effects = AttributionPatching(*loaded, direction="noising").run(CLEAN, CORRUPTED, METRIC, sites)
    names = [f"head {layer}.{head}" for layer, block in enumerate(blocks) for head in range(block.n_heads)]
    scale = float((whole.clean - whole.corrupted).mean())
    theirs = np.array([effects.table().set_index("site").effect[repr(site)] for site in sites])
    assert np.allclose([found[name] for name in names], theirs * scale, atol=1e-4 * scale)


def test_it_is_drawn_stored_and_warned_of(circuit: Circuit, tmp_path: Path) -> None:
    found = Attribution.of_circuit(circuit)
    found.save(tmp_path / "nodes.safetensors")
    again = Attribution.load(tmp_path / "nodes.safetensors")
    assert repr(again) == repr(found)
    labels = [label.get_text() for label in again.plot().axes[0].get_xticklabels()]
    assert labels == circuit.nodes[:-1]
    assert torch.equal(again.scores, found.values)
    exact = Circuit(**{**vars(circuit), "method": "acdc"})
    assert "one after the other, and do not add up" in Attribution.of_circuit(exact).notes[0]
