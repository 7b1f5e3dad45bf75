"""The rules, one for each operation of torch, that take the channels of the inputs to the channels of the outputs."""

from lightning_selfcompress.channels.call import Rule
from lightning_selfcompress.channels.rules import moves, pointwise, products, reductions, reshapes

RULES: dict[str, Rule] = {
    **pointwise.RULES,
    **moves.RULES,
    **reshapes.RULES,
    **products.RULES,
    **reductions.RULES,
}
