"""The same work on many devices, by Ray. Under torchrun, `over` of an analyzer and `fmr.collect` take `ranks=True`."""

from analyzers.scale.by_ray import collect, over

__all__ = ["collect", "over"]
