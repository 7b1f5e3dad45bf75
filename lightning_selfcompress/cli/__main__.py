"""``python -m lightning_selfcompress.cli``: the command ``selfcompress`` where no script of that name is installed."""

import sys

from lightning_selfcompress.cli.main import main

sys.exit(main())
