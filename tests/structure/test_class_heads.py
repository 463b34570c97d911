"""Logits of classes: of each position, of one position of each example, or of all positions at once."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fmr
from fmr.errors import IdError, StructureError

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40}
TOKENS = TINY | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8}
IMAGES = TINY | {"image_size": 16, "patch_size": 8}
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 40, "ffn_dim": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 40, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2 | {"num_labels": 3}),
    "LlamaForSequenceClassification": ("LlamaConfig", TOKENS | {"num_labels": 3}),
    "Gemma2ForSequenceClassification": ("Gemma2Config", TOKENS | {"num_labels": 7}),
    "OPTForSequenceClassification": ("OPTConfig", OPT | {"word_embed_proj_dim": 32, "num_labels": 3, "pad_token_id": 0}),
    "LlamaForTokenClassification": ("LlamaConfig", TOKENS | {"num_labels": 5}),
    "ViTForImageClassification": ("ViTConfig", IMAGES | {"num_labels": 5}),
    "BeitForImageClassification": ("BeitConfig", IMAGES | {"num_labels": 6}),
    "T5ForSequenceClassification": ("T5Config", T5 | {"eos_token_id": 2, "decoder_start_token_id": 0, "num_labels": 3}),
}
"""The last real token of each example, each token, the first position, a mean; as many classes as positions among them."""


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, settings = MODELS[name]
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


def given(name: str, examples: int = 3, positions: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with padding on the right, so that the last real token of each example is another one."""
    draw = torch.Generator().manual_seed(seed)
    if "Image" in name:
        return {"pixel_values": torch.randn(examples, 3, 16, 16, generator=draw)}
    ids = torch.randint(3, 40, (examples, positions), generator=draw)
    if "T5" in name:
        ids[:, -1] = 2
        return {"input_ids": ids}
    mask = torch.arange(positions)[None] < positions - torch.arange(examples)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


@pytest.mark.parametrize("name", MODELS)
def test_the_last_point_reads_as_the_models_own_classes(name: str) -> None:
    model, inputs = made(name), given(name)
    run = fmr.run(model, **inputs)
    structure = fmr.locate(run)
    last = structure.layers[-1].resid_post
    logits = structure.read_out(run, last)
    assert torch.equal(logits, run.output.logits)
    assert structure.unembedding is None  # these are no words
    assert not structure.readout.of_words
    with pytest.raises(StructureError, match="expected numbers of shape"):
        structure.read_out(torch.zeros(3))


@pytest.mark.parametrize("name", MODELS)
def test_it_holds_for_other_batches_with_what_says_which_positions_are_read(name: str) -> None:
    model = made(name)
    structure = fmr.locate(fmr.run(model, **given(name)))
    last, other = structure.layers[-1].resid_post, given(name, 4, 9, seed=1)
    keep = [last, *structure.readout.choices]
    run = fmr.run(model, keep=keep, **other)
    sized = any(one in name for one in ("GPT2", "OPT", "T5"))  # their own code writes the sizes of a batch into a view
    if sized:
        with pytest.raises(StructureError, match=r"view#\d, on the way .* Expected a run with keep='all', or one of the"):
            structure.read_out(run, last)
        names = {fmr.Site(one).id if isinstance(one, str) else one.id for one in keep}
        run = fmr.run(model, keep=lambda node: node.id in names, **other)
    assert torch.equal(structure.read_out(run, last), run.output.logits)
    if structure.readout.choices and not sized:
        with pytest.raises(IdError, match=r"by which positions are chosen: expected fmr.run\(model, keep=\[site, \*structu"):
            structure.read_out(fmr.run(model, keep=[last], **other), last)


@pytest.mark.parametrize("name", MODELS)
def test_the_positions_that_are_read_are_told(name: str) -> None:
    """Changed anywhere else, the stream says the same."""
    model, inputs = made(name), given(name)
    run = fmr.run(model, **inputs)
    structure = fmr.locate(run)
    read = structure.readout.columns(run)
    if "TokenClass" in name:
        assert read is None  # each position has logits of its own
        return
    assert read is not None
    expected = torch.zeros_like(read)
    if "mask" in "".join(inputs):
        expected[torch.arange(3), inputs["attention_mask"].sum(1) - 1] = True
    elif "T5" in name:
        expected[:, -1] = True
    else:
        expected[:] = True if "Beit" in name else torch.arange(5) == 0
    if "Beit" in name:
        expected[:, 0] = False  # the mean is over patches
    assert torch.equal(read, expected)


@pytest.mark.parametrize("name", [name for name in MODELS if "Beit" not in name])
def test_a_bare_vector_reads_as_where_it_stands(name: str) -> None:
    model, inputs = made(name), given(name)
    run = fmr.run(model, **inputs)
    structure = fmr.locate(run)
    end = run[structure.readout.end].detach()
    end = end.unflatten(0, (3, -1)) if end.dim() == 2 else end
    read = structure.readout.columns(run)
    vectors = end if read is None else end[read]
    assert torch.allclose(structure.read_out(vectors), run.output.logits, atol=1e-6)
    assert structure.read_out(vectors[:1]).shape == run.output.logits[:1].shape


class Returned(nn.Module):
    """A stream of which several things are projected and returned, or one that is not of classes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.table, self.norm = how, nn.Embedding(20, 16), nn.LayerNorm(16)
        self.up, self.down, self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        if self.how == "pooled":
            return self.one(x.mean(1))
        if self.how == "several":
            return self.one(x), self.two(x)
        return self.one(x).unbind(-1)


def test_what_makes_no_logits_of_classes_says_why() -> None:
    ids = torch.randint(20, (2, 6))
    for how, why in (
        ("several", "its end is projected to 2 results of the model, which are not told apart"),
        ("spans", "no projection makes logits of the end of its residual stream"),
    ):
        run = fmr.run(Returned(how).eval(), ids)
        structure = fmr.locate(run)
        with pytest.raises(StructureError, match=rf"Nothing can be read out of Returned: {why}"):
            structure.read_out(run, structure.residual.writes[-1].after)
    run = fmr.run(Returned("pooled").eval(), ids)
    structure = fmr.locate(run)
    assert torch.equal(structure.read_out(run, structure.readout.end), run.output)
    assert bool(structure.readout.columns(run).all())
