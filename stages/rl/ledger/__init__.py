"""The ledger of a run: every sample, what trained on it, and what became of each prompt.

It proves the staleness bound (`python -m stages.rl.ledger check`) and lets a run be trained again without a
generator. docs/ledger.md describes the files.

Read `schema.py` (what a row is), `segments.py` (files that never change), `writer.py`, `reader.py`, `compaction.py`
(the copy a finished stage keeps), then `checks/` and `summary.py`. `offline.py` is what a run leaves that sampled
nothing.
"""
