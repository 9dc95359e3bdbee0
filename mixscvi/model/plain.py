"""Values without code: what may stand in a model's file, and back.

A file that holds nothing but numbers, texts, tensors, lists and dictionaries can be read without
running anything. Whatever else a model keeps (arrays, tables of its history, an activation of
torch) is turned into those, with a note for each that says where it stood and what it was. The
values alone still read as what they are: an array of batches is a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mixscvi.mixture import GaussianMixture, StandardNormal

__all__ = ["LEFT_OUT", "from_plain", "to_plain"]

LEFT_OUT = "left out"
"""Kind of note of a value that a file cannot hold: an instance or a function of the user's own."""

_FUNCTIONS = {
    **{name: getattr(torch, name) for name in ("exp", "relu", "sigmoid", "tanh")},
    **{
        name: getattr(nn.functional, name)
        for name in ("elu", "gelu", "leaky_relu", "relu", "selu", "silu", "softplus")
    },
}
_ACTIVATIONS = {
    name: activation
    for name, activation in vars(nn.modules.activation).items()
    if isinstance(activation, type)
    and issubclass(activation, nn.Module)
    and name not in ("MultiheadAttention", "PReLU")  # these have parameters
}
_MOST_NUMBERS = 2**27


def to_plain(
    value: Mapping, may_leave_out: Callable[[list], bool] = lambda path: False
) -> tuple[dict, list[list]]:
    """Turn a dictionary into plain values.

    Parameters
    ----------
    value
        What to store.
    may_leave_out
        Whether a value that cannot be stored may be left out, by its path in `value`.

    Returns
    -------
    The plain values, and notes `[path, kind, detail]` of what they were.

    Raises
    ------
    TypeError
        If a value can neither be stored nor left out.

    Examples
    --------
    >>> import numpy as np
    >>> to_plain({"batches": np.array(["CTRL", "STIM"], dtype=object)})
    ({'batches': ['CTRL', 'STIM']}, [[['batches'], 'array', {'dtype': 'object', 'shape': [2]}]])
    """
    notes: list[list] = []
    return _Encoder(notes, may_leave_out).encode(value, []), notes


class _Encoder:
    """Walks through nested values; notes of the inner ones come before those of the outer."""

    def __init__(self, notes: list[list], may_leave_out: Callable[[list], bool]) -> None:
        self.notes = notes
        self.may_leave_out = may_leave_out

    def encode(self, value: Any, path: list) -> Any:
        if isinstance(value, Enum):
            value = value.value
        if isinstance(value, np.generic) and value.dtype.kind in "biufUS":
            value = value.item()
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        for simple in (str, int, float):
            if isinstance(value, simple):
                return simple(value)
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, Mapping):
            names = [key.item() if isinstance(key, np.generic) else key for key in value]
            return {
                name: self.encode(item, [*path, name])
                for name, item in zip(names, value.values(), strict=True)
            }
        if isinstance(value, list):
            return self._items(value, path)
        found = _describe(value)
        if found is None:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            if not self.may_leave_out(path):
                where = "".join(f"[{key!r}]" for key in path)
                raise TypeError(
                    f"a model's file holds no Python objects, got a {kind} at {where}: turn it "
                    "into numbers, texts, arrays or tables, or delete it"
                )
            self.notes.append([path, LEFT_OUT, kind])
            return None
        kind, content, detail = found
        content = (
            self._items(content, path)
            if isinstance(content, list)
            else (self.encode(content, path))
        )
        self.notes.append([path, kind, detail])
        return content

    def _items(self, items: list, path: list) -> list:
        return [self.encode(item, [*path, i]) for i, item in enumerate(items)]


def _describe(value: Any) -> tuple[str, Any, Any] | None:
    """Kind, content (encoded next) and plain detail of a value that has a kind."""
    match value:
        case tuple():
            return "tuple", list(value), None
        case set() | frozenset():
            return "set", list(value), None
        case np.ndarray():
            detail = {"dtype": str(value.dtype), "shape": list(value.shape)}
            if value.dtype.kind in "mM":
                return "array", torch.from_numpy(value.astype("int64")), detail
            if value.dtype.kind in "biuf":
                native = np.array(value, dtype=value.dtype.newbyteorder("="))
                return "array", torch.from_numpy(native), detail
            return "array", value.ravel().tolist(), detail
        case pd.DataFrame():
            columns = [np.asarray(value.iloc[:, i]) for i in range(value.shape[1])]
            return "table", {"index": value.index, "names": value.columns, "values": columns}, None
        case pd.Series():
            content = {"index": value.index, "name": value.name, "values": np.asarray(value)}
            return "series", content, None
        case pd.Index():
            return "index", {"name": value.name, "values": np.asarray(value)}, None
        case pd.Timestamp() | pd.Timedelta():
            return type(value).__name__.lower(), value.isoformat(), None
        case pd.Interval():
            content = {"left": value.left, "right": value.right, "closed": value.closed}
            return "interval", content, None
        case GaussianMixture() if type(value) is GaussianMixture:
            n_components, n_latent = value.loc.shape
            return "prior", {"n_latent": n_latent, "n_components": n_components}, "GaussianMixture"
        case StandardNormal() if type(value) is StandardNormal:
            return "prior", {"n_latent": len(value.loc)}, "StandardNormal"
        case type() if value.__name__ in _ACTIVATIONS and value is _ACTIVATIONS[value.__name__]:
            return "activation class", value.__name__, None
        case nn.Module() if type(value) in _ACTIVATIONS.values() and not [*value.parameters()]:
            given = {name: getattr(value, name) for name in getattr(value, "__constants__", ())}
            return "activation", given, type(value).__name__
    for name, function in _FUNCTIONS.items():
        if value is function:
            return "function", name, None
    return None


def _make_array(content: Any, detail: dict) -> np.ndarray:
    dtype = np.dtype(detail["dtype"])
    if dtype.kind in "SUV" and dtype.itemsize * len(content) > _MOST_NUMBERS:
        raise ValueError(f"an array of {len(content)} texts has the type {dtype}")
    if isinstance(content, Tensor):
        flat = content.numpy().ravel()
        flat = flat.astype("int64").view(dtype) if dtype.kind in "mM" else flat.astype(dtype)
    elif dtype.kind == "O":
        flat = np.empty(len(content), dtype=object)
        for i, item in enumerate(content):
            flat[i] = item
    else:
        flat = np.array(content, dtype=dtype)
    return flat.reshape(detail["shape"])


def _make_table(content: dict) -> pd.DataFrame:
    columns = dict(enumerate(content["values"]))
    table = pd.DataFrame(columns, index=content["index"])
    table.columns = content["names"]
    return table


def _make_prior(content: dict, name: str) -> nn.Module:
    n_numbers = content["n_latent"] * content.get("n_components", 1)
    if n_numbers > _MOST_NUMBERS:
        raise ValueError(f"a prior of {content} has {n_numbers} numbers")
    return _PRIORS[name](**content)


_PRIORS = {"GaussianMixture": GaussianMixture, "StandardNormal": StandardNormal}
# Everything that a file can make: none of it runs anything of the file's.
_MAKERS: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda content, _: tuple(content),
    "set": lambda content, _: set(content),
    "array": _make_array,
    "table": lambda content, _: _make_table(content),
    "series": lambda content, _: pd.Series(
        content["values"], index=content["index"], name=content["name"]
    ),
    "index": lambda content, _: pd.Index(content["values"], name=content["name"]),
    "timestamp": lambda content, _: pd.Timestamp(content),
    "timedelta": lambda content, _: pd.Timedelta(content),
    "interval": lambda content, _: pd.Interval(**content),
    "prior": _make_prior,
    "activation class": lambda content, _: _ACTIVATIONS[content],
    "activation": lambda content, name: _ACTIVATIONS[name](**content),
    "function": lambda content, _: _FUNCTIONS[content],
}


def from_plain(plain: dict, notes: list[list]) -> Iterator[tuple[list, str]]:
    """Turn plain values back, in place.

    Parameters
    ----------
    plain, notes
        As :func:`to_plain` returns them.

    Yields
    ------
    Path and type of each value that was left out.

    Raises
    ------
    KeyError, IndexError, TypeError, ValueError
        If notes and values do not belong together.

    Examples
    --------
    >>> import numpy as np
    >>> plain, notes = to_plain({"batches": np.array(["CTRL", "STIM"], dtype=object)})
    >>> list(from_plain(plain, notes))
    []
    >>> plain
    {'batches': array(['CTRL', 'STIM'], dtype=object)}
    """
    for path, kind, detail in notes:
        if kind == LEFT_OUT:
            yield path, detail
            continue
        *outer, last = path
        holder = plain
        for key in outer:
            holder = holder[key]
        holder[last] = _MAKERS[kind](holder[last], detail)
