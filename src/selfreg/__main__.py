"""`python -m selfreg`."""

from selfreg.cli import app

app()
