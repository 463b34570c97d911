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
