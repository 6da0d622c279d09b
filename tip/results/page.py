"""report.html: one self-contained page with the table, figures, configuration and warnings.

Text that models or users wrote is escaped; there is no script in the page.
"""

import base64
import html
import json
from pathlib import Path

from opd.files import write_whole
from tip.results.draw import draw
from tip.results.markdown import markdown
from tip.results.types import Results

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222;
  overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 12px; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: 2px 7px; white-space: nowrap; text-align: left }
th { background: #f2f2f2 }
img { max-width: 100% }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px }
figcaption { font-size: 12px; color: #555 }
"""


def write(results: Results, out: Path) -> None:
    """Draws what the runs allow, then report.html; each file whole or not at all."""
    captions = draw(results, out)
    write_whole(out / "report.html", page(results, captions, out))


def page(results: Results, captions: dict[str, str], out: Path) -> str:
    """The HTML page, with the PNG files that lie in `out`."""
    body = [html_of(markdown(results))]
    for name, text in captions.items():
        data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        body.append(
            f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(text)}</figcaption></figure>"
        )
    folders = {label: {seed: str(f) for seed, f in runs.items()} for label, runs in results.folders.items()}
    for title, content in (
        ("Arms", results.comparison.settings),
        ("Configuration of the first run", results.config),
        ("Versions", results.versions),
        ("Run folders", folders),
    ):
        text = html.escape(json.dumps(content, indent=1, ensure_ascii=False))
        body.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(results.comparison.title)}</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def html_of(markdown: str) -> str:
    """The little Markdown that tip.results writes: headings, tables, lists, paragraphs. Everything is escaped."""
    return "".join(map(_block, markdown.strip().split("\n\n")))


def _block(block: str) -> str:
    lines = [html.escape(line) for line in block.split("\n")]
    if block.startswith("#"):
        level = len(block) - len(block.lstrip("#"))
        return f"<h{level}>{lines[0].lstrip('# ')}</h{level}>"
    if block.startswith("|"):
        header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:2] != "|-")
        return f"<table>{_row('th', header)}{''.join(_row('td', row) for row in rows)}</table>"
    if block.startswith("- "):
        return f"<ul>{''.join(f'<li>{line[2:]}</li>' for line in lines)}</ul>"
    return f"<p>{'<br>'.join(lines)}</p>"


def _row(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
