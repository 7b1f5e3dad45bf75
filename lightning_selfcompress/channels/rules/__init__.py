"""How the channels of an operation's inputs meet those of its output: one rule for each operation of torch."""

from lightning_selfcompress.channels.call import Rule
from lightning_selfcompress.channels.rules import moves, pointwise, products, reductions

RULES: dict[str, Rule] = {**pointwise.RULES, **moves.RULES, **products.RULES, **reductions.RULES}
