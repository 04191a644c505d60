"""`python -m neoquant`, for where the `neoquant` command is not on the path."""

from neoquant.cli import run

run()
