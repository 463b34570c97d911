"""Subspaces of what a site holds: where an edit acts `within=` one, the rest of the value stays as it is.

>>> from fmr import edits, subspaces
>>> rotation = subspaces.Rotation(128, 16)
>>> fmr.run(model, input_ids, edits={site: edits.Interchange(source_ids, within=rotation)})
"""

from fmr.subspaces.fixed import Basis, Latents, Units, mean_difference, pca
from fmr.subspaces.space import Part, Subspace
from fmr.subspaces.trained import Boundless, Mask, Rotation

__all__ = [
    "Basis",
    "Boundless",
    "Latents",
    "Mask",
    "Part",
    "Rotation",
    "Subspace",
    "Units",
    "mean_difference",
    "pca",
]
