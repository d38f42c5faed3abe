"""The four checks of a ledger, one file each: `bound.py`, `tickets.py`, `versions.py`, `completeness.py`.

`result.py` says what a check is given and what it finds, `run.py` runs all four.
"""
