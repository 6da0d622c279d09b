"""Run folders -> results: `collect.py` reads them, `page.py` and `figures.py` show them, `grid.py` aligns tables."""
