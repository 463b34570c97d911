"""Which writes are one layer: what an entry of a list writes, and where no list tells, the order of memories."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fmr

WIDTH = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


PARTS = {"A": Attention, "M": Memory, "i": lambda: nn.Linear(WIDTH, WIDTH)}
"""An attention, a memory, and what is neither."""


class Block(nn.Module):
    """These parts one after the other in one `forward`; none of them stands in a list."""

    def __init__(self, parts: str) -> None:
        super().__init__()
        self.names = [f"{part}_{n}_" for n, part in enumerate(parts)]
        for name, part in zip(self.names, parts, strict=True):
            setattr(self, name, PARTS[part]())

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = x + getattr(self, name)(F.layer_norm(x, (WIDTH,)))
        return x


def layers(model: nn.Module) -> list[str]:
    """The located layers of a model as the subscripts of their parts, attentions first."""
    torch.manual_seed(0)
    structure = fmr.locate(fmr.run(model, torch.randn(2, 5, WIDTH)))
    return ["A" * len(layer.attentions) + "M" * len(layer.mlps) for layer in structure.layers]


def stack(*blocks: str) -> nn.Sequential:
    return nn.Sequential(*map(Block, blocks))


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        (("AM", "AM"), ["AM", "AM"]),
        (("MAiM", "MAiM"), ["AMM", "AMM"]),
        (("AMAM", "AMAM"), ["AAMM", "AAMM"]),
        (("MM", "MM"), ["MM", "MM"]),
        (("iM", "AM", "i", "iM"), ["M", "AM", "M"]),
        (("A", "M", "i", "M", "A"), ["A", "M", "M", "A"]),
        (("AAM",), ["AAM"]),
    ],
)
def test_what_an_entry_of_a_list_writes_is_a_layer(blocks: tuple[str, ...], found: list[str]) -> None:
    assert layers(stack(*blocks)) == found


@pytest.mark.parametrize(
    ("stages", "found"),
    [
        ((("AM", "AM"), ("AM",), ("AM", "AM", "AM")), ["AM"] * 6),
        ((("M", "M"), ("M", "AM")), ["M", "M", "M", "AM"]),
        ((("A", "M", "A", "M"), ("A", "M")), ["AM", "AM", "AM"]),
        ((("A", "A", "M"), ("A", "A", "M")), ["AAM", "AAM"]),
    ],
)
def test_lists_within_lists(stages: tuple[tuple[str, ...], ...], found: list[str]) -> None:
    assert layers(nn.Sequential(*(stack(*blocks) for blocks in stages))) == found


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ("AMAM", ["AM", "AM"]),
        ("AAMAAM", ["AAM", "AAM"]),
        ("AMAAMAMAAM", ["AM", "AAM", "AM", "AAM"]),
        ("AMiMAMiM", ["AM", "M", "AM", "M"]),
        ("MAMMAM", ["AMM", "AMM"]),
        ("iMAiMMAiM", ["AMM", "AMM"]),
        ("MAMA", ["AM", "AM"]),
        ("iAMAMi", ["AM", "AM"]),
        ("AMMAMMi", ["AMM", "AMM"]),
        ("AAA", ["A", "A", "A"]),
        ("MMM", ["M", "M", "M"]),
        ("AMAMM", ["AM", "AM", "M"]),
    ],
)
def test_the_order_of_what_one_forward_writes(parts: str, found: list[str]) -> None:
    assert layers(Block(parts)) == found


class Turns(nn.Module):
    """Two lists, of attentions and of memories, that take turns."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.first, self.second = stack(*[first] * 3), stack(*[second] * 3)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = second(first(x))
        return x


@pytest.mark.parametrize(
    ("first", "second", "found"), [("A", "M", ["AM"] * 3), ("AM", "AAM", ["AM", "AAM"] * 3), ("A", "iM", ["AM"] * 3)]
)
def test_lists_that_take_turns(first: str, second: str, found: list[str]) -> None:
    assert layers(Turns(first, second)) == found


class Several(nn.Module):
    """An attention and several memories in a list of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.memories = Block("A"), stack("M", "M", "M")

    def forward(self, x: Tensor) -> Tensor:
        return self.memories(self.attention(x))


def test_a_list_of_memories_within_a_layer_is_no_list_of_layers() -> None:
    assert layers(nn.Sequential(Several(), Several())) == ["AMMM", "AMMM"]


class Again(nn.Module):
    """One layer called three times, each time after a memory of the model itself."""

    def __init__(self, parts: str) -> None:
        super().__init__()
        self.first, self.blocks = Memory(), stack(parts)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks[0](x + self.first(F.layer_norm(x, (WIDTH,))))
        return x


@pytest.mark.parametrize(("parts", "found"), [("MAM", ["M", "AMM"] * 3), ("MM", ["M", "MM"] * 3), ("A", ["AM"] * 3)])
def test_a_layer_called_again_is_another_one(parts: str, found: list[str]) -> None:
    assert layers(Again(parts)) == found


class Streams(nn.Module):
    """Entries that write to two streams, each of which reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"one": Attention(), "two": Memory()}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.roll(1, 1).tanh()
        for block in self.blocks:
            x = x + block["one"](F.layer_norm(x, (WIDTH,)))
            y = y + block["two"](F.layer_norm(y, (WIDTH,)))
        return torch.cat([x, y])


def test_layers_come_in_the_order_in_which_they_end() -> None:
    assert layers(Streams()) == ["A", "M"] * 3


def test_the_stream_goes_on_from_layer_to_layer() -> None:
    structure = fmr.locate(fmr.run(stack("AM", "MAM", "AAM"), torch.randn(2, 5, WIDTH)))
    one, two, three = structure.layers
    assert (one.resid_post, two.resid_post) == (two.resid_pre, three.resid_pre)
    assert [layer.resid_mid and layer.resid_mid.id for layer in structure.layers] == ["0/add#0", "1/add#1", "2/add#1"]


def test_a_stream_that_is_reshaped_between_two_writes_ends_before_its_final_norm() -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 40}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=32)).eval()
    structure = fmr.locate(fmr.run(model, torch.randint(3, 40, (2, 7))))
    assert structure.layers[-1].resid_post.id == structure.residual.writes[-1].after


class TwoSums(nn.Module):
    """What layers make is added to a state that is normed each time, and to one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(kind() for _ in range(2) for kind in (Attention, Memory))
        self.norms, self.logits = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5)), nn.Linear(WIDTH, 20)
        self.enter = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = plain = self.enter(x)
        for norm, part in zip(self.norms, self.parts, strict=False):
            made = part(x)
            plain, x = plain + made, norm(x + made)
        return self.logits(x + self.norms[-1](plain))


def test_parts_that_write_to_two_streams_are_in_one_layer() -> None:
    found = fmr.locate(fmr.run(TwoSums().eval(), torch.randn(2, 5, WIDTH)))
    told = [[one.scope for one in (*layer.attentions, *layer.mlps)] for layer in found.layers]
    assert told == [["parts.0", "parts.1"], ["parts.2", "parts.3"]]
