"""Data frames as columns: numbers as arrays, the rest as lists of plain values with the name of their dtype."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

Take = Callable[[Any, str], Any]


def is_frame(value: Any) -> bool:
    """Whether a value is a frame or a series of pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, (pandas.DataFrame, pandas.Series))


def told_of_frame(frame: Any, take: Take, refuse: Callable[[str], Exception]) -> Any:
    """A frame or series in JSON, its columns taken one by one."""
    import pandas as pd

    kind = "series" if isinstance(frame, pd.Series) else "frame"
    table = frame.to_frame("values") if kind == "series" else frame
    if isinstance(table.index, pd.MultiIndex) or isinstance(table.columns, pd.MultiIndex):
        raise refuse("Its index has several levels; return value.reset_index()")
    labels = list(table.columns)
    return {
        "frame": {
            "kind": kind,
            "name": take(frame.name, ".name") if kind == "series" else None,
            "labels": _index(table.columns, take),
            "columns": [_column(table.iloc[:, n], f"[{label!r}]", take) for n, label in enumerate(labels)],
            "index": _index(table.index, take),
        }
    }


def _column(column: Any, at: str, take: Take) -> Any:
    import pandas as pd

    dtype = str(column.dtype)
    if type(column.dtype).__module__.startswith("numpy") and column.dtype.kind in "biufc":
        return {"dtype": dtype, "values": take(column.to_numpy(), at)}
    values = [None if one is pd.NA or one is pd.NaT else one for one in column.tolist()]
    if dtype.startswith(("datetime64", "timedelta64")):
        values = [one if one is None else str(one) for one in values]
    return {"dtype": dtype, "values": take(values, at)}


def _index(index: Any, take: Take) -> Any:
    import pandas as pd

    name = {"name": take(index.name, ".index.name")}
    if isinstance(index, pd.RangeIndex):
        return name | {"range": [index.start, index.stop, index.step]}
    return name | _column(index.to_series(), ".index", take)


def _index_of(told: dict[str, Any], give: Callable[[Any], Any]) -> Any:
    import pandas as pd

    index = pd.RangeIndex(*told["range"]) if "range" in told else pd.Index(give(told["values"]), dtype=told["dtype"])
    return index.rename(give(told["name"]))


def frame_of(told: dict[str, Any], give: Callable[[Any], Any]) -> Any:
    """The frame or series that was told of."""
    import pandas as pd

    index = _index_of(told["index"], give)
    columns = [pd.Series(give(one["values"]), index=index, dtype=one["dtype"]) for one in told["columns"]]
    if told["kind"] == "series":
        return columns[0].rename(give(told["name"]))
    frame = pd.concat(columns, axis=1) if columns else pd.DataFrame(index=index)
    frame.columns = _index_of(told["labels"], give)
    return frame
