"""What a finished policy is used for: talking to it (`conversation.py`) and handing it on (`model_card.py`).

No stage of the pipeline imports this package, so a change here makes none run again.
"""
