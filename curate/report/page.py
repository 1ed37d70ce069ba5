"""The page of a run: one HTML file that holds all it shows and asks no network for anything.

Its policy (`Content-Security-Policy`) allows the two scripts and the style by their digests, images
from the file itself, and nothing else: no address, no `eval`, no handler in an attribute. Vega runs
with its expression interpreter for that reason. Text from data meets three fences: autoescape,
`escaping.visible`, and that policy.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources

from curate.errors import MissingDependencyError
from curate.report.blocks import Figure, Section, Spec
from curate.report.document import Document
from curate.report.parts_compare import comparison_section
from curate.report.parts_defects import defects_section
from curate.report.parts_examples import examples_section
from curate.report.parts_mixture import mixture_section
from curate.report.parts_plan import selection_section
from curate.report.parts_run import run_section
from curate.report.parts_scores import agreement_section, scores_section
from curate.report.parts_shifts import shifts_section
from curate.report.parts_summary import summary_section

_PARTS = (
    summary_section,
    scores_section,
    agreement_section,
    examples_section,
    selection_section,
    shifts_section,
    mixture_section,
    defects_section,
    comparison_section,
    run_section,
)


def sections(document: Document) -> list[Section]:
    """The tabs of the page, in order."""
    return [part(document) for part in _PARTS]


def render(document: Document) -> str:
    """The document as one HTML file.

    The same document gives the same page.

    Raises:
        MissingDependencyError: jinja2 or vl-convert is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise _not_installed(error) from error
    from curate.report.escaping import script_json, shown

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    specs: list[Spec] = []

    def place(figure: Figure) -> int:
        specs.append(figure.spec)
        return len(specs) - 1

    style, theme, script, bundle = (
        _file("page.css"),
        _file("theme.js"),
        _file("page.js"),
        _bundle(),
    )
    return environment.get_template("page.html.jinja").render(
        document=document,
        meta=[
            text
            for text in (
                document.run,
                document.task,
                f"made {document.made}",
                f"curate {document.version}",
            )
            if text
        ],
        sections=sections(document),
        place=place,
        charts=lambda: script_json(specs),
        policy=_policy([theme, script, bundle], style),
        style=style,
        theme=theme,
        script=script,
        bundle=bundle,
    )


def _policy(scripts: Sequence[str], style: str) -> str:
    allowed = " ".join(_digest(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return (resources.files("curate.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, without a way to end the script's element."""
    try:
        import vl_convert
    except ImportError as error:
        raise _not_installed(error) from error
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("\r", "").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _not_installed(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"the report needs {error.name}", fix="pip install 'curate-data[report]'"
    )
