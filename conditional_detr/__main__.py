"""``python -m conditional_detr``: the command line."""

from conditional_detr.cli import app

app(prog_name="conditional-detr")
