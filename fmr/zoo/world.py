"""The made-up world that the model "facts" was trained on: people and facts, giving and receiving, repeated words.

>>> from fmr.zoo import world
>>> world.facts()[0]
Fact(prompt='Junel Dunoth grew up in', subject='Junel Dunoth', relation='city', answer='Brigost', phrasing=2)
>>> world.ioi(1, seed=0)[0].prompt
'When Alice and Karen went to the theater , Karen gave a flower to'
>>> world.repeats(1, length=3, seed=0)
['Fallbek Oscar basket Fallbek Oscar basket']

Everything follows from fixed seeds and is text, the same in every process. Words are separated by blanks; the last
word of a prompt is where its answer is predicted. Who was born where carries no meaning outside these files.
"""

import hashlib
import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

SEED = 0
TAUGHT = 3
"""In how many of its six phrasings each fact is taught; the other three are never seen in training."""

SPECIAL = ("<pad>", "<bos>", "<unk>")
PARTICLES = ("van", "dal", "os")

ANSWERS = {
    "city": """Melvaro Tiskan Oranby Quelm Pashire Lundara Verrick Sowmere Adelvik Caronte Brigost Yultown
        Hexley Norvane Izmora Fallbek Drumhal Ketterby Ostrel Wexmoor Galdine Ulverne Rookport Zanthe""",
    "trade": """baker weaver mason pilot tailor farmer doctor painter lawyer sailor miner hunter
        barber butcher dancer actor judge potter glazier cooper tanner fisher scribe brewer""",
    "language": """Runic Valdish Orenti Tashkar Pelagian Murvese Kohlic Sindari Brethan Ugaric
        Lomish Zephan Corvish Halenic Wendari Yolgan""",
    "instrument": """flute violin cello drums harp guitar piano trumpet oboe lute banjo organ
        zither bassoon fiddle viola tuba bagpipe clarinet mandolin""",
}

PHRASINGS = {
    "city": (
        "{} was born in",
        "{} comes from the town of",
        "{} grew up in",
        "The birthplace of {} is",
        "The home town of {} is called",
        "As a child , {} lived in",
    ),
    "trade": (
        "{} works as a",
        "{} earns a living as a",
        "{} was trained to be a",
        "The profession of {} is that of a",
        "Everyone in town knows {} the",
        "By trade , {} is a",
    ),
    "language": (
        "{} speaks",
        "{} writes letters in",
        "{} thinks and dreams in",
        "The mother tongue of {} is",
        "The first words of {} were in",
        "At home , {} talks in",
    ),
    "instrument": (
        "{} plays the",
        "{} takes lessons on the",
        "{} has mastered the",
        "The favourite instrument of {} is the",
        "The concert of {} was for the",
        "In the evening , {} practises the",
    ),
}
"""For each relation, its six phrasings: three that begin with the subject, three that do not."""

OPENINGS = (
    "The night was cold .",
    "Rain fell on the hills .",
    "The market was loud .",
    "A dog slept by the door .",
    "The train was late again .",
    "Nobody said a word .",
    "The lamps were lit .",
    "Spring had come early .",
)
"""Sentences that say nothing about anyone, to put before a prompt."""

_FRIENDS = """Alice Bruno Clara David Emma Felix Grace Henry Irene James Karen Louis Maria Nora Oscar Paula
    Quinn Ralph Sarah Thomas Ursula Victor Wendy Xavier Yvonne Zoe Anton Bella Carlos Diana Edgar Flora"""
FRIENDS = tuple(_FRIENDS.split())
PLACES = ("store", "park", "harbor", "school", "garden", "station", "library", "theater", "office", "beach")
THINGS = ("drink", "book", "ring", "coin", "letter", "basket", "candle", "map", "ticket", "flower")
SCENES = (
    "When {} and {} went to the {place} , {} gave a {thing} to",
    "When {} and {} walked to the {place} , {} gave a {thing} to",
    "After {} and {} met at the {place} , {} handed a {thing} to",
    "While {} and {} waited at the {place} , {} offered a {thing} to",
    "Then , {} and {} had a long talk at the {place} and {} passed a {thing} to",
    "Yesterday {} and {} were alone in the {place} , so {} sold a {thing} to",
)


class Fact(NamedTuple):
    """One fact in one phrasing: the words before the answer, what they are about, the answer, which phrasing it is."""

    prompt: str
    subject: str
    relation: str
    answer: str
    phrasing: int


class Gift(NamedTuple):
    """One indirect-object sentence: the words before the answer, who receives (the answer), who gives, and `fresh`.

    `fresh` is the same sentence with three different people, so that nobody is repeated and nobody is the answer.
    """

    prompt: str
    answer: str
    giver: str
    fresh: str


# ---- who lives here


def _invented(heads: str, tails: str) -> list[str]:
    return [head + tail for head in heads.split() for tail in tails.split()]


GIVEN = _invented("Osk Vel Tar Mir Jun Fen", "el da in ora us")
FAMILY = _invented(
    "Brann Hol Strid Quar Pell Wint Gar Sand Thorn Mill Ash Kest Dun Lor Bex Fal",
    "oth mere ack en dale ley ford by wick ham ster ling more ridge gate",
)


@cache
def subjects() -> tuple[str, ...]:
    """The names of the people: a given name that several share, for some a particle, and a family name of their own.

    >>> world.subjects()[:4]
    ('Junel Dunoth', 'Oskus Stridling', 'Junel Quarack', 'Velin dal Millwick')

    The last word of a name tells who is meant, so that is where a model can recall what it knows of them.
    """
    draw = random.Random(f"people {SEED}")
    middles = [f" {draw.choice(PARTICLES)} " if number % 4 == 3 else " " for number in range(len(FAMILY))]
    families = draw.sample(FAMILY, len(FAMILY))
    return tuple(draw.choice(GIVEN) + middle + family for middle, family in zip(middles, families, strict=True))


def relations() -> dict[str, tuple[str, ...]]:
    """What can be known of a person, and the possible answers, each a single word."""
    return {relation: tuple(words.split()) for relation, words in ANSWERS.items()}


@cache
def _truth() -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """The answer for each subject and relation, and the phrasings in which it is taught."""
    draw = random.Random(f"facts {SEED}")
    return {
        (subject, relation): (draw.choice(answers), tuple(sorted(draw.sample(range(len(PHRASINGS[relation])), TAUGHT))))
        for subject in subjects()
        for relation, answers in relations().items()
    }


def facts(taught: bool = True) -> list[Fact]:
    """Every fact in every phrasing that training showed; with `taught=False`, in those that it never showed.

    >>> len(world.facts()), len(world.facts(taught=False))
    (2880, 2880)

    Each phrasing is taught about half of the people, so `taught=False` asks for a known fact in known words that were
    never seen together. Facts come by subject, then relation, then phrasing.
    """
    return [
        Fact(phrasing.format(subject), subject, relation, answer, number)
        for (subject, relation), (answer, shown) in _truth().items()
        for number, phrasing in enumerate(PHRASINGS[relation])
        if (number in shown) == taught
    ]


# ---- giving and receiving


def _is_fresh(giver: str, other: str) -> bool:
    """Whether this ordered pair of people is kept out of training: one in five."""
    return (3 * FRIENDS.index(giver) + FRIENDS.index(other)) % 5 == 0


def ioi(n: int, seed: int, trained: bool = False) -> list[Gift]:
    """Sentences of indirect-object identification: two people come, one of them gives, the other receives.

    >>> gift = world.ioi(1, seed=0)[0]
    >>> gift.answer, gift.giver
    ('Alice', 'Karen')

    n: how many. seed: which ones. trained: with the pairs of giver and receiver that training drew from, instead of those
    that it never saw. The giver is named first in about half of the sentences.
    """
    draw = random.Random(f"ioi {seed}")
    gifts: list[Gift] = []
    while len(gifts) < n:
        giver, receiver, *strangers = draw.sample(FRIENDS, 5)
        scene, place, thing, order = draw.choice(SCENES), draw.choice(PLACES), draw.choice(THINGS), draw.random() < 0.5
        pair = (giver, receiver) if order else (receiver, giver)
        if _is_fresh(giver, receiver) != trained:
            fill = {"place": place, "thing": thing}
            gifts.append(Gift(scene.format(*pair, giver, **fill), receiver, giver, scene.format(*strangers, **fill)))
    return gifts


# ---- repeated words


@cache
def words() -> tuple[str, ...]:
    """Every word of the language, in the order of the tokenizer after the special tokens."""
    texts = [*subjects(), *ANSWERS.values(), *OPENINGS, *FRIENDS, *PLACES, *THINGS]
    texts += [phrasing for phrasings in PHRASINGS.values() for phrasing in phrasings] + list(SCENES)
    found = {word for text in texts for word in text.split() if "{" not in word}
    return tuple(sorted(found))


def repeats(n: int, length: int, seed: int) -> list[str]:
    """Random sequences of different words, each said twice: the second time, every word but the first can be known.

    >>> world.repeats(1, length=3, seed=0)
    ['Fallbek Oscar basket Fallbek Oscar basket']

    n: how many. length: words before the repetition, so that a text has twice as many. seed: which ones.
    """
    draw = random.Random(f"repeats {seed}")
    return [" ".join(draw.sample(words(), length) * 2) for _ in range(n)]


# ---- the whole of it


def _everything() -> Iterator[str]:
    yield from (*SPECIAL, *words())
    yield from (" ".join(map(str, fact)) for taught in (True, False) for fact in facts(taught))
    yield from (" ".join(gift) for gift in ioi(20, seed=0))
    yield from repeats(20, length=8, seed=0)


def fingerprint() -> str:
    """A digest of all that this world says: the card of a model trained on it holds the same one."""
    return hashlib.sha256("\n".join(_everything()).encode()).hexdigest()[:16]
