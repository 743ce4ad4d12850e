"""Rendering: Jinja2 templates with everything escaped, and a policy that lets the page load and run nothing from elsewhere."""

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.report.charts.shapes import COLOURS, number
from benchmarks.report.model import Page
from benchmarks.report.modules import HEAD


def environment() -> Environment:
    """The templates' environment."""
    made = Environment(
        loader=PackageLoader("benchmarks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["px"] = number
    made.filters["short"] = lambda text, length: text if len(text) <= length else text[: length - 1] + "…"
    return made


def render(page: Page) -> str:
    """The page as HTML."""
    templates = environment()
    assert templates.loader is not None
    # Our own files, the only text that is not escaped; nothing of a record gets into them. The policy names them by their hash.
    style, script = (templates.loader.get_source(templates, name)[0] for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return templates.get_template("page.html.j2").render(
        page=page, style=Markup(style), script=Markup(script), policy=policy, module_head=HEAD, colours=range(COLOURS)
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
