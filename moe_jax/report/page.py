"""The HTML that a report is made of: tables, pictures and one page without any external reference.

Everything that comes from a run is escaped here, at the last moment; a function that returns markup says so.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from moe_jax.report.pictures.canvas import INKS, PAPER

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2733; --muted: #66707d; --grid: #dde1e6; --paper: #fdfdfc; --card: #f4f5f6;
  --blue: #0072b2; --red: #c25400; --sky: #56b4e9; --good: #00724f; --bad: #b04300; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --muted: #9aa5b1; --grid: #343b44; --paper: #14181d;
  --card: #1d232a; --blue: #4aa8e0; --red: #f08a45; --sky: #3b7fa8; --good: #37c08f; --bad: #f08a45; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 58rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.4rem; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 3.2rem 0 0.6rem; padding-top: 1.1rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 2rem 0 0.4rem; }
p, ul { max-width: 44rem; margin: 0.5rem 0; }
li { margin: 0.3rem 0; }
a { color: var(--blue); text-underline-offset: 0.15em; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; margin: 1rem 0 0; font-size: 0.9rem; }
.quiet, figcaption, caption { color: var(--muted); font-size: 0.88rem; }
.missing { color: var(--muted); border-left: 3px solid var(--grid); padding-left: 0.8rem; }
.banner { border-left: 4px solid var(--bad); background: var(--card); padding: 0.6rem 1rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.7rem; margin: 1.4rem 0; }
.fact { background: var(--card); border-radius: 0.5rem; padding: 0.7rem 0.9rem; }
.fact b { display: block; font-size: 1.35rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.fact span { color: var(--muted); font-size: 0.82rem; line-height: 1.35; display: block; }
figure { margin: 1.1rem 0 1.6rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { max-width: 44rem; margin-top: 0.4rem; }
.table { overflow-x: auto; margin: 0.9rem 0 1.4rem; }
table { border-collapse: collapse; font-size: 0.88rem; line-height: 1.45; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.4rem; }
th, td { text-align: right; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, .words { text-align: left; }
td.words { white-space: normal; min-width: 9rem; }
td.code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.8rem;
  overflow-wrap: anywhere; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
details { margin: 0.8rem 0; } summary { cursor: pointer; color: var(--muted); }
pre { background: var(--card); border-radius: 0.5rem; padding: 0.8rem 1rem; overflow-x: auto; font-size: 0.8rem;
  line-height: 1.5; }
@media (max-width: 40rem) { figure { overflow-x: auto; } figure svg { min-width: 36rem; } }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


class Section(NamedTuple):
    """One part of the page: its heading and its markup."""

    title: str
    markup: str


def escape(value: Any) -> str:
    """Markup of a value as plain text."""
    return html.escape(str(value))


def number(value: Any, *, digits: int = 4) -> str:
    """Writes a number for people: thousands separated, `digits` significant digits, an en dash for "not defined".

    Args:
      value: a number, None, or anything else, which is written as it is.
      digits: significant digits of fractions.

    Returns:
      Plain text.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("-", "−")


def interval(ends: Sequence[Any] | None, *, digits: int = 4) -> str:
    """Writes the ends of an interval, or nothing where one is not defined."""
    if not ends or any(number(end) == "–" for end in ends):
        return ""
    return f"[{number(ends[0], digits=digits)}, {number(ends[1], digits=digits)}]"


def paragraph(text: str, kind: str = "") -> str:
    """Markup of one paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def missing(what: str) -> str:
    """Markup that says which part the run does not have."""
    return paragraph(f"Not in this run: {what}.", "missing")


def bullets(sentences: Sequence[str]) -> str:
    """Markup of a list of plain sentences."""
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>" if sentences else ""


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Markup of large figures, each (figure, what it is)."""
    cards = "".join(f'<div class="fact"><b>{escape(f)}</b><span>{escape(what)}</span></div>' for f, what in pairs)
    return f'<div class="facts">{cards}</div>' if cards else ""


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "", words: Sequence[str] = ()
) -> str:
    """Markup of a table; columns that no row fills are left out.

    Args:
      columns: headings.
      rows: one value per column; numbers are formatted, None is an en dash, "better" and "worse" are coloured.
      caption: a sentence above the table.
      words: headings of columns that hold running text, aligned left.

    Returns:
      Markup.
    """
    used = [i for i in range(len(columns)) if i == 0 or any(row[i] not in (None, "") for row in rows)]

    def cell(tag: str, index: int, value: Any) -> str:
        kinds = ["words"] if columns[index] in words else []
        kinds += [value] if value in ("better", "worse") else []
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{kind}>{escape(number(value))}</{tag}>"

    head = "".join(cell("th", i, columns[i]) for i in used)
    body = "".join("<tr>" + "".join(cell("td", i, row[i]) for i in used) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="table"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def settings(values: Mapping[str, Any]) -> str:
    """Markup of names and values in two columns; nested mappings become dotted names."""
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="words code">{escape(number(value))}</td></tr>'
        for name, value in _flatten(values)
    )
    return f'<div class="table"><table><tbody>{rows}</tbody></table></div>'


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a nested mapping with dotted names; sequences are joined by commas."""
    leaves: list[tuple[str, Any]] = []
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        leaves += _flatten(value, f"{dotted}.") if isinstance(value, Mapping) else [(dotted, value)]
    return leaves


def folded(summary: str, markup: str) -> str:
    """Markup that a reader unfolds."""
    return f"<details><summary>{escape(summary)}</summary>{markup}</details>"


def render_svg(figure: Figure) -> str:
    """Renders a figure as SVG markup, the same bytes for the same figure and matplotlib."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "moe_jax", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def with_background(svg: str) -> str:
    """Gives a transparent SVG the light page's colour, for viewing it on its own."""
    return re.sub(r"(<svg[^>]*>)", rf'\1\n<rect width="100%" height="100%" fill="{PAPER}"/>', svg, count=1)


def picture(svg: str, name: str, caption: str) -> str:
    """Markup of a picture inside the page: named inks follow the page's theme, ids are unique, nothing is fetched.

    Args:
      svg: as `render_svg` gives.
      name: a word, unique on the page.
      caption: what the picture shows; also its description for screen readers.

    Returns:
      Markup.
    """
    inline = svg[svg.index("<svg") :]
    inline = re.sub(r"<metadata>.*?</metadata>", "", inline, flags=re.DOTALL)
    inline = re.sub(r' xmlns(:\w+)?="[^"]*"', "", inline).replace("xlink:href", "href")
    inline = re.sub(r'\bid="', f'id="{name}-', inline)
    inline = re.sub(r'href="#', f'href="#{name}-', inline)
    inline = re.sub(r"url\(#", f"url(#{name}-", inline)
    for ink, colour in INKS.items():
        inline = inline.replace(colour, f"var(--{ink})")
    inline = inline.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return f"<figure>{inline}<figcaption>{escape(caption)}</figcaption></figure>"


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole document: heading, table of contents and sections."""
    anchors = [re.sub(r"\W+", "-", section.title.lower()).strip("-") for section in sections]
    contents = "".join(
        f'<a href="#{anchor}">{escape(section.title)}</a>' for anchor, section in zip(anchors, sections, strict=True)
    )
    body = "".join(
        f'<section><h2 id="{anchor}">{escape(section.title)}</h2>{section.markup}</section>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><header><h1>{escape(title)}</h1><p class="quiet">{escape(subtitle)}</p><nav>{contents}</nav></header>\n'
        f"<main>{body}</main></body></html>\n"
    )
