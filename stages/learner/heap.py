"""Where the C library puts the tensors of a learner on CPU cores."""

import ctypes
import logging
import os
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`, as its malloc.h numbers them."""
LARGEST_KEPT = 2**27
"""Bytes of a tensor that is still taken from the heap, such as the gradient of a small model's output head.

glibc's cache of small blocks may keep up to seven freed ones from use, so with larger ones that would be much memory.
"""
NO_LIMIT = -1
"""Of what is kept at the heap's end though free."""

logger = logging.getLogger(__name__)


def keep_freed_memory() -> None:
    """Have memory that this process frees kept for what it asks for next.

    By default glibc maps each large tensor anew and gives it back at once, so an update waits for the kernel to clear
    some hundred thousand pages, the same ones every time. Does nothing without glibc, on a GPU, or where variables such
    as `MALLOC_TRIM_THRESHOLD_` or `GLIBC_TUNABLES` say what glibc is to do.
    """
    is_set = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform != "linux" or torch.cuda.is_available() or is_set:
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    for option, value in ((M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, NO_LIMIT)):
        if not set_option(option, value):
            logger.info("glibc refuses to keep freed memory; updates take longer option=%d value=%d", option, value)
