"""What images are made for and out of: objectives and penalties, parameterizations, transformations.

>>> analyzers.images.Channel("conv2", 3) + 2 * analyzers.images.Diversity("conv1") - analyzers.images.TotalVariation()
Channel('conv2', 3) + 2 * Diversity('conv1') - TotalVariation()
"""

from analyzers.images.difference import Difference
from analyzers.images.objectives import (
    Channel,
    Contrast,
    Direction,
    Diversity,
    Layer,
    Logit,
    Neuron,
    Objective,
    TotalVariation,
)
from analyzers.images.parameterizations import CPPN, FFT, Parameterization, Pixels
from analyzers.images.seen import Seen, gram
from analyzers.images.transformations import Affine, Jitter, Pad, Rotate, Scale
from analyzers.images.viewing import photo

__all__ = [
    "CPPN",
    "FFT",
    "Affine",
    "Channel",
    "Contrast",
    "Difference",
    "Direction",
    "Diversity",
    "Jitter",
    "Layer",
    "Logit",
    "Neuron",
    "Objective",
    "Pad",
    "Parameterization",
    "Pixels",
    "Rotate",
    "Scale",
    "Seen",
    "TotalVariation",
    "gram",
    "photo",
]
