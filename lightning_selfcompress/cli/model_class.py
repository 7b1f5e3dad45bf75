"""The import of classes that a command line names."""

import sys
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from torch import nn


def module_class(text: str) -> type[nn.Module]:
    """Imports a LightningModule class from the current folder or the environment.

    Args:
        text: Name of the class, as ``"package.module:Class"``.

    Returns:
        The class.

    Raises:
        ValueError: If the class does not exist, cannot be imported, or is not a LightningModule.
    """
    module, colon, name = text.partition(":")
    if not (colon and name and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"Expected --model as package.module:Class, got {text!r}.")
    look_here()
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"Expected a module {module!r} for --model, found none in the current folder or the environment. Run "
                f"the command where your code lies, or install it."
            ) from error
        raise ValueError(
            f"Expected to import {module!r} for --model, but it needs {error.name!r}. Install it."
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"Expected to import {module!r} for --model, got {type(error).__name__}: {error}. --debug shows where."
        ) from error
    try:
        chosen = reduce(getattr, name.split("."), cast(Any, found))
    except AttributeError as error:
        known = ", ".join(n for n, value in vars(found).items() if _is_lightning_module(value)) or "none"
        raise ValueError(f"Expected a class {name!r} in {module!r}. LightningModules there: {known}.") from error
    if not _is_lightning_module(chosen):
        raise ValueError(f"Expected a LightningModule in --model {text!r}, got {chosen!r:.80}. Name the class trained.")
    return cast("type[nn.Module]", chosen)


def look_here() -> None:
    """Adds the current folder, which may hold the user's code, to the import path."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _is_lightning_module(value: object) -> bool:
    """Returns whether a value is a LightningModule class, from either of Lightning's two packages."""
    opens: Callable[..., Any] | None = getattr(value, "load_from_checkpoint", None)
    return isinstance(value, type) and issubclass(value, nn.Module) and callable(opens)
