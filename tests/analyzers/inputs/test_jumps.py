"""Integrated gradients past what jumps: where, by how much, and what is chosen otherwise."""

import pytest
import torch
from torch import Tensor, nn

from analyzers import InputAttribution
from tests.analyzers.inputs.models import made, numbers


def switched(x: Tensor) -> Tensor:
    """Two experts, of which the larger of two numbers says which is asked."""
    chosen = x[:, :2].argmax(1)
    return torch.stack([x.sum(1), 3 - x.sum(1)], 1).gather(1, chosen[:, None])


def test_a_choice_is_named_with_its_place_and_height() -> None:
    x, base = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.5, 0.0]])
    found = InputAttribution(made(switched)).run(x, 0, "ig", baseline=base)
    assert found.complete is False
    assert len(found.notes) == 1
    place = 1 / 3  # where t = 0.5 - t / 2, so that t + 0.5 - t / 2 + t = 1 there, which becomes 1 from 3 - 1
    assert found.notes[0] == (
        f"class 0 jumps at 1 place of the way from the baseline, by -1 in all, of -1 that its gradients miss; by -1 at "
        f"{place:.4g} of the way, where /argmax#0 becomes another one. Of a jump no gradient tells, however many are taken"
    )


def test_what_bends_sharply_is_no_jump() -> None:
    model = made(lambda x: torch.tanh(2500 * (x - 0.3)).sum(1, keepdim=True))
    for most in (64, 144, 160):  # pieces that are still wide, and narrow ones in which the bend lies
        found = InputAttribution(model).run(torch.ones(1, 1), 0, "ig", most=most, within=1e-4)
        assert found.gap[0] > 1e-3
        assert found.notes == ()


def test_what_bends_without_a_slope_is_no_jump() -> None:
    model = made(lambda x: ((x - 0.5).relu() ** 0.25).sum(1, keepdim=True))
    found = InputAttribution(model).run(torch.ones(1, 1), 0, "ig", within=1e-4)
    assert found.complete is False
    assert found.notes == ()


@pytest.mark.parametrize("seed", [0, 4, 6, 9, 22])
def test_a_jump_is_found_in_a_piece_as_narrow_as_numbers_are_apart(seed: int) -> None:
    torch.manual_seed(seed)
    router, experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def one_of(x: Tensor) -> Tensor:
        every = torch.stack([expert(x) for expert in experts], 1)[..., 0]
        return every.gather(1, router(x).argmax(1, keepdim=True))

    x, base = 3 * numbers(1, 8, seed=seed), 3 * numbers(1, 8, seed=seed + 50)
    at, start = (router(one).detach().diff(dim=1).item() for one in (x, base))
    sides = [expert(base + start / (start - at) * (x - base)).item() for expert in experts]
    found = InputAttribution(made(one_of)).run(x, 0, "ig", baseline=base)
    if start * at > 0:
        assert found.notes == ()
        return
    height = (sides[1] - sides[0]) * (1 if at > 0 else -1)
    assert f"jumps at 1 place of the way from the baseline, by {height:.3g} in all" in found.notes[0]
    assert f"at {start / (start - at):.4g} of the way, where /argmax#0 becomes another one" in found.notes[0]


@pytest.mark.parametrize("way", [torch.round, lambda x: x.round() + x])
def test_a_rounding_jumps_where_no_choice_is_recorded(way: object) -> None:
    model = made(lambda x: way(x).sum(1, keepdim=True) + x.sum(1, keepdim=True))  # type: ignore[operator]
    found = InputAttribution(model).run(torch.full((1, 1), 0.8), 0, "ig")
    assert "jumps at 1 place of the way from the baseline, by 1 in all" in found.notes[0]
    assert "becomes another one" not in found.notes[0]


def test_experts_that_are_called_or_not_are_another_way() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[int(x[0, 0] > 0.35)](x)

    found = InputAttribution(Experts().eval()).run(numbers(1, 4).abs(), 0, "ig")
    assert ", where the model goes another way." in found.notes[0]
