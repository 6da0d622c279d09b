"""Run folders -> dataclasses -> one table, figures and a page.

`comparison.py` says which runs stand beside each other, `collect.py` reads them into the dataclasses of `types.py`,
`markdown.py` makes the table of every command, `draw.py` and `page.py` the figures and report.html, and `files.py`
writes all of it.
"""
