"""The RL stage. Read the files in the order the data travels.

    prompts ──► completions ──► scores ──► units (with advantages, or pairs) ──► loss ──► weights
    prompts.py  ../generation/  scorer.py  algorithms/*.py                       loop.py   weights.py
                     ▲                                                                       │
                     └────────────────────── publish(policy_version) ◄───────────────────────┘

`records.py` says what travels, `config.py` what can be set, `validation.py` which checkpoint is the best one.
"""
