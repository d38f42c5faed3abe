"""Preference pairs and the reward model trained on them.

Read `config.py`, `pairs.py` (sampling and labelling), `train.py` (Bradley–Terry), `evaluate.py`.
"""
