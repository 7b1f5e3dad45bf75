"""How the channels of an operation's inputs meet those of its output: one rule for each operation of torch."""
