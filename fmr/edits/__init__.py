"""Edits: pure functions from what a site holds to what shall stand there, for `edits={site: edit}`.

>>> from fmr import edits
>>> fmr.run(model, input_ids, edits={block.z.at(heads=1): edits.Zero()}).receipts
Site('transformer.h.3.attn/matmul#1', heads=1): Receipt: fired 1 time, changed ... elements by ... (L2 norm)
"""

from fmr.edits.learned import LoReFT
from fmr.edits.values import (
    Add,
    Clamp,
    Context,
    Edit,
    Interchange,
    Mean,
    Noise,
    OnGradient,
    Replace,
    Scale,
    Skip,
    Subtract,
    Zero,
)

__all__ = [
    "Add",
    "Clamp",
    "Context",
    "Edit",
    "Interchange",
    "LoReFT",
    "Mean",
    "Noise",
    "OnGradient",
    "Replace",
    "Scale",
    "Skip",
    "Subtract",
    "Zero",
]
