"""`python -m qtool` is `qtool`."""

from qtool.cli.main import app

app(prog_name="qtool")
