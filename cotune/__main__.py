"""`python -m cotune` is `cotune`."""

from cotune.cli import app

app()
