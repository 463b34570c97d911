"""What may be set in the configuration of a trained model: what its weights leave open."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fmr.errors import ZooError, nearest

_OPEN = tuple("output_ return_ use_cache dropout pdrop dropout_prob token_id dtype attn_implementation".split())
"""Settings by how their names begin or end that leave what was trained as it is."""

_LOADING = ("attn_implementation", "dtype", "torch_dtype")
"""Settings that no configuration lists."""


@contextmanager
def fitting(name: str, known: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[None]:
    """Build a model with settings; one that was trained with another value, one that its configuration does not know and
    what transformers refuses are a `ZooError`."""
    for key, value in config.items():
        trained = known.get(key, value)
        if key not in known and key not in _LOADING:
            raise ZooError(f"The configuration of {name} has no {key!r}.{nearest(key, known)}")
        if value != trained and not key.startswith(_OPEN) and not key.endswith(_OPEN):
            raise ZooError(
                f"{name} was trained with {key}={trained!r}, and with {key}={value!r} its weights mean something else. "
                "Expected settings that change no number of the model, such as attn_implementation='eager'."
            )
    try:
        yield
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not config:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in config.items())
        why = " ".join(str(error).split())[:300]
        raise ZooError(f"{name} cannot be loaded with {given}; transformers says: {why}. Load it without that.") from error
