"""Sentences to try an analyzer on, where no data set is at hand."""

from importlib.resources import files


def sentences() -> list[str]:
    """About three hundred short English sentences: facts, dialogue, questions, lists, and pronouns with their names.

    >>> sentences()[0]
    'The river froze before the first snow fell.'

    They are original and fixed, so that numbers measured on them can be had again.
    """
    return files("analyzers").joinpath("data/sentences.txt").read_text(encoding="utf-8").splitlines()
