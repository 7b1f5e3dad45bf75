"""The entry point of ``python -m lightning_selfcompress.cli``, the command ``selfcompress`` without its script."""

import sys

from lightning_selfcompress.cli.main import main

sys.exit(main())
