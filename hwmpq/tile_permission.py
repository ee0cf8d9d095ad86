"""Linux's permission to use AMX tile registers, which a process has to ask for.

Without it the first tile instruction ends the process (SIGILL). It holds for all threads of the
process, also for those that begin later. Source: Linux, Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from hwmpq.errors import InputError

#: The features, and the CPU flags of the same meaning, that need it.
TILES = frozenset({"amx-tile", "amx_tile"})
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18


def ask(features: Iterable[str]) -> None:
    """Ask where tiles are among the features; again is harmless.

    Raises InputError where Linux refuses: before 5.16, or forbidden by the container.
    """
    if TILES.isdisjoint(features):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA):
        raise InputError(
            "Linux refuses this process the AMX tile registers",
            f"arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA): {os.strerror(ctypes.get_errno())}",
            next="Run on Linux 5.16 or later where arch_prctl is allowed, or compile for "
            "x86-avx512-vnni.",
        )
