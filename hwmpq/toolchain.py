"""Which versions are installed, whether the TVM pair among them works, and TVM without torch. The
package metadata is asked, so that a pair that would crash the process is never loaded.

Seen with the wheels of Apache TVM 0.26.0, 0.27.0 and 0.27.0.post1 on Linux x86-64: with
apache-tvm-ffi 0.1.15.post2 `Schedule.tensorize` ends in a segmentation fault, with 0.1.13.post3
`import tvm` fails, with 0.1.14.post0 and .post1 both work.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from hwmpq.errors import InputError

#: The range of apache-tvm-ffi that works with apache-tvm 0.26 and 0.27: first good, first bad.
FFI_RANGE = ((0, 1, 14), (0, 1, 15))
FIX = "pip install 'apache-tvm-ffi==0.1.14.post1'"

#: What a measurement, an artifact and `doctor` record.
RECORDED = (
    "hwmpq",
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "torch",
    "ml_dtypes",
    "xgboost",
    "ortools",
)


def versions() -> dict[str, str]:
    """Distribution name -> installed version, of those in RECORDED that are installed."""
    found = ((name, _version(name)) for name in RECORDED)
    return {name: version for name, version in found if version}


def check() -> None:
    """Refuse an apache-tvm / apache-tvm-ffi pair that is known not to work.

    An installation without TVM passes: what needs it says so itself.
    Raises: InputError naming the pair and the command that repairs it.
    """
    tvm, ffi = _version("apache-tvm"), _version("apache-tvm-ffi")
    reason = why_not(tvm, ffi) if tvm else None
    if reason:
        raise InputError(
            f"this TVM installation does not work ({reason})",
            f"apache-tvm {tvm} with apache-tvm-ffi {ffi or '(not installed)'}",
            "apache-tvm-ffi >= 0.1.14, < 0.1.15",
            f"Run: {FIX}",
        )


def why_not(tvm: str, ffi: str) -> str | None:
    """What goes wrong with this pair of versions; None if nothing is known to. '' = absent."""
    if not ffi:
        return "tvm cannot be imported"
    if release(tvm)[:2] not in ((0, 26), (0, 27)):
        return None
    first_good, first_bad = FFI_RANGE
    if release(ffi) < first_good:
        return "tvm cannot be imported"
    if release(ffi) >= first_bad:
        return "Schedule.tensorize crashes the process"
    return None


@contextmanager
def without_torch() -> Iterator[None]:
    """Around the first import of TVM where nothing but compiled code will run.

    tvm_ffi imports torch wherever it is installed, which is most of TVM's own start. Hidden while
    tvm_ffi is loaded, torch can be imported afterwards as ever.
    """
    modules: dict[str, Any] = sys.modules
    hidden = "torch" not in modules
    if hidden:
        modules["torch"] = None  # what makes `import torch` an ImportError
    try:
        yield
    finally:
        if hidden:
            del modules["torch"]


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version: '0.1.15.post2' -> (0, 1, 15). Source: PEP 440."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
