"""Small random models and their inputs, one builder for each way in which PyTorch code is written.

`build("gpt2")` gives a model in eval mode and the keyword or positional arguments of one forward, the same each time.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
ZOO: dict[str, Callable[[], Built]] = {}


def build(name: str) -> Built:
    """A model of the zoo with its arguments; two calls give equal weights and inputs, and torch's seed is as it was."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model, args, kwargs = ZOO[name]()
    return model.eval(), args, kwargs


def _zoo(make: Callable[[], Built]) -> Callable[[], Built]:
    ZOO[make.__name__] = make
    return make


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returned: tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value):
        yield from tensors(vars(value))


def bits(value: Any) -> list[tuple[Any, ...]]:
    """All that can be told apart about the tensors in a value: bytes, layout in memory, type and history."""
    found = []
    for tensor in tensors(value):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            found.append((tensor.shape, tensor.dtype))
            continue
        if tensor.is_nested:
            found += bits(tensor.unbind())
            continue
        dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
        origin = type(tensor.grad_fn).__name__
        with torch.inference_mode(False):
            data = dense.clone().resolve_conj().resolve_neg().cpu().numpy().tobytes()
        found.append((data, tensor.dtype, tensor.shape, tensor.layout, dense.stride(), tensor.requires_grad, origin))
    return found


# ---- transformers, from tiny configs

TOKENS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def tokens(*shape: int) -> Tensor:
    """Token numbers of the tiny vocabulary, without its special ones."""
    return torch.randint(3, 32, shape)


def padding() -> Tensor:
    """A mask for two rows of six tokens; the second ends in two that are padding."""
    return torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@_zoo
def gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, **TOKENS)
    return GPT2LMHeadModel(config), (), {"input_ids": tokens(2, 6), "use_cache": False}


@_zoo
def gpt2_eager() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, attn_implementation="eager", **TOKENS)
    return GPT2LMHeadModel(config), (), {"input_ids": tokens(2, 6), "attention_mask": padding(), "use_cache": True}


@_zoo
def bert() -> Built:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        **TOKENS,
    )
    return BertModel(config), (), {"input_ids": tokens(2, 6), "attention_mask": padding()}


def _decoder(**more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 32, **TOKENS, **more,
    }  # fmt: skip


@_zoo
def llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder())), (), {"input_ids": tokens(2, 6), "use_cache": False}


@_zoo
def mixtral() -> Built:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_decoder(num_local_experts=3, num_experts_per_tok=2, sliding_window=None))
    return MixtralForCausalLM(config), (), {"input_ids": tokens(2, 6), "use_cache": False}


@_zoo
def t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(num_layers=2, d_model=16, d_kv=8, num_heads=2, d_ff=24, decoder_start_token_id=0, **TOKENS)
    given = {"input_ids": tokens(2, 6), "decoder_input_ids": tokens(2, 4), "use_cache": False}
    return T5ForConditionalGeneration(config), (), given


@_zoo
def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config), (torch.randn(2, 3, 8, 8),), {}


@_zoo
def whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        encoder_layers=1, decoder_layers=1, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
        decoder_start_token_id=0, suppress_tokens=None, begin_suppress_tokens=None, **TOKENS,
    )  # fmt: skip
    given = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens(2, 4), "use_cache": False}
    return WhisperForConditionalGeneration(config), (), given


@_zoo
def mamba() -> Built:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(num_hidden_layers=2, hidden_size=16, state_size=4, time_step_rank=4, use_mambapy=False, **TOKENS)
    return MambaForCausalLM(config), (), {"input_ids": tokens(2, 6), "use_cache": False}


# ---- torch's own modules


@_zoo
def gru() -> Built:
    return nn.GRU(4, 8, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True), (torch.randn(2, 5, 4),), {}


@_zoo
def lstm() -> Built:
    return nn.LSTM(4, 8), (torch.randn(5, 2, 4),), {}


@_zoo
def lstm_packed() -> Built:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 8)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0]

    return Packed(), (torch.randn(5, 3, 4), torch.tensor([2, 5, 3])), {}


@_zoo
def transformer() -> Built:
    model = nn.Transformer(16, 2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=24, batch_first=True)
    return model, (torch.randn(2, 5, 16), torch.randn(2, 4, 16)), {"tgt_is_causal": False}


def _encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


@_zoo
def encoder() -> Built:
    return _encoder(), (torch.randn(2, 5, 16),), {}


@_zoo
def encoder_padded() -> Built:
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]])
    return _encoder(), (torch.randn(2, 5, 16),), {"src_key_padding_mask": mask}


@_zoo
def encoder_masked() -> Built:
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    return _encoder(), (torch.randn(2, 5, 16),), {"mask": mask, "is_causal": True}


@_zoo
def attention() -> Built:
    x = torch.randn(2, 5, 16)
    return nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True), (x, x, x), {}


@_zoo
def cross_attention() -> Built:
    model = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, add_zero_attn=True)
    return model, (torch.randn(5, 2, 16), torch.randn(4, 2, 8), torch.randn(4, 2, 8)), {"average_attn_weights": False}


@_zoo
def cnn() -> Built:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.3),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Hardswish(inplace=True), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return model, (torch.randn(4, 3, 8, 8),), {}


# ---- code that is hard to watch


class InPlace(nn.Module):
    """Overwrites tensors in every way: methods, operators, items, `out=`, views, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).relu_() + 0
        h[:, 0] = x[:, 1]
        h += x
        head, tail = h[:, :2], h[:, 2:]
        tail += head
        h.t()[1].add_(1.0)
        row = torch.empty_like(h[0].detach())
        torch.sum(h.detach(), 0, out=row)
        self.seen.add_(row)
        h.masked_fill_(h > 2, 2.0)
        return h.contiguous() + self.seen.clone()


@_zoo
def in_place() -> Built:
    return InPlace(), (torch.randn(3, 4),), {}


class Vmapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.vmap(lambda row: (row @ self.weight).softmax(-1))(x * 2)
        return rows.sum(0) + torch.vmap(torch.vmap(torch.tanh))(rows).mean()


@_zoo
def vmapped() -> Built:
    return Vmapped(), (torch.randn(3, 4),), {}


class Score(nn.Module):
    """The gradient of its energy, by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda y: self.net(y).sum())(x)
        return x - 0.1 * slope + torch.func.jvp(torch.sin, (x,), (x,))[1]


@_zoo
def func_grad() -> Built:
    return Score(), (torch.randn(3, 4),), {}


class Forces(nn.Module):
    """The gradient of its energy, by autograd inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            y = x.detach().clone().requires_grad_()
            (force,) = torch.autograd.grad(self.net(y).sum(), y, create_graph=self.training)
        return force * 2


@_zoo
def inner_backward() -> Built:
    return Forces(), (torch.randn(3, 4),), {}


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 3 * x * x


class Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.linear(x)) + 1


@_zoo
def custom_function() -> Built:
    return Cubed(), (torch.randn(3, 4),), {}


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Scripted(nn.Module):
    """Calls code that torch.jit compiled, whose ops no mode can see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.act = torch.jit.script(_swish)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.act(self.linear(x)))


@_zoo
def scripted() -> Built:
    return Scripted(), (torch.randn(3, 4),), {}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


@_zoo
def checkpointed() -> Built:
    return Checkpointed(), (torch.randn(3, 4),), {}


@_zoo
def parametrized() -> Built:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.ReLU(),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    )
    return model, (torch.randn(3, 4),), {}


class Functional(nn.Module):
    """Calls its own network with other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: value * 0.5 for name, value in self.net.named_parameters()}
        return torch.func.functional_call(self.net, weights, (x,)) + self.net(x)


@_zoo
def functional() -> Built:
    return Functional(), (torch.randn(3, 4),), {}


@dataclass
class Answer:
    """What a model may return: a dataclass that holds tensors and other things."""

    hidden: Tensor
    more: dict[str, Any] = field(default_factory=dict)
    name: str = "answer"


class Shared(nn.Module):
    """One layer in a loop, a nested module call by keyword, and a dataclass as output."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.again = self.cell
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor, *, steps: int = 3) -> Answer:
        seen = []
        for _ in range(steps):
            x = self.norm(input=self.cell(x)).tanh()
            seen.append(x)
        first, *rest = torch.stack(seen).unbind(0)
        return Answer(self.again(first), {"rest": rest, "steps": steps})


@_zoo
def shared() -> Built:
    return Shared(), (torch.randn(3, 4),), {"steps": 3}


class Parts(nn.Module):
    """Complex numbers, lists of tensors, integer and boolean tensors, a sparse product, indexing, factories."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("links", torch.eye(4).to_sparse())

    def forward(self, x: Tensor) -> dict[str, Any]:
        spectrum = torch.fft.rfft(x * self.scale)
        parts = torch.stack([spectrum.real, spectrum.imag], -1)
        top, where = x.topk(2, -1)
        picked = torch.where(x > 0, x, torch.zeros_like(x))[torch.arange(2), where[:2, 0]]
        mixed = torch.sparse.mm(self.links, x)
        return {"parts": parts, "top": (top, where), "picked": [picked, None], "mixed": mixed.mT, "n": x.shape[0]}


@_zoo
def parts() -> Built:
    return Parts(), (torch.randn(4, 6),), {}


class Chain(nn.Module):
    """A two-layer network of a few ops, for tests that count them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h.mul_(2.0)
        h = F.gelu(h).softmax(-1)
        return self.down(h) + x


@_zoo
def chain() -> Built:
    return Chain(), (torch.randn(3, 4),), {}
