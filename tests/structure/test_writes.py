"""What is a write and what only looks like one: biases of scores, shifts of norms, means, casts."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from tests.models import build


@pytest.mark.parametrize("examples", [1, 2])
def test_scores_to_which_layers_add_one_bias_are_no_stream(examples: int) -> None:
    model, args, kwargs = build("t5")
    kwargs = {name: value[:examples] if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    run = fmr.run(model, *args, **kwargs)
    assert {run[stream.points[0]].dim() for stream in fmr.locate(run).streams} == {3}


class Modulated(nn.Module):
    """A condition for each token scales and shifts the norms and weighs what is written."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.modulations = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(2))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(width, n * width) for _ in range(2)) for n in (3, 1))
        self.up, self.down = (nn.ModuleList(nn.Linear(a, b) for _ in range(2)) for a, b in ((width, 24), (24, width)))
        self.states: list[Tensor] = []

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        self.states, norm = [x], nn.LayerNorm(x.shape[-1], elementwise_affine=False)
        for layer, modulation in enumerate(self.modulations):
            a, b, c, d, e, f = modulation(F.silu(condition)).chunk(6, -1)
            q, k, v = self.qkv[layer](norm(x) * (1 + a) + b).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            x = x + c * self.out[layer](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            self.states.append(x)
            x = x + f * self.down[layer](F.gelu(self.up[layer](norm(x) * (1 + d) + e)))
            self.states.append(x)
        return x


@pytest.mark.parametrize(("tokens", "conditions"), [(5, 5), (1, 1), (5, 1)])
def test_a_shift_of_a_norm_is_no_write(tokens: int, conditions: int) -> None:
    model = Modulated()
    run = fmr.run(model, torch.randn(2, tokens, 32), torch.randn(2, conditions, 32))
    (stream,) = fmr.locate(run).streams
    assert all(torch.equal(run[write.after], state) for write, state in zip(stream.writes, model.states[1:], strict=True))


@pytest.mark.parametrize("pool", [lambda x: x.mean(1), lambda x: x.amax(1), lambda x: x[:, 0]])
def test_a_mean_over_positions_is_no_final_norm(pool: object) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + self.down(F.gelu(self.up(F.layer_norm(x, (8,)))))
            assert callable(pool)
            return self.head(pool(x))

    found = fmr.locate(fmr.run(Pooled(), torch.randn(2, 5, 8)))
    assert found.final_norm is None
    assert len(found.residual.writes) == 2


def test_what_lies_inside_a_write_is_found_behind_a_cast() -> None:
    """A state-space layer in half precision: its inner steps, cast to more digits, are no stream of their own."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.step, self.leave = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.enter(F.layer_norm(x, (8,)))).float()
            y = y * 0.5 + self.step(y.to(x.dtype)).float()
            return x.float() + self.leave(y.to(x.dtype)).float()

    run = fmr.run(Mixer().to(torch.bfloat16), torch.randn(2, 5, 8).to(torch.bfloat16))
    (stream,) = (stream for stream in fmr.locate(run).streams if stream.writes)
    assert [write.added.partition("/")[0] for write in stream.writes] == [""]


def test_the_sum_of_two_skips_is_a_point() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.ModuleList(nn.Linear(a, b) for _ in range(4)) for a, b in ((8, 24), (24, 8)))
            self.rates = nn.Parameter(torch.rand(4, 3))
            self.states: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            first, skips, self.states = x, [], [x]
            for layer, (skip, a, b) in enumerate(self.rates):
                if layer >= 2:
                    x = x + skip * skips.pop()
                    self.states.append(x)
                y = a * x + b * first
                x = y + self.down[layer](F.relu(self.up[layer](F.rms_norm(y, (8,)))))
                self.states.append(x)
                skips.append(x)
            return x

    model = Skips()
    run = fmr.run(model, torch.randn(2, 5, 8))
    points = [run[point] for point in fmr.locate(run).residual.points]
    for state in model.states:
        assert any(torch.equal(point, state) for point in points)
