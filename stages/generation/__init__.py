"""Sampling from a policy: one protocol, a vLLM server and an in-process generator behind it.

Read `protocol.py` (what a generator is), `config.py`, `start.py` (which one runs), then `vllm_generator.py`
with `vllm_server.py`, and `transformers_generator.py`, the slow and exact one.
"""
