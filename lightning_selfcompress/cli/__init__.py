"""The command ``selfcompress``, whose subcommands train the demo and inspect, export and compare files."""
