"""A compiled library loaded from bytes in memory, so that no file can change after its check."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError

#: Nobody, not even we, can change the copy from then on.
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


def library(code: bytes, of: Path) -> Any:
    """A shared library as a TVM module. of: the artifact, for errors.

    It runs from a sealed, nameless file in memory (memfd_create(2)); /proc must be mounted. Under
    a name used before, dlopen(3) would hand out the library that was loaded then: hence the link.
    Raises InputError where TVM or the system does not take it.
    """
    import tvm_ffi

    load = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")
    try:
        with (
            open(os.memfd_create("model.so", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb") as file,
            tempfile.TemporaryDirectory(prefix="hwmpq-") as place,
        ):
            file.write(code)
            file.flush()
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            link = Path(place) / "model.so"
            link.symlink_to(f"/proc/self/fd/{file.fileno()}")
            return load(str(link), "so")
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the library of artifact {of} cannot be loaded", error,
            next="Use the TVM version that its manifest names.",
        ) from error  # fmt: skip
