"""Preference pairs and the reward model trained on them.

Read `config.py`, `pairs.py` (sampling), `label.py` (labelling), `train.py` (Bradley–Terry), `evaluate.py`; `rule.py`
and `classifier.py` put a rule or a classifier in the reward model's place.
"""
