"""Functions that give objects the content back which they have now."""

import copy
import io
import os
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def undo(value: Any) -> Callable[[], None]:
    """Returns a function that gives an object the content that it has now."""
    if isinstance(value, Tensor):
        return _undo_tensor(value)
    if isinstance(value, io.IOBase):
        return _undo_file(value)
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: _nothing(value.set_state(state))
    if isinstance(value, random.Random):
        numbers = value.getstate()
        return lambda: value.setstate(numbers)
    if isinstance(value, np.random.Generator):
        bits = copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(value.bit_generator, "state", bits)
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: np.copyto(value, array)
    if isinstance(value, list | bytearray):
        items = value[:]
        return lambda: value.__setitem__(slice(None), items)
    if isinstance(value, dict):
        return _undo_dict(value)
    if isinstance(value, set | deque):
        members = list(value)
        fill = value.extend if isinstance(value, deque) else value.update
        return lambda: _nothing((value.clear(), fill(members)))
    if isinstance(value, type):
        plain = {k: v for k, v in vars(value).items() if not k.startswith("__") and not callable(v)}
        plain = {k: v for k, v in plain.items() if not hasattr(v, "__get__")}
        return lambda: _set_all(value, plain)
    attributes = dict(vars(value))
    return lambda: _nothing((vars(value).clear(), vars(value).update(attributes)))


def _nothing(_: Any) -> None:
    """Drops a result."""


def _set_all(value: Any, attributes: dict[str, Any]) -> None:
    for name, content in attributes.items():
        if vars(value).get(name) is not content:
            setattr(value, name, content)


def _undo_dict(value: dict[Any, Any]) -> Callable[[], None]:
    """Does it past the methods of the dictionary's own class; those of an ordered one keep a list beside the items."""
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    pairs = [(key, kind.__getitem__(value, key)) for key in kind.__iter__(value)]

    def put_back() -> None:
        kind.clear(value)
        for key, content in pairs:
            kind.__setitem__(value, key, content)

    return put_back


def _undo_tensor(value: Tensor) -> Callable[[], None]:
    data = value.detach().clone()
    gradient = value.grad.clone() if value.is_leaf and value.grad is not None else None

    def put_back() -> None:
        if value.shape != data.shape or not torch.equal(value.detach(), data):
            value.data = data.clone()
        if value.is_leaf and (gradient is not None or value.grad is not None):
            value.grad = gradient

    return put_back


def _undo_file(value: io.IOBase) -> Callable[[], None]:
    """Takes an open file back to where it is now, and what was written meanwhile out of it."""
    if value.closed or not value.seekable():
        return lambda: None
    value.flush() if value.writable() else None
    place = value.tell()
    try:
        size = os.fstat(value.fileno()).st_size
    except (OSError, io.UnsupportedOperation):
        size = None  # in memory

    def put_back() -> None:
        if value.writable():
            value.flush()
            value.truncate(place) if size is None else os.ftruncate(value.fileno(), size)
        value.seek(place)

    return put_back
