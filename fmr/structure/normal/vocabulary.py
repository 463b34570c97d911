"""The vocabulary of the matchers: sets of ops that move, reshape, repeat, mask, bend or sum up what passes through.

A new idiom is usually one word in one of these sets; the certificates tell whether the new reading is true.
"""

from fmr.ids import RESULT
from fmr.ops.names import OF_SHAPES

SAME = frozenset([RESULT, *"alias clone contiguous data detach dropout alpha_dropout feature_dropout nan_to_num to".split()])
"""Ops that hand on the same numbers, up to a cast, a copy or dropout; a fused op hands on what its inner nodes made."""

SHAPE = frozenset(
    """T as_strided as_subclass broadcast_tensors broadcast_to cat chunk column_stack copy diagonal dstack expand expand_as
    flatten flip gather getitem hstack index_add index_put index_select mT masked_select movedim narrow new_zeros pad
    pad_sequence permute pixel_shuffle ravel repeat repeat_interleave reshape reshape_as roll scatter scatter_add select
    setitem split split_with_sizes squeeze stack t take_along_dim tensor_split tile transpose unbind unflatten unfold
    unsqueeze view view_as vstack zeros_like""".split()
)
"""Ops that only move numbers about, or add up those that meet."""

MOVES = SAME | SHAPE
"""Ops after which the numbers are the same ones, wherever they lie."""

VIEWS = frozenset("view reshape unflatten".split())
"""Ops that lay numbers out in sizes that they are given."""

RESHAPES = VIEWS | frozenset("flatten ravel view_as reshape_as".split())
"""Ops that lay the same numbers, in the same order, out in another shape."""

LAID_OUT = SAME | RESHAPES | frozenset("transpose mT t T permute movedim squeeze unsqueeze".split())
"""Ops that hand on all numbers of a value, laid out otherwise at most."""

EMPTY = OF_SHAPES - {"new_tensor"}
"""Ops that take a shape alone."""

REPEATS = frozenset("expand expand_as broadcast_to repeat repeat_interleave tile".split())
"""Ops that repeat numbers along a dimension."""

CLAMPS = frozenset("clamp clamp_min clamp_max".split())
"""Ops that keep numbers within bounds."""

MASKING = CLAMPS | frozenset("add sub mul div masked_fill where tanh maximum max minimum min tril triu".split())
"""Elementwise ops that scale, bias, cap or mask attention scores."""

NONLINEAR = CLAMPS | frozenset(
    """celu elu erf exp expm1 gelu glu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid logsigmoid mish pow prelu relu
    relu6 rrelu selu sigmoid silu softplus softsign sqrt square tanh max maximum min minimum
    abs rsqrt round floor ceil sign gt ge lt le eq ne sin cos amax amin threshold hardshrink softshrink tanhshrink""".split()
)
"""Elementwise ops that bend their input."""

ELEMENTWISE = NONLINEAR | MASKING | frozenset("neg log1p log reciprocal".split())
"""Ops that work number by number."""

NORMS = frozenset("layer_norm rms_norm group_norm batch_norm instance_norm normalize".split())
"""Normalisations that are one op."""

STATISTICS = frozenset("mean var std var_mean norm vector_norm".split())
"""What is told of many numbers: how large they are, and how far apart."""

NORM_PARTS = STATISTICS | CLAMPS | frozenset("to pow add rsqrt sqrt mul div sub square reciprocal sum".split())
"""What a normalisation written out is made of."""

MEANS = frozenset("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split())
"""Means over a window, for each channel."""

CONVOLUTIONS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d".split())
"""Contractions with a window: over the channels, for each position."""

CELLS = frozenset("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())
"""Recurrent layers, and steps of them, that are one op."""
