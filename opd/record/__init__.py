"""The folder of a run. `identity.py` says whether two runs are the same; `folder.py` where a run continues and how it
ended. `record.py` writes each update with `metrics.py` and `dump.py`. `checkpoint.py` saves what a run continues from.
"""
