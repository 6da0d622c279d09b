"""report.html: what was asked and what came out, the table, figures, links, and everything that a run was made of."""

import html
import os
from pathlib import Path
from urllib.parse import quote

from opd.files import write_whole
from tip.results import drafting, sentences, turns
from tip.results.draw import draw
from tip.results.frame import as_json, figures_of, fold, frame, html_of, quadrants_in_words, table
from tip.results.markdown import are_apart, blocks, cost, legend, missing, warnings
from tip.results.types import Results

MANY = 12  # sentences that are read at once


def write(results: Results, example: str, out: Path) -> None:
    """Draws what the runs allow, then report.html, each whole or not at all."""
    captions = draw(results, out)
    write_whole(out / "report.html", page(results, captions, example, out))


def page(results: Results, captions: dict[str, str], example: str, out: Path) -> str:
    """The HTML page, with the PNG files that lie in `out`; `example` is Markdown of one problem's responses."""
    comparison = results.comparison
    about = f"Pair {comparison.pair}, seeds {', '.join(map(str, comparison.seeds))}, commit {results.commit}"
    tables = [f"<h3>{html.escape(heading)}</h3>{table(*content)}" for heading, content in blocks(results)]
    count = len(next(iter(results.arms.values())).last) * (1 + are_apart(results))  # tables for each benchmark
    below = f'<div class="small">{html_of(legend(results))}</div>{html_of(warnings(results))}'
    differences, training, quadrants = (_pop(captions, word) for word in ("differences", "training", "quadrants"))
    words = quadrants_in_words() if any("quadrants" in name for name in (*training, *quadrants)) else ""
    sections = {
        "What was asked": f"<p>{html.escape(sentences.asked(results))}</p>{html_of(comparison.note)}",
        "What came out": figures_of(differences, out, _what_came_out(results)),
        "Table": "".join([*tables[-count:], below]),
        "Learning curves": figures_of(training, out),
        "The four quadrants": figures_of(quadrants, out, words),
        "Turns": html_of(turns.text(results.turns)),
        "Links": _links(results, out),
        "One problem, before and after": html_of(example),
    }
    folds = {
        "More figures": figures_of(captions, out),
        "As drafters in speculative decoding": html_of(drafting.markdown(results)),
        "Cost": html_of(cost(results)),
        "The table after earlier updates": "".join(tables[:-count]),
        "Arms": as_json(comparison.settings),
        "Configuration of the first run": as_json(results.config),
        "Versions": as_json(results.versions),
        "Command": html_of(comparison.command),
    }
    sections["Details"] = "".join(fold(title, content) for title, content in folds.items() if content)
    return frame(comparison.title, f"{about}, {results.machine}", sections)


def _pop(captions: dict[str, str], word: str) -> dict[str, str]:
    """Takes the figures with this word in their names out of the captions."""
    return {name: captions.pop(name) for name in list(captions) if word in name}


def _what_came_out(results: Results) -> str:
    items = [f"<li>{html.escape(text)}</li>" for text in sentences.came_out(results)]
    first, rest = (f"<ul>{''.join(some)}</ul>" for some in (items[:MANY], items[MANY:]))
    more = fold(f"{len(items) - MANY} more arms", rest) if len(items) > MANY else ""
    return f"{first}{more}<p>{html.escape(sentences.about_intervals(results))}</p>{html_of(missing(results))}"


def _links(results: Results, out: Path) -> str:
    def link(path: Path, text: str) -> str:
        return f'<a href="{html.escape(quote(os.path.relpath(path, out)))}">{html.escape(text)}</a>'

    token_map = out / "tokens.html"
    top = f"<p>{link(token_map, 'Token map')}: every token with its numbers.</p>" if token_map.exists() else ""
    files = ", ".join(link(out / f"table.{kind}", f"table.{kind}") for kind in ("md", "csv", "json"))
    runs = (
        f"<li>{html.escape(label)}: {', '.join(link(folder, f'seed {seed}') for seed, folder in by_seed.items())}</li>"
        for label, by_seed in results.folders.items()
    )
    return f'{top}<p>The table as files: {files}. Run folders:</p><ul class="columns">{"".join(runs)}</ul>'
