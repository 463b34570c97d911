"""What the dimensions of a value count, where an edit must know: units of a subspace, what sources repeat, packed heads."""

from torch import Tensor

from fmr.errors import EditError
from fmr.ids import Site


def units_of(site: Site, axes: tuple[str, ...], value: Tensor) -> int:
    """The dimension of a value whose numbers make a vector, for what acts within a subspace of these.

    Four dimensions may be heads by positions or channels by rows and columns: where nothing says which, it is an error.
    """
    if site.layout is None and "heads" in axes:
        raise EditError(
            f"{site!r} holds four dimensions, and nothing says which of them is that of the subspace's vectors. Name all: "
            f"fmr.Site({str(site.id)!r}, layout=('examples', 'units', 'rows', 'columns')) for an image."
        )
    return axes.index("units") if "units" in axes else value.dim() - 1


def check_alike(site: Site, axes: tuple[str, ...], taken: Tensor, value: Tensor, within: bool) -> None:
    """Raise where a source has one of what a site has several of, but for an example that is there for all; `within` a
    subspace the units are the last dimension."""
    if within and "units" in axes:
        axes = (*(axis for axis in axes if axis != "units"), "units")
    for axis, theirs, own in zip(axes, taken.shape, value.shape, strict=False) if taken.dim() == value.dim() else ():
        if theirs == 1 != own and axis not in ("examples", "units"):
            raise EditError(
                f"Interchange at {site!r} brings shape {tuple(taken.shape)}, one of its {axis}, where the site holds {own}. "
                f"Expected as many: name those to read with edits.Interchange(source, at=site)."
            )


def unpacked(site: Site, value: Tensor) -> Tensor:
    """A value with a dimension for each of its heads: in a step of one query some kernels lay those that share keys out as
    its positions, (examples, 2, 4, units) for 8 heads that share 2."""
    layout, shape = site.layout or (), value.shape
    heads = layout.index("heads") if "heads" in layout and len(layout) == len(shape) else -1
    packed = heads >= 0 and site.n_heads is not None and layout[heads + 1 : heads + 2] == ("positions",)
    if packed and shape[heads] < site.n_heads == shape[heads] * shape[heads + 1]:  # type: ignore[operator]
        return value.flatten(heads, heads + 1).unsqueeze(heads + 1)
    return value
