"""`python -m featcl` is the `featcl` command."""

from featcl.cli import main

main()
