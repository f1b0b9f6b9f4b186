"""``python -m csalign``."""

from csalign.cli.app import main

main()
