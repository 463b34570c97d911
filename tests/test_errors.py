"""An unknown name is answered with the names that were probably meant."""

from fmr.errors import nearest


def test_the_same_op_below_the_same_place_comes_before_what_is_spelled_alike() -> None:
    known = [f"h.{n}.attn/softmix#0" for n in range(5)] + ["h.3.attn/scaled_dot_product_attention#0/softmax#0"]
    assert nearest("h.3.attn/softmax#0", known).startswith(
        " Nearest that exist: h.3.attn/scaled_dot_product_attention#0/softmax#0, h.3.attn/softmix#0, "
    )


def test_names_without_a_place_are_compared_by_their_spelling() -> None:
    assert nearest("fact", ["facts", "digits"]) == " Nearest that exist: facts."


def test_nothing_alike_is_nothing_said() -> None:
    assert nearest("h.0/softmax#0", ["zz", "y"]) == ""
