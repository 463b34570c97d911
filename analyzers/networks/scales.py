"""What normalisations multiply each unit by."""

from collections.abc import Callable

from torch import Tensor

from analyzers.protocol import AnalyzerError
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.proof.evaluate import plain

OVER_UNITS = frozenset("layer_norm rms_norm normalize".split())
"""Normalisations after which nothing is left of a scale that all units shared before."""

_WEIGHT_AT = {"batch_norm": 3, "instance_norm": 3, "layer_norm": 2, "group_norm": 2, "rms_norm": 2}
"""Where the weight stands among the arguments."""


def norm_scale(node: Node, value: Callable[[TensorId], Tensor]) -> Tensor | None:
    """What a normalisation multiplies each unit by, whatever the data."""
    weight = node.parent("weight", _WEIGHT_AT.get(node.op))
    scale = plain(value(weight.id)).detach().double().abs().cpu() if weight is not None else None
    if node.op == "batch_norm":
        variance = node.parent("running_var", 2)
        if variance is None or node.argument("training", 5, False):
            raise AnalyzerError(
                f"{node.id} normalises by the statistics of its batch, which is no scale of the model. Expected a model "
                f"in eval mode: call model.eval(), or fold='none' to leave scales out."
            )
        spread = (value(variance.id).detach().double().cpu() + node.argument("eps", 7, 1e-5)).sqrt()
        scale = (1.0 if scale is None else scale) / spread
    if scale is None or node.op in OVER_UNITS:
        return scale
    return scale.reshape(-1, *[1] * (len(node.shape) - 2))
