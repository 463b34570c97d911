"""Circuits by replay are those of plain hooks, for a joint projection and for grouped queries; the ends are exact."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analyzers import AnalyzerError
from analyzers.circuits.board import Board
from analyzers.circuits.choice import Bools
from analyzers.circuits.scores import by_gradients
from analyzers.prompts import prompts
from fmr.sweeps import logit_diff
from tests.analyzers.circuits.byhand import ByHand, Shape, circuit, grouped, joint
from tests.models import TOKENS, build

SHAPES: dict[str, Callable[[], Shape]] = {
    "joint": joint,
    "grouped": grouped,
    "grouped, eager": lambda: grouped(attn_implementation="eager"),
}
METRIC = logit_diff(3, 7)


def tokens() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    both = torch.randint(3, 32, (2, 3, 6), generator=draw)
    return both[0], both[1]


def board_of(shape: Shape) -> Board:
    clean, corrupted = (prompts(one, shape.model) for one in tokens())
    return Board(shape.model, clean, corrupted, METRIC)


def named(board: Board, kept: Bools) -> set[tuple[str, str]]:
    wiring = board.wiring
    return {(wiring.writers[writer], wiring.readers[reader]) for writer, reader in np.argwhere(kept)}


@pytest.mark.parametrize("name", SHAPES)
def test_the_metric_of_a_circuit_is_that_of_hooks(name: str) -> None:
    shape = SHAPES[name]()
    board, hand, draw = board_of(shape), ByHand(shape), np.random.default_rng(0)
    for share in (0.2, 0.5, 0.8, 0.95):
        kept = board.wiring.allowed & (draw.random(board.wiring.allowed.shape) < share)
        with torch.no_grad():
            expected = METRIC(circuit(hand, *tokens(), named(board, kept)))
        assert not expected.allclose(board.clean)
        torch.testing.assert_close(board.test(kept), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_all_edges_are_the_clean_run_and_none_the_corrupted_to_the_bit(name: str) -> None:
    board = board_of(SHAPES[name]())
    assert board.test(board.wiring.allowed).equal(board.clean)
    assert board.test(np.zeros_like(board.wiring.allowed)).equal(board.corrupted)
    assert board.test(board.wiring.allowed).equal(board.clean)


def test_a_test_does_not_depend_on_the_one_before() -> None:
    shape, draw = grouped(), np.random.default_rng(1)
    board = board_of(shape)
    circuits = [board.wiring.allowed & (draw.random(board.wiring.allowed.shape) < 0.7) for _ in range(4)]
    one_by_one = [board_of(shape).test(kept) for kept in circuits]
    for kept, expected in zip(circuits, one_by_one, strict=True):
        assert board.test(kept).equal(expected)


def test_readers_are_told_apart_and_heads_that_share_keys_read_as_one() -> None:
    wiring = board_of(grouped()).wiring
    assert wiring.writers[:7] == ("embedding", "head 0.0", "head 0.1", "head 0.2", "head 0.3", "mlp 0", "head 1.0")
    assert wiring.readers[:9] == (
        "head 0.0 q", "head 0.1 q", "head 0.2 q", "head 0.3 q", "heads 0.0-1 k", "heads 0.2-3 k",
        "heads 0.0-1 v", "heads 0.2-3 v", "mlp 0",
    )  # fmt: skip
    assert wiring.allowed.sum() == 8 * 1 + 5 + 8 * 6 + 10 + 11
    fed = wiring.feeds[wiring.readers.index("heads 1.2-3 k")]
    assert [wiring.writers[place] for place in np.flatnonzero(fed)] == ["head 1.2", "head 1.3"]


def test_a_padded_pair_is_as_the_pair_alone() -> None:
    model = grouped().model
    clean, corrupted = tokens()
    padded = torch.tensor([[2, 2, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).clamp(max=1)
    padded[0, :2] = 0
    inputs = [
        {"input_ids": ids, "attention_mask": padded, "position_ids": (padded.cumsum(1) - 1).clamp(min=0)}
        for ids in (clean, torch.where(padded.bool(), corrupted, clean))
    ]
    together = Board(model, *(prompts(one, model) for one in inputs), METRIC)
    alone = Board(model, *(prompts(ids[:1, 2:], model) for ids in (clean, corrupted)), METRIC)
    kept = together.wiring.allowed & (np.random.default_rng(2).random(together.wiring.allowed.shape) < 0.8)
    torch.testing.assert_close(together.test(kept)[:1], alone.test(kept), atol=1e-9, rtol=1e-9)


def test_half_precision_is_near_the_exact() -> None:
    model = grouped().model.to(torch.bfloat16)
    board = Board(model, *(prompts(one, model) for one in tokens()), METRIC)
    kept = board.wiring.allowed & (np.random.default_rng(0).random(board.wiring.allowed.shape) < 0.9)
    exact = board_of(grouped())
    torch.testing.assert_close(board.test(kept), exact.test(kept), atol=0.3, rtol=0.1)
    scores, expected = (
        by_gradients(one, shape, prompts(tokens()[0], shape), 2)[kept]
        for one, shape in ((board, model), (exact, grouped().model))
    )
    assert np.corrcoef(scores, expected)[0, 1] > 0.99


# ---- other models


def parallel() -> nn.Module:
    """Attention and memory read the same stream, through a norm that they share, and are added at once."""
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    return GPTJForCausalLM(GPTJConfig(n_layer=2, n_embd=16, n_head=2, n_positions=32, rotary_dim=4, vocab_size=32)).eval()


def test_attention_and_memory_side_by_side_do_not_hear_each_other() -> None:
    model = parallel().double()
    board = Board(model, *(prompts(one, model) for one in tokens()), METRIC)
    wiring = board.wiring
    assert board.test(wiring.allowed).equal(board.clean)
    heard = wiring.allowed[:, wiring.readers.index("mlp 1")]
    assert [wiring.writers[place] for place in np.flatnonzero(heard)] == ["embedding", "head 0.0", "head 0.1", "mlp 0"]


def test_experts_are_a_memory() -> None:
    model, _, inputs = build("mixtral")
    model.eval()
    other = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(5))
    board = Board(model, prompts(inputs["input_ids"], model), prompts(other, model), METRIC)
    assert board.test(board.wiring.allowed).equal(board.clean)
    assert board.wiring.writers[-1] == board.wiring.readers[-2] == "mlp 1"


def test_norms_on_the_stream_are_refused() -> None:
    model, _, inputs = build("bert")
    ids = inputs["input_ids"]
    given = prompts(ids, model), prompts(ids.flip(1), model)
    with pytest.raises(AnalyzerError, match=r"changes its residual stream between two writes .* Expected a pre-norm model."):
        Board(model.eval(), *given, lambda output: output.last_hidden_state[:, -1, 0])


def test_heads_before_a_norm_write_as_one() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    model = Gemma2ForCausalLM(Gemma2Config(num_attention_heads=4, num_key_value_heads=2, vocab_size=32, **sizes)).eval()
    board = Board(model.double(), *(prompts(one, model) for one in tokens()), METRIC)
    assert board.wiring.writers == ("embedding", "attention 0", "mlp 0", "attention 1", "mlp 1")
    assert board.wiring.readers[:5] == ("head 0.0 q", "head 0.1 q", "head 0.2 q", "head 0.3 q", "heads 0.0-1 k")
    assert board.test(board.wiring.allowed).equal(board.clean)
    board.is_clean[0], board.last = False, None  # so that all is computed
    torch.testing.assert_close(board.test(board.wiring.allowed), board.clean)


class Stream(nn.Module):
    """A stream to which two memories write; what they read and add can be bent."""

    def __init__(self, bend: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bend, self.embed, self.out = bend, nn.Embedding(32, 6), nn.Linear(6, 32, bias=False)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.norm2, self.up2, self.down2 = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.gate = nn.Embedding(32, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        first = x = self.embed(input_ids)
        x = x + self.down(self.up(self.norm(x)).relu())
        read = self.norm2(x) + self.norm(first) if self.bend == "two" else self.norm2(x)
        added = self.down2(self.up2(read).relu())
        added = added * self.gate(input_ids) if self.bend == "gate" else added
        return self.out(x + added)


class Flat(nn.Module):
    """The stream is flattened for the memory, and comes back as it was."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(32, 6), nn.Linear(6, 32, bias=False)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.norm2, self.up2, self.down2 = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.down(self.up(self.norm(x)).relu())
        rows = x.reshape(-1, 6)
        rows = rows + self.down2(self.up2(self.norm2(rows)).relu())
        return self.out(rows.view(x.shape))


def test_a_stream_that_is_reshaped_is_the_same() -> None:
    model = Flat().eval().double()
    board = Board(model, *(prompts(one, model) for one in tokens()), METRIC)
    assert board.wiring.writers == ("embedding", "mlp 0", "mlp 1")
    assert board.wiring.allowed.sum() == 1 + 2 + 3
    for kept in (board.wiring.allowed, ~board.wiring.allowed):
        board.test(kept)
    direct = board.wiring.allowed.copy()
    direct[0, 1] = False  # the second memory hears the first alone
    embedded, first = model.embed(tokens()[1]), model.embed(tokens()[0])
    written = [model.down(model.up(model.norm(x)).relu()) for x in (embedded, first)]
    heard = embedded + written[1]
    expected = model.out(first + written[1] + model.down2(model.up2(model.norm2(heard)).relu()))
    torch.testing.assert_close(board.test(direct), METRIC(expected).detach())


class Patches(nn.Module):
    """A stream that begins with a projection of pixels, not with an embedding of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.out, self.norm = nn.Linear(5, 6), nn.Linear(6, 3), nn.LayerNorm(6)
        self.norm1, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.norm2, self.up2, self.down2 = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels)
        x = x + self.down(self.up(self.norm1(x)).relu())
        x = x + self.down2(self.up2(self.norm2(x)).relu())
        return self.out(self.norm(x)[:, 0])


def test_a_stream_may_begin_with_pixels() -> None:
    model, draw = Patches().eval().double(), torch.Generator().manual_seed(0)
    clean, corrupted = (
        prompts({"pixels": torch.randn(2, 4, 5, generator=draw, dtype=torch.double)}, model) for _ in range(2)
    )
    board = Board(model, clean, corrupted, lambda output: output[:, 0] - output[:, 1])
    scores = by_gradients(board, model, clean, 3)
    assert board.test(board.wiring.allowed).equal(board.clean)
    assert scores[board.wiring.allowed].all()


# ---- what is refused


def refused(model: nn.Module, message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        Board(model.eval(), *(prompts(one, model) for one in tokens()), METRIC)


def test_what_is_read_of_two_points_is_refused() -> None:
    Board(Stream().eval(), *(prompts(one, Stream()) for one in tokens()), METRIC)
    refused(Stream("two"), r"is made of 2 values of the residual stream \(.*\), expected one, so that no edges of Stream")


def test_what_is_written_by_something_else_too_is_refused() -> None:
    refused(Stream("gate"), r"What the nodes write adds up to /add#\d with an error of .*, or something else writes to")


def test_heads_that_lie_among_the_examples_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(n_layer=2, hidden_size=16, n_head=4, **TOKENS))
    refused(model, r"The heads of 'transformer.h.0.self_attention' cannot be told apart .* with a dimension of heads.")


def test_masks_that_differ_are_refused() -> None:
    model, (clean, corrupted) = grouped(attn_implementation="eager").model, tokens()
    masks = torch.ones_like(clean), torch.ones_like(clean)
    masks[0][:, 0], masks[1][:, 1] = 0, 0
    both = (
        prompts({"input_ids": ids, "attention_mask": mask}, model)
        for ids, mask in zip((clean, corrupted), masks, strict=True)
    )
    with pytest.raises(AnalyzerError, match=r"is read beside the residual stream and differs between clean and corrupted"):
        Board(model, *both, METRIC)
