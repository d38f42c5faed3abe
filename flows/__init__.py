"""When the pipeline runs: DVC decides whether a stage must run, Prefect when and where.

Read `dvc.py` (one `dvc repro`, safely), then `rlhf.py` (the stages in order, as a Prefect flow).
"""
