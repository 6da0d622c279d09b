"""Run folders -> dataclasses -> one table, figures and a page.

`comparison.py` says which runs stand beside each other, `collect.py` reads them into the dataclasses of `types.py`, and
`files.py` writes it all. `markdown.py` makes tables, `sentences.py` says what came out, `figures.py` holds the look and
`draw.py` the figures of a comparison. `turns.py` tells what a selection does in conversations. `frame.py` is what pages
are made of, `page.py` is report.html, and `token_map.py` the token map.
"""
