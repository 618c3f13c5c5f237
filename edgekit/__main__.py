"""``python -m edgekit``: the command line, for ``torchrun -m edgekit train ...``."""

from edgekit.cli import main

main()
