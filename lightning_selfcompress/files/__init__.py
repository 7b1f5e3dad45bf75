"""Reading and writing compressed networks: checkpoints, packed files and plain networks."""
