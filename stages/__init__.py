"""What the pipeline does; `flows` says when.

Read in the order of the arrows (each layer imports only what stands to its right):

    stages/<entry>.py -> {sft, reward, rl, judge} -> {learner, generation, scoring} -> models -> data -> common

An entry module (`python -m stages.train_policy`) reads files and settings, calls one function of its
step and writes files; `dvc.yaml` wires the entries into the pipeline.
"""
