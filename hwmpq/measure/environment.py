"""Which machine this is, and what is installed: keys of measurements and facts beside them."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwmpq import targets
from hwmpq.types import digest

_CPU = Path("/sys/devices/system/cpu")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
#: Taken where the system does not tell the size of its L2 cache: large, so that "cold" holds.
_UNKNOWN_L2_BYTES = 4 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@functools.cache
def hardware() -> dict[str, Any]:
    """The CPU's identity: model, machine, a hash of its instruction-set flags, caches in bytes
    per level (of the first core), cores of the machine. A part of every key."""
    info = _cpuinfo()
    flags = sorted(targets.cpu_flags())
    parts = ("CPU implementer", "CPU part", "CPU variant")
    model = info.get("model name") or " ".join(info[part] for part in parts if part in info)
    return {
        "model": model or platform.processor() or "unknown",
        "machine": platform.machine(),
        "flags": digest(flags),
        "caches": _caches(),
        "cores": os.cpu_count() or 1,
    }


def fingerprint() -> str:
    """A short stable name of this hardware, e.g. 'x86_64-2c-1f0c2a9b4e77d3aa'."""
    facts = hardware()
    return f"{facts['machine']}-{facts['cores']}c-{digest(facts)}"


def conditions() -> dict[str, Any]:
    """What is recorded with a measurement and is no part of its key; date: seconds since 1970;
    huge_pages: the system's setting; virtual: is this a guest of a hypervisor?"""
    governor = _read(_CPU / "cpu0/cpufreq/scaling_governor")
    frequency = _read(_CPU / "cpu0/cpufreq/scaling_cur_freq")
    pages = re.search(r"\[(\w+)\]", _read(_HUGE_PAGES))
    return {
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "kernel": f"{platform.system()} {platform.release()}",
        "date": time.time(),
        "governor": governor or None,
        "frequency_hz": int(frequency) * 1000 if frequency.isdigit() else None,
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "huge_pages": pages[1] if pages else None,
        "virtual": "hypervisor" in _cpuinfo().get("flags", "").split(),
    }


def doubts(found: Mapping[str, Any]) -> list[str]:
    """What in the `conditions` makes times of this machine hard to trust; told before timing."""
    told = []
    cores = os.cpu_count() or 1
    if found["load"] and found["load"][0] > cores:
        told.append(f"load average {found['load'][0]:.1f} on {cores} cores: other work disturbs it")
    if found["governor"] not in (None, "performance"):
        told.append(f"the CPU's governor is {found['governor']}: its clock changes with the load")
    return told


def toolchain(codegen: str = "") -> dict[str, str]:
    """Versions that make the code: tvm, tvm-ffi, llvm, and hwmpq's own code generation (given).

    Imports tvm, for LLVM's version. What is not installed is ''.
    """
    return {
        "tvm": _version("apache-tvm"),
        "tvm-ffi": _version("apache-tvm-ffi"),
        "llvm": _llvm(),
        "codegen": codegen,
    }


def l2_bytes() -> int:
    """Size of one core's L2 cache in bytes."""
    return int(hardware()["caches"].get("L2", _UNKNOWN_L2_BYTES))


def parse_size(text: str) -> int:
    """'512K' or '1 MiB' in bytes; 0 for what is not a size."""
    match = re.match(r"\s*([\d.]+)\s*([KMG]?)", text)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def _caches() -> dict[str, int]:
    """Bytes of the first core's data and unified caches, from sysfs, else from lscpu."""
    found: dict[str, int] = {}
    for index in sorted((_CPU / "cpu0/cache").glob("index*")):
        if _read(index / "type") != "Instruction":
            found[f"L{_read(index / 'level')}"] = parse_size(_read(index / "size"))
    if not found:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["lscpu", "--caches=NAME,ONE-SIZE"]
            text = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
            for line in text.splitlines()[1:]:
                name, size = line.split()
                if not name.endswith("i"):
                    found[name.removesuffix("d")] = parse_size(size)
    return {name: size for name, size in sorted(found.items()) if size}


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    first = _read(Path("/proc/cpuinfo")).split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _llvm() -> str:
    try:
        from tvm.target.codegen import llvm_version_major
    except ImportError:
        return ""
    return str(llvm_version_major())
