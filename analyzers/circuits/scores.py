"""Scores of edges: to first order from gradients, and exactly, by patching one after the other."""

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from analyzers.causal.attribution import Between, descended
from analyzers.circuits.board import Board
from analyzers.circuits.wiring import Input
from analyzers.numbers.embed import Floats
from analyzers.prompts import Prompts
from fmr.sweeps.bars import bar, hidden


def by_gradients(board: Board, model: nn.Module, clean: Prompts, steps: int, progress: bool | None = False) -> Floats:
    """The share of the answer that each edge carries to first order, (writers, readers).

    It is the difference that the writer makes between the two runs times the gradient of the metric at what the reader
    hears, summed over positions and pairs: that of the clean run with one step, the mean over runs from near the corrupted
    one to the clean one with more.
    """
    wiring, differences = board.wiring, board.differences
    slopes = torch.zeros(len(wiring.readers), differences.shape[1], dtype=differences.dtype, device=differences.device)
    names = dict.fromkeys([board.embedding, *(name for one in wiring.inputs for name in (one.point, one.value))])
    for step in bar(range(1, steps + 1), "gradients", progress):
        way = Between(board.noised[board.embedding], 1 - step / steps)
        run, _ = descended(model, clean, list(names), {board.embedding: way}, board.metric)
        board.forwards += 1
        there = {str(name): slope for name, slope in run.grad.items()}
        for one in wiring.inputs:
            if one.value in there:
                slopes[one.first : one.readers.stop] += (
                    _slopes(one, run[one.point].detach(), there[one.value], board) / steps
                )
    return np.where(wiring.allowed, (differences @ slopes.T).cpu().double().numpy() / board.gap, 0.0)


def _slopes(one: Input, stream: Tensor, slope: Tensor, board: Board) -> Tensor:
    """The gradient at what each reader of an input hears of the stream, from that at what becomes of it."""
    if not one.way.steps:
        return board.wide(slope).flatten()[None]
    found = []
    with torch.enable_grad():
        leaf = stream.requires_grad_()
        made = one.way({one.point: leaf}, board.noised.last)
        for group in one.groups:
            own = torch.zeros_like(slope)
            for part, given in zip(one.part(own, group), one.part(slope, group), strict=True):
                part.copy_(given)
            found.append(torch.autograd.grad(made, leaf, own, retain_graph=True)[0])
    return torch.stack([board.wide(grad).flatten() for grad in found])


def by_removal(board: Board, threshold: float, progress: bool | None = False) -> Floats:
    """How much further from the whole answer the circuit gets when each edge is patched, one after the other from the
    logits up: what makes less than the threshold stays patched. 0 where nothing hears the reader any more."""
    wiring, kept = board.wiring, board.wiring.allowed.copy()
    scores, off = np.zeros(kept.shape), 0.0
    with tqdm(total=int(kept.sum()), desc="edges", disable=hidden(progress)) as bar:
        for reader in reversed(range(len(wiring.readers))):
            heard = reader == len(wiring.readers) - 1 or bool(kept[wiring.feeds[reader]].any())
            for writer in reversed(np.flatnonzero(kept[:, reader])):
                bar.update()
                kept[writer, reader] = False
                if not heard:
                    continue
                now = abs(1 - board.share(board.test(kept)))
                scores[writer, reader] = now - off
                if now - off < threshold:
                    off = now
                else:
                    kept[writer, reader] = True
    return scores
