"""`python -m rexrag`."""

from rexrag.cli import main

main()
