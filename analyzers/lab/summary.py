"""What was kept, in a few words, read from its JSON alone."""

from __future__ import annotations

from typing import Any

from fmr.disk.files import decode

LONGEST = 60


def brief(told: Any, most: int = LONGEST) -> str:
    """A packed value on a line."""
    text = _brief(told)
    return text if len(text) <= most else text[: most - 3] + "..."


def _brief(told: Any) -> str:
    if not isinstance(told, dict):
        return f"{told:.6g}" if isinstance(told, float) else repr(told)
    ((kind, held),) = told.items()
    match kind:
        case "list" | "tuple" | "set":
            inside = ", ".join(map(_brief, held[:8])) + (", ..." if len(held) > 8 else "")
            return {"list": f"[{inside}]", "tuple": f"({inside})", "set": f"{{{inside}}}"}[kind]
        case "dict":
            return "{" + ", ".join(f"{_brief(key)}: {_brief(item)}" for key, item in held) + "}"
        case "tensor" | "array":
            held = held.get("tensor", held)
            return f"{kind} {held['dtype'].removeprefix('torch.')}{held['shape']}"
        case "words":
            return f"array of words{held[0]}"
        case "frame":
            return f"{held['kind']} of {len(held['columns'])} columns"
        case "picture":
            return "picture"
        case "result":
            return str(held["class"]).rpartition(".")[2]
        case "path":
            return f"Path({held!r})"
        case "code":
            return f"function {held.splitlines()[0] if held else ''}"
        case "model":
            return str(held)
    return repr(decode(told))


def leaves(told: Any, at: str = "") -> list[tuple[str, str]]:
    """The places of a packed nest, each with what stands there on a line."""
    if isinstance(told, dict):
        ((kind, held),) = told.items()
        if kind == "dict" and held:
            return [leaf for key, item in held for leaf in leaves(item, f"{at}.{_bare(key)}" if at else _bare(key))]
        if kind in ("list", "tuple") and any(isinstance(item, dict) for item in held):
            return [leaf for n, item in enumerate(held) for leaf in leaves(item, f"{at}[{n}]")]
    return [(at, brief(told, 400))]


def _bare(key: Any) -> str:
    return key if isinstance(key, str) else _brief(key)


def numbers_of(told: Any) -> dict[str, float]:
    """The numbers in a packed nest, by their places; those in tensors are left in their files."""
    found: dict[str, float] = {}
    _gather(told, "", found)
    return found


def _gather(told: Any, at: str, found: dict[str, float]) -> None:
    if isinstance(told, dict):
        ((kind, held),) = told.items()
        if kind == "dict":
            for key, item in held:
                _gather(item, f"{at}.{_bare(key)}" if at else _bare(key), found)
        elif kind in ("list", "tuple"):
            for n, item in enumerate(held):
                _gather(item, f"{at}.{n}" if at else str(n), found)
        elif kind == "float":
            found[at or "result"] = float(held)
    elif isinstance(told, (bool, int, float)):
        found[at or "result"] = float(told)
