"""Checkpoints, packed files and plain networks: what is read and written of a compressed network."""
