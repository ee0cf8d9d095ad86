"""TVM's thread pool, sized for an artifact.

Left alone, TVM makes as many threads as half the machine's cores on x86, whatever the artifact was
compiled for, and binds each to a core by its number, be it one that this process may use or not.
Each thread that calls has a pool of its own, made once: here for all cores that the process may
use, so that an artifact takes its share of it. Source: TVM, src/runtime/threading_backend.cc.
"""

from __future__ import annotations

import os
import threading

#: ThreadGroup::kSpecifyThreadShareAllCore: the system places the threads on the cores given.
_SHARE_ALL_CORES = -3
_here = threading.local()


def use(threads: int) -> None:
    """Let the parallel loops that this thread runs have so many threads, this one among them, or
    as many as there are cores that the process may use."""
    if getattr(_here, "threads", 0) == threads:
        return
    import tvm_ffi

    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(_SHARE_ALL_CORES, min(threads, len(cores)), [str(core) for core in cores])
    _here.threads = threads
