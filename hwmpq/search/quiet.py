"""Keep a native library's own prints off stdout, which carries the answer of `--json`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what is written to file descriptor 1 to 2 instead, C's buffers included.

    HiGHS prints a line past its own log switch when it mends an integer solution (seen in OR-Tools
    9.15). The descriptors are the process's: prints of other threads are moved too.
    """
    c_library = ctypes.CDLL(None)
    sys.stdout.flush()
    c_library.fflush(None)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        c_library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
