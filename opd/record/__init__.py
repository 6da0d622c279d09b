"""The run folder: `identity.py` says whether two runs are the same, `folder.py` where one continues and what it ended
with, `record.py` writes each update (`metrics.py`, `dump.py`), `checkpoint.py` saves what continues it.
"""
