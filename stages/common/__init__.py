"""What every stage shares: settings, errors, metrics, tracking, work directories, child processes.

Start with `config.py` (how params.yaml is read), then `entry.py` (how a stage starts and ends).
"""
