"""The rules, one for each operation of torch, that take the channels of the inputs to the channels of the outputs."""

from lightning_selfcompress.channels.call import Rule
from lightning_selfcompress.channels.rules import fills, indices, moves, pointwise, products, reductions, reshapes

RULES: dict[str, Rule] = {
    **fills.RULES,
    **pointwise.RULES,
    **moves.RULES,
    **reshapes.RULES,
    **indices.RULES,
    **products.RULES,
    **reductions.RULES,
}


# the rules of these operations also apply where nothing is known of the inputs, or where there are none
STARTING = fills.MAKING | moves.SPREADING
