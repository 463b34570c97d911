"""Where interchanges take their values from: runs, as they are or as they were saved."""

from typing import Any

from torch import Tensor

from fmr.edits.layouts import unpacked
from fmr.edits.places import Part, is_whole, parts
from fmr.errors import EditError, IdError
from fmr.ids import Site
from fmr.runs.passes import Pass
from fmr.runs.run import Run


def read_source(
    origin: Any, site: Site, number: int, examples: tuple[int, ...] | None, gradient: bool, within: bool
) -> Tensor:
    """What a run holds at a site, or its gradient: in the pass of the same number where it has several.

    `within`: calls inside the edited pass told of its padding, and so must those of the source.
    """
    if not isinstance(origin, (Run, Pass)):
        raise EditError(
            f"The source of an Interchange at {site!r} is {type(origin).__name__}, expected a run: "
            f"edits.Interchange(fmr.run(model, *other_inputs))."
        )
    if isinstance(origin, Run) and 1 < len(origin.passes) <= number:
        raise EditError(
            f"The source of the Interchange at {site!r} has {len(origin.passes)} passes, and this is pass {number}. "
            f"Expected one for each, or one pass for all: edits.Interchange(source.passes[0])."
        )
    one = origin if isinstance(origin, Pass) else origin.passes[number if 0 <= number < len(origin.passes) else -1]
    if examples is not None and site.examples is None:
        site = site.at(examples=list(examples))
    try:
        whole = unpacked(site, one.grad[Site(site.id)] if gradient else one[Site(site.id)])
    except IdError as error:
        raise EditError(f"The source of the Interchange at {site!r} does not hold it: {error}") from error
    frames = one.frames()
    if within and site.positions is not None and getattr(one.columns, "is_open", True):
        raise EditError(
            f"The source of the Interchange at {site!r} does not know which of its tokens are real: calls inside the model "
            f"tell, and it did not hear them. Expected a run with everything recorded, "
            f"edits.Interchange(fmr.run(model, *inputs)), or inputs that the model itself names: attention_mask=..."
        )
    found: list[Part] = parts(site, whole, frames)
    if len(found) != 1:
        raise EditError(
            f"The source of the Interchange at {site!r} has shape {tuple(whole.shape)} there, in which it means "
            f"{len(found) or 'no'} parts. Expected positions that each example of the source has, as many in each: name "
            f"them with edits.Interchange(source, at=site)."
        )
    if not is_whole(site, found[0]):
        raise EditError(
            f"The source of the Interchange at {site!r} has shape {tuple(whole.shape)} there, and not all of these "
            f"positions. Expected each of them: name those to read with edits.Interchange(source, at=site)."
        )
    return found[0].of(whole)
