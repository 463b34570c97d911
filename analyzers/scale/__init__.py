"""The same work on many devices: counting and collecting by Ray. Under torchrun, `over` and `fmr.collect` take `ranks=True`."""

from analyzers.scale.by_ray import collect, over

__all__ = ["collect", "over"]
