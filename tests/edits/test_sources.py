"""What an interchange takes has as many positions as the site; heads that a kernel packs are told apart again."""

import pytest
import torch
from torch import nn

import fmr
from fmr import edits, subspaces
from fmr.edits.layouts import unpacked
from fmr.errors import EditError


def decoder(kernel: str = "sdpa", kv: int = 2, **settings: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv, intermediate_size=64,
        vocab_size=50, attn_implementation=kernel, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids(length: int, examples: int = 1) -> torch.Tensor:
    return torch.randint(3, 50, (examples, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    ("positions", "length"),
    [([1, 6], 5), ([6, 1], 5), ([-6, -1], 5), (slice(1, 3), 2), (slice(-2, None), 1)],
)
@pytest.mark.parametrize("space", [None, subspaces.Units(48, range(48))])
def test_one_position_of_a_source_is_not_put_at_several(
    positions: list[int] | slice, length: int, space: subspaces.Subspace | None
) -> None:
    model = decoder("eager")
    site = fmr.locate(fmr.run(model, ids(7))).layers[0].resid_post.at(positions=positions)
    with pytest.raises(EditError, match=r"and not all of these positions|one of its positions, where the site holds 2"):
        fmr.run(model, ids(7), edits={site: edits.Interchange(ids(length), within=space)})
    fmr.run(model, ids(7), edits={site: edits.Interchange(ids(7), within=space)})


def test_one_example_of_a_source_serves_all() -> None:
    model = decoder("eager")
    site = fmr.locate(fmr.run(model, ids(7))).layers[0].resid_post
    run = fmr.run(model, ids(7, 3), edits={site: edits.Interchange(ids(7))})
    assert torch.equal(run[site], fmr.run(model, ids(7))[site].expand(3, -1, -1))


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("chosen", [{"heads": 1}, {"positions": -1}, {"heads": [1, 3], "positions": -1}, {"examples": 1}])
def test_edits_of_heads_in_a_padded_generation_are_those_of_eager_attention(kv: int, chosen: dict[str, object]) -> None:
    batch = ids(6, 2)
    mask = torch.ones_like(batch)
    mask[1, :2] = 0
    said = []
    for kernel in ("eager", "sdpa"):
        model = decoder(kernel, kv)
        z = fmr.locate(fmr.run(model, input_ids=batch, attention_mask=mask)).attention[0].z
        with fmr.Intervention({z.at(**chosen): edits.Scale(-3.0)}).on(model) as steered:
            out = model.generate(
                batch, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
        assert steered.receipts[z.at(**chosen)].fired == 4
        said.append(torch.stack(out.logits))
    assert torch.allclose(*said, atol=1e-5)


def test_a_packed_step_reads_as_an_eager_one() -> None:
    batch, read = ids(6, 2), []
    mask = torch.ones_like(batch)
    mask[1, :2] = 0
    for kernel in ("eager", "sdpa"):
        model = decoder(kernel)
        block = fmr.locate(fmr.run(model, input_ids=batch, attention_mask=mask)).attention[0]
        with fmr.track(model, keep=[block.z, block.pattern]) as run:
            model.generate(batch, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
        step = run.passes[1]
        read.append(
            (step[block.z], step[block.z.at(positions=-1)], step[block.z.at(heads=3)], step[block.pattern.at(heads=3)])
        )
    assert read[0][0].shape == (2, 4, 1, 12)
    for eager, packed in zip(*read, strict=True):
        assert torch.allclose(eager, packed, atol=1e-6)


def test_heads_that_are_laid_out_otherwise_are_refused_where_positions_are_meant() -> None:
    site = fmr.Site("z", layout=("examples", "heads", "positions", "units"), n_heads=8)
    with pytest.raises(fmr.IdError, match=r"means a value of 8 heads, but 'z' has shape \(2, 3, 5, 4\)"):
        site.at(positions=-1).of(torch.zeros(2, 3, 5, 4))
    assert unpacked(site, torch.zeros(2, 2, 4, 6)).shape == (2, 8, 1, 6)
    assert unpacked(site, torch.zeros(2, 8, 4, 6)).shape == (2, 8, 4, 6)


def test_the_channels_of_an_image_are_not_guessed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2)).eval()
    x, y = torch.randn(2, 2, 3, 8, 8).unbind()
    space = subspaces.Rotation(8, 3)
    with pytest.raises(EditError, match=r"holds four dimensions, and nothing says which .* layout=\('examples', 'units', "):
        fmr.run(net, x, edits={"0": edits.Interchange(y, within=space)})
    site = fmr.Site("0", layout=("examples", "units", "rows", "columns"))
    run = fmr.run(net, x, edits={site: edits.Interchange(y, within=space)})
    before, other = (net[0](one).movedim(1, -1) for one in (x, y))
    wanted = space.write(before, space.read(other)).movedim(-1, 1)
    assert torch.allclose(run[site], wanted, atol=1e-6)
