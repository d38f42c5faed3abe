"""What a completion is worth: lexicons, rules and reward models behind one protocol.

Read `protocol.py`, `lexicon.py` (gold scorers of the default task), `reward.py` (the learned reward model).
"""
