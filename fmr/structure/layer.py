"""One layer of a residual stream: its parts, and the stream before, between and after them."""

from dataclasses import dataclass

from fmr.errors import number_of
from fmr.ids import Site
from fmr.structure.attention.attention import Attention
from fmr.structure.memories.memory import Memory
from fmr.structure.mixers.mixer import Mixer


@dataclass(frozen=True)
class Layer:
    """One layer of a residual stream: its attentions, mixers and memories, and the stream before, between and after them.

    It is what one call of an entry of a list of modules writes to the stream; `fmr.structure.layers` says what is one where
    no list tells. `resid_mid` is None where attention and memory write at once or one of them is missing.
    """

    attentions: tuple[Attention, ...]
    mlps: tuple[Memory, ...]
    resid_pre: Site
    resid_mid: Site | None
    resid_post: Site
    mixers: tuple[Mixer, ...] = ()

    @property
    def attention(self) -> Attention | None:
        """The first attention of the layer; where it has two kinds that is self-attention, as a rule."""
        return self.attentions[0] if self.attentions else None

    @property
    def mixer(self) -> Mixer | None:
        """The first mixer of the layer: what brings positions together in it without a softmax."""
        return self.mixers[0] if self.mixers else None

    @property
    def mlp(self) -> Memory | None:
        """The last memory of the layer."""
        return self.mlps[-1] if self.mlps else None

    def __repr__(self) -> str:
        parts = [f"{a.kind} attention, {number_of(a.n_heads, 'head')} of {a.head_dim}" for a in self.attentions]
        parts += [mixer.size for mixer in self.mixers]
        parts += [number_of(m.n, "memory", "memories") for m in self.mlps]
        return " | ".join(parts) or "no attention, no memories"
