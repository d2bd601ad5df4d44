"""`python -m flexmla`."""

from .cli import main

main()
