"""What a run would do and need, before it runs: no model, no GPU and no network are used.

Read settings.py (every section at once), batches.py (what an update is made of), architecture.py and shapes.py (models
and micro-batches), activations.py and memory.py (bytes of one model on one rank), processes.py (which process holds
which models where), disk.py, checks.py, tokenizers.py, page.py.
`make plan` is flows/plan.py, because what DVC would run is asked there.
"""
