import os

# Tiny models on many threads spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
