"""fmr.edits.places: positions are those of real tokens, and absolute while a model generates."""

import pytest
import torch

from fmr.edits.editor import Editor
from fmr.edits.frames import Frame
from fmr.edits.places import parts, read
from fmr.edits.values import Zero
from fmr.errors import EditError, IdError
from fmr.ids import Site

VALUE = torch.arange(24.0).view(2, 4, 3) + 1
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
RIGHT = LEFT.flip(1)


def zeroed(site: Site, known: list[tuple[int, Frame]], value: torch.Tensor = VALUE) -> list[list[int]]:
    """The columns of each example that an edit at the site sets to zero."""
    editor = Editor({site: Zero()})
    editor.begin(lambda: known)
    made = editor.apply(site.id, value)
    return [[column for column in range(value.shape[1]) if not made[e, column].any()] for e in range(len(value))]


SITE = Site("h.0/add#0")


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        (0, None, [[0], [0]]),
        (0, LEFT, [[2], [0]]),
        (-1, LEFT, [[3], [3]]),
        (-1, RIGHT, [[1], [3]]),
        ([0, 1], LEFT, [[2, 3], [0, 1]]),
        ([[1], [3]], LEFT, [[3], [3]]),
        (slice(1, None), LEFT, [[3], [1, 2, 3]]),
        (slice(None), RIGHT, [[0, 1], [0, 1, 2, 3]]),
        (3, LEFT, [[], [3]]),
    ],
)
def test_positions_count_real_tokens(positions: object, mask: torch.Tensor | None, expected: list[list[int]]) -> None:
    known = [(4, Frame(0, mask))]
    assert zeroed(SITE.at(positions=positions), known) == expected


@pytest.mark.parametrize(
    ("position", "past", "expected"),
    [(5, 5, [[0], [0]]), (4, 5, [[], []]), (8, 5, [[3], [3]]), (9, 5, [[], []]), (-1, 5, [[3], [3]])],
)
def test_positions_are_absolute_where_others_came_before(position: int, past: int, expected: list[list[int]]) -> None:
    assert zeroed(SITE.at(positions=position), [(4, Frame(past))]) == expected


def test_a_decoding_step_under_left_padding_means_each_examples_own_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    step = VALUE[:, :1]
    assert zeroed(SITE.at(positions=2), [(1, Frame(4, mask))], step) == [[0], []]
    assert zeroed(SITE.at(positions=4), [(1, Frame(4, mask))], step) == [[], [0]]


def test_other_axes_are_narrowed_as_well() -> None:
    editor = Editor({SITE.at(positions=0, units=1, examples=[0]): Zero()})
    editor.begin(lambda: [(4, Frame(0, LEFT))])
    made = editor.apply(SITE.id, VALUE)
    assert (made != VALUE).nonzero().tolist() == [[0, 2, 1]]


def test_an_edit_of_one_position_sees_no_axis_of_positions_padded_or_not() -> None:
    seen = []

    def look(value: torch.Tensor, context: object) -> torch.Tensor:
        seen.append(tuple(value.shape))
        return value

    for known in ([], [(4, Frame(0, LEFT))]):
        editor = Editor({SITE.at(positions=0): look})
        editor.begin(lambda known=known: known)
        editor.apply(SITE.id, VALUE)
    assert seen == [(2, 3), (2, 3)]


def test_inputs_of_one_length_with_other_padding_are_not_guessed_between() -> None:
    known = [(4, Frame(0, LEFT)), (4, Frame(0, RIGHT))]
    with pytest.raises(EditError, match="several inputs of the model that count or pad them differently"):
        parts(SITE.at(positions=0), VALUE, known)


def test_where_nothing_tells_what_came_before_only_places_from_the_end_are_meant() -> None:
    assert zeroed(SITE.at(positions=-1), [(4, Frame(None))]) == [[3], [3]]
    with pytest.raises(EditError, match="nothing tells how many came before this pass"):
        zeroed(SITE.at(positions=1), [(4, Frame(None))])


@pytest.mark.parametrize(
    ("positions", "frame", "expected"),
    [
        (1, Frame(0, LEFT), [[3], [1]]),
        (-1, Frame(0, RIGHT), [[1], [3]]),
        ([0, 1], Frame(0, LEFT), [[2, 3], [0, 1]]),
        ([6, 5], Frame(5), [[1, 0], [1, 0]]),
        (slice(-2, None), Frame(0, RIGHT), [[0, 1], [2, 3]]),
        (slice(9, None), Frame(0, RIGHT), [[], []]),
        (slice(9, None), Frame(), [[], []]),
    ],
)
def test_what_is_read_is_what_an_edit_is_given(positions: object, frame: Frame, expected: list[list[int]]) -> None:
    found = read(SITE.at(positions=positions), VALUE, [(4, frame)])
    wanted = torch.stack([VALUE[example, columns] for example, columns in enumerate(expected)])
    assert torch.equal(found, wanted[:, 0] if isinstance(positions, int) else wanted)


@pytest.mark.parametrize(
    ("positions", "frame", "words"),
    [
        (2, Frame(0, LEFT), "whose examples hold the positions 0 to 1, 0 to 3. Expected positions that each of them holds"),
        ([0, 2], Frame(0, LEFT), "hold the positions 0 to 1, 0 to 3"),
        (slice(1, None), Frame(0, LEFT), "as many in each: narrow it with examples="),
        (2, Frame(5), "hold the positions 5 to 8. Expected .* or read another pass"),
        (4, Frame(), r"selects positions=4, but .* expected indices below 4"),
        ([0, 4], Frame(), r"selects positions=\[0, 4\], but .* expected indices below 4"),
        (0, Frame(unclear="mask tells nothing"), "counts real tokens, and mask tells nothing"),
    ],
)
def test_positions_that_are_no_one_tensor_are_not_read(positions: object, frame: Frame, words: str) -> None:
    with pytest.raises(IdError, match=words):
        read(SITE.at(positions=positions), VALUE, [(4, frame)])
