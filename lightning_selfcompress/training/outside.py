"""The world outside a module, which a dry run leaves as it was: objects are put back, files are not touched.

Lists, dictionaries, arrays and objects that the code of a module reaches are copied before a dry run, and get their
content back after it. What cannot be put back (a file, a process, a connection) is refused while a dry run goes on.
"""

import io
import logging
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_selfcompress.channels.dispatch import Shared
from lightning_selfcompress.tensors import base_named
from lightning_selfcompress.training.undo import undo

_REFUSED = {
    "os.remove": "removes a file",
    "os.rename": "renames a file",
    "os.mkdir": "makes a folder",
    "os.rmdir": "removes a folder",
    "os.system": "starts a process",
    "subprocess.Popen": "starts a process",
    "socket.connect": "opens a connection",
    "socket.sendto": "sends to a network",
}
_MOST = 100_000  # objects: more of them are data
_LARGE = 1 << 24  # bytes: larger tensors are data


class OutsideError(PermissionError):
    """Raised in a dry run where a step would touch what cannot be put back."""


class _Guard(threading.local):
    active = False


_guard = _Guard()
_install = threading.Lock()
_installed = False


class _Mute(io.TextIOBase):
    """Stands for ``sys.stdout``: what a dry run prints is printed already; other threads go on printing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes what comes from threads without a dry run."""
        return len(text) if _guard.active else self._stream.write(text)


@contextmanager
def _quiet() -> Iterator[None]:
    streams, level = (sys.stdout, sys.stderr), logging.root.manager.disable
    sys.stdout, sys.stderr = map(_Mute, streams)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        logging.disable(level)


_silence = Shared(_quiet)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _guard.active:
        return
    if event == "open":
        path, mode, flags = args
        writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & 3)
        if writes and not str(path).endswith((".pyc", "null")) and ".pyc." not in str(path):
            raise OutsideError(f"the step opens {str(path)!r} to write to it")
    elif event in _REFUSED:
        raise OutsideError(f"the step {_REFUSED[event]}: {args[0]!r}")


class Outside:
    """What lies outside a module, as it is now.

    Args:
        module: A module whose code is about to run on copies.
        others: Objects that its code may reach: the callbacks and the datamodule of its Trainer.
    """

    def __init__(self, module: nn.Module, others: Iterable[Any] = ()) -> None:
        reached: list[Any] = []
        self._undo = list(_bindings(module, reached))
        self._undo += [undo(value) for value in _mutable([*reached, *others], {id(m) for m in module.modules()})]

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Puts back after this context what lies outside, and refuses within it what cannot be put back.

        Raises:
            OutsideError: Within the context, in this thread, if files are opened to be written, or processes or
                connections are opened.
        """
        _install_audit()
        earlier, _guard.active = _guard.active, True
        try:
            with _silence:
                yield
        finally:
            _guard.active = earlier
            for put_back in self._undo:
                put_back()


def _install_audit() -> None:
    """Has Python ask before it opens anything; the hook stays for good and does nothing where no dry run goes on."""
    global _installed
    with _install:
        if not _installed:
            sys.addaudithook(_audit)
            _installed = True


def _bindings(module: nn.Module, reached: list[Any]) -> Iterator[Callable[[], None]]:
    """Yields functions that bind the names outside again which the code of a module can bind; fills in their values.

    Args:
        module: The module.
        reached: Receives the values of these names, and of the module's attributes.
    """
    seen: set[int] = set()
    for part in module.modules():
        for kind in type(part).__mro__:
            if _is_of_user(kind.__module__):
                reached.append(kind)
                for member in vars(kind).values():
                    yield from _of_function(member, seen, reached)
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules", "_trainer"):
                reached.append(value)
                yield from _of_function(value, seen, reached)


def _of_function(value: Any, seen: set[int], reached: list[Any]) -> Iterator[Callable[[], None]]:
    """Does the same for a function, its closure, and the functions and classes of the user's that it names."""
    if isinstance(value, property):
        value = value.fget
    value = _attribute_or_itself(value, "__func__")
    value = _attribute_or_itself(value, "__wrapped__")
    if not isinstance(value, FunctionType) or id(value) in seen or not _is_of_user(value.__module__):
        return
    seen.add(id(value))
    names = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
    cells = [(cell, cell.cell_contents) for cell in value.__closure__ or () if _is_filled(cell)]
    plain = {name: v for name, v in names.items() if isinstance(v, _PLAIN)}
    yield lambda: value.__globals__.update(plain)
    for cell, content in cells:
        yield partial(setattr, cell, "cell_contents", content)
    found = [
        *names.values(),
        *(content for _, content in cells),
        *(value.__defaults__ or ()),
        *(value.__kwdefaults__ or {}).values(),
    ]
    for one in found:
        reached.append(one)
        members = vars(one).values() if isinstance(one, type) and _is_of_user(one.__module__) else ()
        for function in (one, *members):
            yield from _of_function(function, seen, reached)


def _attribute_or_itself(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, value)
    except Exception:  # the placeholder of a package that is not installed raises an error of its own
        return value


_PLAIN = (int, float, complex, str, bytes, type(None), tuple)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


_LIBRARIES = frozenset(
    {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "numpy", "lightning_selfcompress"}
)


def _is_of_user(module: str | None) -> bool:
    name = str(module).partition(".")[0]
    return name == "__main__" or (name not in _LIBRARIES and name not in sys.stdlib_module_names)


_NOT_ENTERED = (ModuleType, FunctionType, MethodType, GeneratorType, Optimizer, DataLoader, Dataset)


_TAKEN = (Tensor, np.ndarray, torch.Generator, np.random.Generator, random.Random, bytearray, io.IOBase)


def _mutable(values: Iterable[Any], own: set[int]) -> list[Any]:
    """Returns the mutable objects among values, their items and their attributes.

    Args:
        values: Any objects.
        own: Ids of the module's parts, which a dry run copies.
    """
    found: dict[int, Any] = {}
    stack = list(values)
    while stack and len(found) < _MOST:
        value = stack.pop()
        if id(value) in found or id(value) in own or isinstance(value, _NOT_ENTERED):
            continue
        if isinstance(value, _TAKEN):
            if not isinstance(value, Tensor | np.ndarray) or value.nbytes <= _LARGE:
                found[id(value)] = value
        elif isinstance(value, list | dict | set | deque | tuple):
            if not isinstance(value, tuple):
                found[id(value)] = value
            stack += value.values() if isinstance(value, dict) else value
        elif isinstance(value, nn.Module):
            stack += [*value.parameters(), *value.buffers()]
        elif isinstance(value, type):
            if _is_of_user(value.__module__):
                found[id(value)] = value
                stack += [member for name, member in vars(value).items() if not name.startswith("__")]
        elif isinstance(getattr(value, "__dict__", None), dict) and _can_be_put_back(value):
            found[id(value)] = value
            stack += vars(value).values()
    return list(found.values())


def _can_be_put_back(value: Any) -> bool:
    kind = type(value)
    trainer = base_named(kind, "Trainer") is not None
    return not trainer and (_is_of_user(kind.__module__) or base_named(kind, "Callback") is not None)
