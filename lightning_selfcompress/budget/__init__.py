"""A size that a network is to have: where it lies, how pressure follows it, and the exact landing at the end."""
