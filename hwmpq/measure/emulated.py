"""A machine of another kind, emulated: what the worker needs there, in the user's cache.

QEMU's user mode runs the worker as a program of that machine: no root rights, no port, no daemon.
It finds a Debian root with Python, unpacked from .deb files by a private configuration of apt, and
numpy and TVM's runtime from the wheels of that machine. Artifacts give there what they give on a
chip, and instructions that the chip lacks end them; seconds there mean nothing and are refused.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import platformdirs

from hwmpq import devices
from hwmpq.devices import Device
from hwmpq.errors import DeviceError, InputError
from hwmpq.targets import Target
from hwmpq.types import digest

#: The machine, as apt and as wheels name it; Debian's release, and the Python it has.
_ARCH, _MACHINE, _SUITE, _PYTHON = "arm64", "aarch64", "bookworm", "3.11"
_PACKAGES = (
    "python3-minimal", f"libpython{_PYTHON}-stdlib", "libstdc++6", "libgcc-s1", "libc6", "zlib1g",
    "libffi8", "libssl3", "libexpat1",
)  # fmt: skip
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux2014")
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_TOOLS = ("apt-get", "dpkg-deb")
#: The longest that a download may take.
_DEADLINE_S = 1800.0


def set_up(name: str, target: Target, note: Callable[[str], None]) -> Device:
    """Make a device that emulates a chip of the target, and describe it in devices.toml.

    Raises InputError where programs are missing, the target is none of an emulated kind or the name
    is taken; DeviceError where something cannot be fetched.
    """
    if target.triple.partition("-")[0] != _MACHINE or not target.emulator:
        raise InputError(
            f"no emulated device for target {target.name}", None, "a target that begins with arm-",
            "Kernels of other targets are emulated by `hwmpq target check`.",
        )  # fmt: skip
    lacking = [t for t in (target.emulator[0], *_TOOLS) if shutil.which(t) is None]
    if lacking:
        raise InputError(
            f"an emulated device needs {', '.join(lacking)}",
            next="On Debian: apt install qemu-user-static.",
        )
    known = devices.load_all().get(name)
    if known is not None and not known.emulated:
        raise InputError(
            "device name is taken", name, None, f"Choose another; it stands in {devices.path()}."
        )
    fetch(note)
    found = device(name, target)
    if known is None:
        devices.append(found)
    elif known != found:
        raise InputError(
            f"device {name} is another emulated machine", known.target, found.target,
            f"Choose another name, or remove it from {devices.path()}.",
        )  # fmt: skip
    return found


def device(name: str, target: Target) -> Device:
    """The emulated chip of a target."""
    root = place()
    cpu = target.emulator[: target.emulator.index("-L")]
    libraries = ":".join(str(root / f"{part}lib/{_MACHINE}-linux-gnu") for part in ("usr/", ""))
    settings = {
        "PYTHONHOME": root / "usr", "PYTHONPATH": root / "wheels", "LD_LIBRARY_PATH": libraries,
        "TVM_USE_RUNTIME_LIB": 1,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in ("-E", f"{key}={value}")]
    return Device(
        name, "exec", prefix=(*cpu, "-L", str(root), *words), target=target.name, emulated=True,
        python=str(root / f"usr/bin/python{_PYTHON}"),
    )  # fmt: skip


def place() -> Path:
    """Where the emulated machine's files lie, once they are fetched."""
    key = digest([_ARCH, _SUITE, _PYTHON, *_PACKAGES, *_wheels()])
    return platformdirs.user_cache_path("hwmpq") / f"guest-{_MACHINE}-{key}"


def fetch(note: Callable[[str], None]) -> None:
    """Make that folder, if it is not there."""
    final = place()
    if final.is_dir():
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".guest-", dir=final.parent) as folder:
        aside = Path(folder) / "root"
        note(f"Python {_PYTHON} of Debian {_SUITE} for {_ARCH}")
        _debian(aside, Path(folder) / "apt")
        note(f"wheels for {_MACHINE}: {', '.join(_wheels())}")
        _unpack(aside / "wheels", Path(folder) / "wheels")
        try:
            aside.rename(final)
        except OSError:  # another process was first
            if not final.is_dir():
                raise


def _wheels() -> list[str]:
    """What TVM's runtime needs there; of TVM the versions that compile here."""
    ours = [f"{name}=={version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]
    return [*ours, "numpy", "ml_dtypes", "typing_extensions"]


def _debian(root: Path, work: Path) -> None:
    """Unpack the packages and all that they need; nothing of this machine's apt is touched."""
    for part in ("etc", "state/lists/partial", "cache/archives/partial"):
        (work / part).mkdir(parents=True)
    (work / "status").touch()
    (work / "etc/sources.list").write_text(
        f"deb [signed-by={_KEYS}] http://deb.debian.org/debian {_SUITE} main\n"
    )
    settings = {
        "APT::Architecture": _ARCH, "Dir::Etc": work / "etc", "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::sourcelist": work / "etc/sources.list", "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": work / "state", "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache", "APT::Install-Recommends": "false",
        "Acquire::Languages": "none", "APT::Sandbox::User": "", "Debug::NoLocking": "true",
    }  # fmt: skip
    lines = [f'{key} "{value}";\n' for key, value in settings.items()]
    lines.append(f'APT::Architectures {{ "{_ARCH}"; }};\n')
    (work / "apt.conf").write_text("".join(lines))
    environment = {**os.environ, "APT_CONFIG": str(work / "apt.conf")}
    _run(["apt-get", "-q", "update"], environment)
    _run(["apt-get", "-q", "-y", "--download-only", "install", *_PACKAGES], environment)
    root.mkdir()
    for package in sorted((work / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(root)])


def _unpack(to: Path, work: Path) -> None:
    """Unpack wheels; of TVM only its Python files and the runtime library, not the compiler."""
    platforms = [word for p in _PLATFORMS for word in ("--platform", f"{p}_{_MACHINE}")]
    _run(
        [
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            "--python-version", _PYTHON, "--implementation", "cp", *platforms, "-d", str(work),
            *_wheels(),
        ]
    )  # fmt: skip
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            parts = [n for n in packed.namelist() if "/3rdparty/" not in n]
            packed.extractall(to, [n for n in parts if "libtvm_compiler" not in n])


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Raises DeviceError with the last lines of what the program said."""
    try:
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_DEADLINE_S,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError("setting up an emulated machine", error) from None
    if ran.returncode:
        last = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-8:])
        raise DeviceError(f"{command[0]} failed", f"exit status {ran.returncode}", next=last)
