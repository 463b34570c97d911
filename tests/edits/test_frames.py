"""fmr.edits.frames: what the arguments of a pass tell about its columns, and what is known of a cache from pass to pass."""

import pytest
import torch

from fmr.edits.frames import Frame, Frames, Pasts
from fmr.errors import EditError

VALUE = torch.arange(24.0).view(2, 4, 3) + 1
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()


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


def test_masks_are_read_as_they_were_when_the_pass_began() -> None:
    mask = LEFT.clone()
    later = Pasts().frames_of({"input_ids": VALUE[..., 0].long(), "attention_mask": mask})
    mask.fill_(True)
    assert torch.equal(later()[0][1].mask, LEFT)


@pytest.mark.parametrize("length", [4, 7])
def test_a_mask_of_queries_and_keys_is_that_of_a_buffer_with_room(length: int) -> None:
    ids, causal = VALUE[..., 0].long(), torch.ones(4, length).tril().bool()
    real = torch.nn.functional.pad(LEFT, (0, length - 4))
    known = frames({"input_ids": ids, "attention_mask": (causal & real[:, None])[:, None], "past_key_values": Cache(0)})
    assert [(n, frame.past) for n, frame in known] == [(4, 0)] + [(7, 0)] * (length == 7)
    assert torch.equal(known[0][1].mask, LEFT)  # type: ignore[arg-type]
    assert torch.equal(known[-1][1].mask, real)  # type: ignore[arg-type]


def test_a_single_query_is_told_by_what_was_known_of_its_cache() -> None:
    block, cache = Pasts(), Cache(0)
    prompt = {"input_ids": VALUE[..., 0].long(), "attention_mask": LEFT, "past_key_values": cache}
    block.frames_of(prompt)()
    cache.length = 4
    window = torch.tensor([0, 0, 0, 1, 1]).bool().expand(2, 1, 1, 5)
    step = {"input_ids": IDS, "attention_mask": window, "past_key_values": cache}
    assert torch.equal(block.frames_of(step)()[0][1].mask, LONG)  # type: ignore[arg-type]
    assert Pasts().frames_of(step)()[0][1].unclear.startswith("attention_mask does not tell")
    whole = {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 1, 5).bool(), "past_key_values": cache}
    assert Pasts().frames_of(whole)()[0] == (1, Frame(4, None, cached=True))


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("src_key_padding_mask", ~LEFT),
        ("src_key_padding_mask", torch.zeros(2, 4).masked_fill(~LEFT, float("-inf"))),
        ("src_attention_mask", LEFT.float()),
    ],
)
def test_masks_of_keys_say_what_is_real_or_what_is_hidden(name: str, mask: torch.Tensor) -> None:
    (found,) = frames({name: mask})
    assert found[0] == 4
    assert torch.equal(found[1].mask, LEFT)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", ["a block of masks", torch.ones(4), torch.rand(2, 1, 4, 4) + 0.5, object()])
def test_masks_of_other_forms_tell_nothing_and_say_so(mask: object) -> None:
    known = frames({"input_ids": VALUE[..., 0].long(), "attention_mask": mask})
    assert [n for n, _ in known] == [4]
    assert known[0][1].unclear.startswith("attention_mask does not tell which these are")


def test_a_mask_of_another_name_may_mean_either() -> None:
    x = VALUE[..., 0]
    (found,) = frames({"x": x, "mask": LEFT})
    assert found == (4, Frame(unclear="nothing tells whether mask is true of these or of padding"))
    for more in ({"mask": torch.ones(2, 4).bool()}, {"head_mask": LEFT[:, :3]}, {"mask": LEFT, "attention_mask": LEFT}):
        assert not any(frame.unclear for _, frame in frames({"x": x, **more}))


def test_several_calls_inside_a_pass_may_tell_as_long_as_nobody_has_asked() -> None:
    def inner(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None: ...

    columns = Pasts().frames_of({"pixels": VALUE})
    for mask in (LEFT.long(), LEFT.flip(1).long()):
        columns.hear(inner, (), {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": mask})
    assert columns()[0][0] == 4
    later = Pasts().frames_of({"pixels": VALUE})
    assert later() == []
    with pytest.raises(EditError, match="counted before a call inside it told"):
        later.hear(inner, (), {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": LEFT.long()})
