"""The page as HTML: one file that needs no other and no network."""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from mocosfl_jax.page.contents import RunOnPage, rows
from mocosfl_jax.page.curves import curves


def html(runs: Sequence[RunOnPage]) -> str:
    """Return the page about these runs. Everything that was read from their files is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.get_template("report.html").render(
        runs=runs,
        curves=curves(runs),
        fields=rows([run.fields for run in runs], [run.paper for run in runs]),
        versions=rows([run.environment for run in runs]),
    )
