"""What most models are."""

from tests.structure.kinds.truth import Heads, Layers


class Base(Layers):
    """A plain transformer."""


class Grouped(Layers):
    """Two key-value heads, or one."""

    def __init__(self, s):
        self.attention = lambda s: Heads(s, 2 if s.heads % 2 == 0 else 1)
        super().__init__(s)
