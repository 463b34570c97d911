"""What is said of an attention: the values that it is made of, and how they are laid out."""

from dataclasses import dataclass, field, replace

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.structure.attention.halves import Half
from fmr.structure.proof.certificate import Certificate


@dataclass(frozen=True, eq=False)
class Claim:
    """What is said of an attention, as `Attention` tells users."""

    graph: Graph = field(repr=False)
    softmax: TensorId
    q: Site
    k: Site
    v: Site
    scores: Site
    pattern: Site
    z: Site
    out: Site | None
    n_heads: int
    n_kv_heads: int
    head_dim: int
    kind: str
    scope: str
    dim: int = -1
    path: tuple[TensorId, ...] = ()
    certified: Certificate | None = None
    index: int | None = None
    minus: Half | None = None

    @property
    def halves(self) -> "tuple[Claim, Claim]":
        """What is said of the two softmaxes of a differential attention, with all the heads of each."""
        assert self.minus is not None
        second = {name: getattr(self.minus, name) for name in ("softmax", "q", "k", "scores", "pattern", "dim")}
        return self._whole(), replace(self, **second)._whole()

    def _whole(self) -> "Claim":
        """The same of all heads of a softmax, where these are some."""
        if self.q.heads is None:
            return replace(self, minus=None)
        every = {name: replace(getattr(self, name), heads=None) for name in ("q", "k", "scores", "pattern")}
        number = self.q.n_heads or 1
        n_kv_heads = self.n_kv_heads * number // self.n_heads
        return replace(self, **every, n_heads=number, n_kv_heads=n_kv_heads, minus=None)
