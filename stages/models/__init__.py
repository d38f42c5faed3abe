"""Models on disk and in memory: where the base model comes from, loading, freezing, the reward head.

Read `source.py` (settings and conversion of the base model), `load.py`, then `reward_model.py`.
"""
