"""Edits: pure functions from what a site holds to what shall stand there, for `edits={site: edit}`.

>>> from fmr import edits
>>> fmr.run(model, ids, edits={block.z.at(heads=5): edits.Zero()}).receipts
"""

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
    "Mean",
    "Noise",
    "OnGradient",
    "Replace",
    "Scale",
    "Skip",
    "Subtract",
    "Zero",
]
