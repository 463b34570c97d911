"""Recurrent kernels step by step, in operations that have a rule of DeepLIFT: a gate is a product, a state a sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]
"""What one step hands to the next, what it shows in front."""

Step = Callable[[Tensor, Tensor, State], State]
"""The next state from what the input and what the state say to the gates, and the state."""


def _lstm(given: Tensor, own: Tensor, state: State) -> State:
    enter, keep, new, show = (given + own).chunk(4, -1)
    cell = keep.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _gru(given: Tensor, own: Tensor, state: State) -> State:
    (reset, keep, new), (own_reset, own_keep, own_new) = given.chunk(3, -1), own.chunk(3, -1)
    candidate = (new + (reset + own_reset).sigmoid() * own_new).tanh()
    return (candidate + (keep + own_keep).sigmoid() * (state[0] - candidate),)


STEPS: Mapping[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda given, own, state: ((given + own).tanh(),),
    "rnn_relu": lambda given, own, state: ((given + own).relu(),),
}


def _states(given: Any) -> State:
    return (given,) if isinstance(given, Tensor) else tuple(given)


def _cell(step: Step) -> Callable[..., State]:
    """One step, as `torch.lstm_cell` and the like take it."""

    def form(input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> State:
        state = _states(hx)
        return step(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)

    return form


def _layers(step: Step) -> Callable[..., State]:
    """Layers of steps, as `torch.lstm` and the like take them, also of sequences that are packed by their lengths."""

    def form(input: Tensor, *rest: Any) -> State:
        sizes, rest = (None, rest) if isinstance(rest[2], bool) else (rest[0].tolist(), rest[1:])
        hx, weights, biases, _, _, _, both, *first = rest
        steps = list(input.split(sizes) if sizes else input.unbind(1 if any(first) else 0))
        starts, ends = list(zip(*_states(hx), strict=True)), list[State]()
        each = len(weights) // len(starts)
        for n in range(0, len(starts), 1 + both):
            ways = []
            for way in range(n, n + 1 + both):
                outs, end = _run(step, steps, starts[way], weights[way * each : (way + 1) * each], biases, way > n)
                ways.append(outs)
                ends.append(end)
            steps = [torch.cat(several, -1) for several in zip(*ways, strict=True)]
        out = torch.cat(steps) if sizes else torch.stack(steps, 1 if any(first) else 0)
        return out, *(torch.stack(several) for several in zip(*ends, strict=True))

    return form


def _run(
    step: Step, steps: Sequence[Tensor], start: State, weights: Sequence[Tensor], biases: bool, back: bool
) -> tuple[list[Tensor], State]:
    """What one layer shows at each step, one way, and the state that it ends in; rows may end or begin on the way."""
    w_ih, w_hh, *more = weights
    b_ih, b_hh = more[:2] if biases else (None, None)
    smaller = more[-1] if len(more) % 2 else None
    outs, ended, state = list[Tensor](), list[State](), tuple(one[: len(steps[-1 if back else 0])] for one in start)
    for given in reversed(steps) if back else steps:
        rows, many = len(given), len(state[0])
        if rows < many:
            ended.insert(0, tuple(one[rows:] for one in state))
            state = tuple(one[:rows] for one in state)
        elif rows > many:
            state = tuple(torch.cat([one, first[many:rows]]) for one, first in zip(state, start, strict=True))
        state = step(F.linear(given, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        state = state if smaller is None else (F.linear(state[0], smaller), *state[1:])
        outs.append(state[0])
    return outs[::-1] if back else outs, tuple(torch.cat(several) for several in zip(state, *ended, strict=True))


RECURRENT: Mapping[str, Callable[..., State]] = {
    **{op: _layers(step) for op, step in STEPS.items()},
    **{f"{op}_cell": _cell(step) for op, step in STEPS.items()},
}
"""Recurrent kernels by their ops: each returns all that the kernel does."""
