"""Supervised fine-tuning on demonstrations: `config.py`, then `train.py`."""
