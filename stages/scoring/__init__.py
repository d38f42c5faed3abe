"""What a completion is worth: lexicons, rules and reward models behind one protocol.

Read `protocol.py`, `lexicon.py` (gold scorers of the default task), `rule.py` (right or wrong), `reward.py` (the
learned reward model), `classifier.py` (a text classifier of the user's), `load.py` (whichever of the three
artifacts/reward holds), `start.py` (the task's scorers).
"""
