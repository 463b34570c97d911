"""What heads write is what arrives in the stream, whatever stands between their projection and the add."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma2Config, Olmo2Config

from analyzers import AnalyzerError, HeadClustering

WRITTEN = ("output", "cka")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
SIZES |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def normed_after(config: Any) -> nn.Module:
    """A language model whose norms after attention weigh directions unlike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


class Block(nn.Module):
    """Attention on a stream, with something between its projection and the add."""

    def __init__(self, after: nn.Module, rows_first: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.before, self.after, self.rows_first = nn.LayerNorm(8), after, rows_first

    def forward(self, x: Tensor) -> Tensor:
        read = self.before(x)
        q, k, v = (layer(read).unflatten(-1, (4, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        z = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        z = z.transpose(0, 1) if self.rows_first else z
        out = self.after(self.o(z))
        return x + (out.transpose(0, 1) if self.rows_first else out)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


def arrived(z: Tensor, o: nn.Linear, gain: Tensor, size: Tensor, centred: bool = False) -> Tensor:
    """(heads, examples, positions, width), by hand. size: what each token is divided by, (examples, positions, 1)."""
    heads = torch.einsum("bphu,whu->hbpw", z.unflatten(-1, (4, -1)), o.weight.unflatten(-1, (4, -1)))
    heads = heads - heads.mean(-1, keepdim=True) if centred else heads
    return (gain * heads / size).detach()


def expected(heads: Tensor) -> dict[str, np.ndarray]:
    """The two distances of what (heads, examples, positions, width) hold, as they are defined."""
    n, examples, positions, _ = heads.shape
    cosines = 1 - torch.cosine_similarity(heads[:, None], heads[None], dim=-1).mean((-2, -1))
    likeness = np.zeros((n, n))
    ones = torch.ones(positions, dtype=torch.float64)
    for e in range(examples):
        kernels = (heads[:, e] @ heads[:, e].mT).double()
        kernels = kernels - torch.diag_embed(kernels.diagonal(dim1=1, dim2=2))
        for i in range(n):
            for j in range(n):
                k, m = kernels[i], kernels[j]
                whole = (ones @ k @ ones) * (ones @ m @ ones) / ((positions - 1) * (positions - 2))
                likeness[i, j] += float((k @ m).trace() + whole - 2 / (positions - 2) * (ones @ k @ m @ ones))
    own = np.sqrt(np.diag(likeness))
    return {"output": cosines.fill_diagonal_(0).numpy(), "cka": 1 - likeness / np.outer(own, own)}


@pytest.mark.parametrize("config", [Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8), Olmo2Config(**SIZES)])
def test_a_norm_after_attention_is_folded_into_what_its_heads_write(config: Any) -> None:
    model, kept = normed_after(config), []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda _, args, out: kept.append((args[0], out)))
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)
    heads = []
    for layer, (z, out) in zip(model.model.layers, list(kept), strict=True):
        norm = layer.post_attention_layernorm
        gain = norm.weight + (1 if config.model_type == "gemma2" else 0)
        size = (out.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        heads.append(arrived(z, layer.self_attn.o_proj, gain, size))
    found = HeadClustering(model, distances=WRITTEN).over([{"input_ids": ids[:1]}, {"input_ids": ids[1:]}])
    for kind, distances in expected(torch.cat(heads)).items():
        np.testing.assert_allclose(found.result(distance=kind, permutations=0).distances, distances, atol=2e-5, err_msg=kind)


@pytest.mark.parametrize("rows_first", [False, True])
def test_a_norm_that_takes_means_away_does_so_to_each_head(rows_first: bool) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(8)
    norm.weight.data, norm.bias.data = torch.randn(2, 8)
    block, kept, x = Block(norm, rows_first).eval(), list[Tensor](), torch.randn(6, 6, 8)
    block.o.register_forward_hook(lambda _, args, out: kept.extend((args[0], out)))
    block(x)
    z, out = (one.transpose(0, 1) if rows_first else one for one in kept)
    heads = arrived(z, block.o, norm.weight, (out.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(), centred=True)
    found = HeadClustering(block, distances=WRITTEN).update({"x": x})
    for kind, distances in expected(heads).items():
        np.testing.assert_allclose(found.result(distance=kind, permutations=0).distances, distances, atol=2e-5, err_msg=kind)


def test_how_queries_and_keys_are_made_does_not_matter() -> None:
    """Keys of two projections, of which one is shared: what heads write is known all the same."""
    torch.manual_seed(0)
    small = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = DeepseekV3Config(**SIZES, **small, num_key_value_heads=4, first_k_dense_replace=2)
    model, kept = AutoModelForCausalLM.from_config(config).eval(), list[Tensor]()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda _, args, out: kept.append(args[0]))
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)
    one, layers = torch.ones(1), zip(list(kept), model.model.layers, strict=True)
    heads = torch.cat([arrived(z, layer.self_attn.o_proj, one, one) for z, layer in layers])
    found = HeadClustering(model, distances="output").update({"input_ids": ids}).result(permutations=0)
    np.testing.assert_allclose(found.distances, expected(heads)["output"], atol=2e-5)


def test_what_arrives_as_no_sum_over_heads_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(AnalyzerError, match=r"write does not arrive in the stream as a sum over them: .* by one weight"):
        HeadClustering(Block(Gate()).eval(), distances="cka").update({"x": torch.randn(2, 6, 8)})
    found = HeadClustering(Block(Gate()).eval()).update({"x": torch.randn(2, 6, 8)}).result(permutations=0)
    assert found.distances.max() > 0
