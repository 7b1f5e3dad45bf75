"""The prices that training may minimize, by their names."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_selfcompress.size.model_bytes import ModelBytes
from lightning_selfcompress.size.operations import model_operations
from lightning_selfcompress.size.own_price import OwnPrice
from lightning_selfcompress.size.price import ModelSize

PRICES: dict[str, Callable[[nn.Module], Any]] = {
    "bits": ModelSize.of,
    "bytes": ModelBytes.of,
    "operations": model_operations,
}


def price_of(price: str | Callable[[nn.Module], Tensor], *, narrow: bool = False) -> Callable[[nn.Module], Any]:
    """Returns the function that makes the price of a converted model.

    Args:
        price: The name of a price, or a function of the model that returns a price of the user's own.
        narrow: Whether vectors in float will take one byte a value.

    Raises:
        ValueError: If there is no price of this name.
        TypeError: If ``price`` is neither a name nor a function.
    """
    if isinstance(price, str):
        if price not in PRICES:
            raise ValueError(
                f"Expected price to be one of {', '.join(map(repr, PRICES))}, or a function of the module, got "
                f"{price!r}."
            )
        return partial(ModelBytes.of, float_bits=8.0) if narrow and price == "bytes" else PRICES[price]
    if not callable(price):
        raise TypeError(f"Expected price to be a name or a function of the module, got {price!r}.")
    return partial(OwnPrice.of, price)
