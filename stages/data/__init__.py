"""Text and token ids: tasks, files, splits, tokenisation, batches.

Read `records.py` (what travels), `tasks/` (where it comes from), `prepare.py` (splits and checks), `answers.py` and
`rules.py` (answers that a rule checks), `text.py` (text becomes token ids, only there), `batches.py` (token ids become
tensors).
"""
