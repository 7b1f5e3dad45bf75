"""The command ``selfcompress``: what its commands read, compare and print."""
