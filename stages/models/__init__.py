"""Models on disk and in memory: where the base model comes from, loading, freezing, the reward head.

Read `source.py` (settings and conversion of the base model), `shorten.py` (a smaller one made of it), `load.py`, then
`reward_model.py`.
"""
