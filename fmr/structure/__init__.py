"""Finding the parts of a model in its graph: matchers, certificates, and `locate`, which runs them."""

from fmr.structure.locate import locate

__all__ = ["locate"]
