"""The source files that time kernels where hwmpq is not installed, unchanged: the worker and all
that it imports. They need Python, numpy and TVM's runtime.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_FILES = (
    "__init__.py", "errors.py", "types.py", "tensors.py", "tile_permission.py",
    "toolchain.py", "targets.py", "launches.py", "artifact/__init__.py", "artifact/contents.py",
    "artifact/cuda/__init__.py", "artifact/cuda/driver.py", "artifact/cuda/program.py",
    "artifact/folder.py", "artifact/golden.py", "artifact/manifest.py", "artifact/native.py",
    "artifact/pool.py", "artifact/run.py", "artifact/signature.py", "artifact/relax_vm.py",
    "measure/__init__.py", "measure/cuda.py", "measure/environment.py", "measure/frames.py",
    "measure/gates.py", "measure/kernel.py", "measure/nvml.py", "measure/onsite.py",
    "measure/process.py", "measure/protocol.py", "measure/public.py", "measure/replicate.py",
    "measure/runner.py", "measure/stats.py", "measure/timing.py", "measure/worker.py",
)  # fmt: skip


def files() -> dict[str, bytes]:
    """Path below the package's parent -> content."""
    return {f"{_PACKAGE.name}/{name}": (_PACKAGE / name).read_bytes() for name in _FILES}


def archive() -> bytes:
    """All of them as a ZIP file that Python imports from, compressed as a whole by zlib: few enough
    bytes that a pipe holds them while a peer that reads none says why. The same bytes for the same
    sources."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, content in files().items():
            file.writestr(zipfile.ZipInfo(name), content)
    return zlib.compress(packed.getvalue(), 9)
