"""What every page of results is made of: its frame, tables, figures, folds, and the four quadrants in words.

A page is one file without a script. Text that models or users wrote is escaped.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tip.results.figures import FONT, QUADRANT_COLOURS

STYLE = f"""
:root {{ color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #666; --line: #ccc; --shade: #f3f3f3 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ddd; --paper: #16181b; --faint: #a0a0a0; --line: #44484d; --shade: #22262b }} }}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.55 system-ui, "{FONT}", sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1120px; margin: 0 auto; padding: 1.2rem 1rem 3rem; overflow-wrap: anywhere }}
h1, h2, h3 {{ line-height: 1.25; margin: 1.2rem 0 .5rem; font-size: 1rem }} h1 {{ font-size: 1.6rem }}
h2 {{ font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }}
p, ul:not(.columns), dl {{ max-width: 46rem }} .scroll {{ overflow-x: auto }}
.small, figcaption, table, pre {{ font-size: .8rem }} .small, figcaption {{ color: var(--faint) }}
table {{ border-spacing: 0; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .6rem; white-space: nowrap; text-align: right; border-bottom: 1px solid var(--line) }}
th {{ white-space: normal; overflow-wrap: normal; vertical-align: bottom; min-width: 4.5rem }}
td:first-child, th:first-child {{ position: sticky; left: 0; background: var(--paper); text-align: left }}
tr.group th {{ background: var(--shade) }} tr.group span {{ position: sticky; left: .6rem;
  display: inline-block; max-width: min(80vw, 40rem) }}
.columns {{ columns: 26rem 2; column-gap: 1.5rem }} .columns > * {{ break-inside: avoid }}
figure {{ margin: 0 0 1.2rem }} img {{ width: 100%; max-width: 36rem; background: #fff; border-radius: 6px }}
pre {{ background: var(--shade); padding: .8rem; white-space: pre-wrap }} summary, dt {{ font-weight: 600 }}
dt {{ border-left: .8rem solid; padding-left: .5rem }} dd {{ margin: 0 0 .5rem 1.3rem }}
svg {{ width: 100%; max-width: 24rem; fill: currentColor; font-size: 13px }}
"""
QUADRANTS = {  # the paper's words, and what they say
    1: ("uncertain and wrong", "The student is unsure and the teacher corrects it: the densest signal."),
    2: ("uncertain but right", "The student is unsure and the teacher agrees with it."),
    3: ("overconfident and wrong", "The student is sure and the teacher corrects it. Entropy cannot see it."),
    4: ("solved", "The student is sure and the teacher agrees: almost no signal."),
}


def frame(title: str, about: str, sections: Mapping[str, str]) -> str:
    """The whole page. Sections are HTML already, and an empty one is left out. A number stays on the line of its %."""
    body = "".join(f"<h2>{heading}</h2>{content}" for heading, content in sections.items() if content)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><h1>{html.escape(title)}</h1><div class="small">{html.escape(about)}</div>'
        f"{body.replace(' %', '&nbsp;%')}</body></html>\n"
    )


def figures_of(captions: Mapping[str, str], out: Path, words: str = "") -> str:
    """The PNG files in `out` with these names, each above its caption; before them `words`, which are HTML already."""
    shown = [f"<div>{words}</div>"] if words else []
    for name, text in captions.items():
        data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        image = f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
        shown.append(f"<figure>{image}<figcaption>{html.escape(text)}</figcaption></figure>")
    return f'<div class="columns">{"".join(shown)}</div>' if shown else ""


def fold(title: str, content: str) -> str:
    """What a reader opens; `content` is HTML already."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def as_json(content: object) -> str:
    return f"<pre>{html.escape(json.dumps(content, indent=1, ensure_ascii=False))}</pre>"


def table(header: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Rows in groups, each under its title; a group without a title begins at once."""
    rows = [_row("th", header)]
    for title, members in groups.items():
        heading = f'<tr class="group"><th colspan="{len(header)}"><span>{html.escape(title)}</span></th></tr>'
        rows += [heading if title else "", *(_row("td", cells) for cells in members)]
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def html_of(markdown: str) -> str:
    """The little Markdown that tip writes below headings: tables, lists, indented text, paragraphs."""
    return "".join(map(_block, filter(None, markdown.strip().split("\n\n"))))


def _block(block: str) -> str:
    lines = block.split("\n")
    if block.startswith("    "):
        text = "\n".join(line[4:] for line in lines)
        return f"<pre>{html.escape(text)}</pre>"
    if block.startswith("|"):
        header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:2] != "|-")
        return table(header, {"": rows})
    if block.startswith("- "):
        return f"<ul>{''.join(f'<li>{html.escape(line[2:])}</li>' for line in lines)}</ul>"
    return f"<p>{'<br>'.join(map(html.escape, lines))}</p>"


def quadrants_in_words() -> str:
    """What Q1 to Q4 are, with a picture: entropy upwards, divergence to the right."""
    text, cells, words = '<text text-anchor="middle" ', "", ""
    for q, (name, meaning) in QUADRANTS.items():
        uncertain, apart, colour = q in (1, 2), q in (1, 3), QUADRANT_COLOURS[q]
        x, y = 180 if apart else 40, 10 if uncertain else 100
        cells += f'<rect x="{x}" y="{y}" width="136" height="86" rx="4" fill="{colour}" fill-opacity=".35"/>'
        cells += f'{text}x="{x + 68}" y="{y + 38}" font-weight="bold">Q{q}</text>'
        cells += f'{text}x="{x + 68}" y="{y + 58}" font-size="10">{name}</text>'
        where = f"{'high' if uncertain else 'low'} entropy, {'high' if apart else 'low'} divergence"
        words += f'<dt style="border-color: {colour}">Q{q}: {name} ({where})</dt><dd>{meaning}</dd>'
    cells += f'{text}x="180" y="210">divergence &#8594;</text>'
    cells += f'{text}transform="translate(24 98) rotate(-90)">entropy &#8594;</text>'
    return (
        "<p>Every token that the student writes has two numbers. Its entropy says how unsure the student was, and its "
        "divergence says how far the teacher is from it. A number is high above a threshold: by default the mean of "
        f'its axis in the update.</p><svg viewBox="0 0 330 216">{cells}</svg><dl>{words}</dl>'
    )
