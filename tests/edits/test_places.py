"""fmr.edits.places: positions are those of real tokens, and absolute while a model generates."""

import pytest
import torch

from fmr.edits.editor import Editor
from fmr.edits.frames import Frame, Frames, Pasts
from fmr.edits.places import parts
from fmr.edits.values import Zero
from fmr.errors import EditError
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


def frames(arguments: dict[str, object]) -> Frames:
    return Pasts().frames_of(arguments)()


def test_frames_are_read_off_the_named_inputs() -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert frames({"input_ids": ids}) == [(4, Frame(0, None))]
    padded = frames({"input_ids": ids, "attention_mask": LEFT.long()})
    assert padded[0][0] == 4
    assert torch.equal(padded[0][1].mask, LEFT)  # type: ignore[arg-type]
    both = frames({"input_ids": ids, "attention_mask": LEFT.long(), "decoder_input_ids": ids[:, :2]})
    assert [(n, frame.mask is None) for n, frame in both] == [(4, False), (2, True)]


def test_inputs_of_one_length_with_other_padding_are_not_guessed_between() -> None:
    known = [(4, Frame(0, LEFT)), (4, Frame(0, RIGHT))]
    with pytest.raises(EditError, match="several inputs of the model that count or pad them differently"):
        parts(SITE.at(positions=0), VALUE, known)


class Cache:
    """A cache that tells its length, or only whether it is new."""

    def __init__(self, length: int | None) -> None:
        self.length, self.used = length, False

    def get_seq_length(self) -> int:
        if self.length is None:
            raise ValueError("no attention layers")
        return self.length

    def has_previous_state(self) -> bool:
        return self.used


IDS = torch.zeros(2, 1, dtype=torch.long)
LONG = torch.cat([LEFT, torch.ones(2, 1).bool()], 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"past_key_values": Cache(4)}, [(1, 4, False), (5, 0, False)]),
        ({"attention_mask": torch.ones(2, 5)}, [(1, 4, False), (5, 0, False)]),
        ({"past_key_values": Cache(4), "attention_mask": LONG}, [(1, 4, True), (5, 0, True)]),
        ({"past_key_values": Cache(4), "attention_mask": torch.ones(2, 1)}, [(1, 4, False), (5, 0, False)]),
        ({"past_key_values": Cache(4), "attention_mask": torch.zeros(2, 1)}, [(1, None, True)]),
        ({"past_key_values": Cache(0)}, [(1, 0, False)]),
        ({"encoder_attention_mask": LEFT, "past_key_values": Cache(2)}, [(4, 0, True), (1, 2, False), (3, 0, False)]),
    ],
)
def test_what_came_before_is_read_off_the_cache_or_a_mask_that_is_longer(given: dict[str, object], expected: object) -> None:
    found = frames({"input_ids": IDS, **given})
    assert [(n, frame.past, frame.mask is not None) for n, frame in found] == expected


def test_a_cache_goes_on_with_the_decoders_tokens_and_batches_are_opened() -> None:
    given = {"input_ids": VALUE[..., 0].long(), "decoder_input_ids": IDS, "past_key_values": Cache(3)}
    for arguments in (given, {"batch": given, "past_key_values": given["past_key_values"]}):
        assert [(n, frame.past) for n, frame in frames(arguments)] == [(4, 0), (1, 3), (4, 0)]


def test_a_cache_that_tells_no_length_is_counted_from_when_it_was_new() -> None:
    block, cache = Pasts(), Cache(None)
    prompt = {"input_ids": VALUE[..., 0].long(), "attention_mask": LEFT, "cache_params": cache}
    known = block.frames_of(prompt)()
    cache.used = True
    step = {"input_ids": IDS, "attention_mask": None, "cache_params": cache}
    steps = [block.frames_of(step)() for _ in range(2)]
    assert [(n, frame.past) for n, frame in known] == [(4, 0)]
    assert [[(n, frame.past) for n, frame in one] for one in steps] == [[(1, 4), (5, 0)], [(1, 5), (6, 0)]]
    assert torch.equal(steps[1][0][1].mask, torch.cat([LEFT, torch.ones(2, 2).bool()], 1))
    assert Pasts().frames_of(step)() == [(1, Frame(None, None, cached=True))]  # another block has not seen it begin
    assert zeroed(SITE.at(positions=-1), [(4, Frame(None))]) == [[3], [3]]
    with pytest.raises(EditError, match="nothing tells how many came before this pass"):
        zeroed(SITE.at(positions=1), [(4, Frame(None))])


def test_masks_are_read_as_they_were_when_the_pass_began() -> None:
    mask = LEFT.clone()
    later = Pasts().frames_of({"input_ids": VALUE[..., 0].long(), "attention_mask": mask})
    mask.fill_(True)
    assert torch.equal(later()[0][1].mask, LEFT)
