"""Target: the facts about one class of chips, read from `targets/<name>.toml`.

A target describes a class (all CPUs with certain instructions), so its numbers are bounds: peaks
are the most that any chip of the class does, caches the least that one has. What a single machine
really has is the business of its device fingerprint.

Folders searched: the shipped ones, those named in HWMPQ_TARGET_PATH (separated as in PATH; TOML
only, nothing is executed), and packages named by the entry-point group `hwmpq.targets`, whose own
feature words the group `hwmpq.features` names. A name found twice is refused.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import json
import os
import platform
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hwmpq.errors import InputError, UnknownName

if TYPE_CHECKING:
    from pydantic import TypeAdapter

ENTRY_POINTS, FEATURE_POINTS = "hwmpq.targets", "hwmpq.features"


@dataclass(frozen=True)
class Feature:
    """A word by which kernels and targets meet.

    flags: the names on the `flags` (x86) or `Features` (ARM) line, or the extensions on the `isa`
    line (RISC-V), of Linux' /proc/cpuinfo, all of which must be there: the instruction group itself
    and those that compilers use freely on every CPU having it. Empty: the CPU cannot tell.
    """

    meaning: str
    flags: tuple[str, ...] = ()


#: The vocabulary of `Kernel.requires` and of `features` in a target file, without the words of
#: other packages.
FEATURES: Mapping[str, Feature] = {
    "avx2": Feature(
        "x86 256-bit integer vectors, and the rest of x86-64-v3 (BMI1, BMI2, LZCNT, MOVBE)",
        ("avx2", "bmi1", "bmi2", "abm", "movbe"),
    ),
    "fma": Feature("x86 fused multiply-add on 256-bit vectors", ("fma",)),
    "f16c": Feature("x86 conversion between fp16 and fp32", ("f16c",)),
    "avx512f": Feature("x86 512-bit vectors (F, CD)", ("avx512f", "avx512cd")),
    "avx512bw": Feature("8- and 16-bit lanes of AVX-512 (BW, DQ)", ("avx512bw", "avx512dq")),
    "avx512vl": Feature("AVX-512 instructions on 128- and 256-bit vectors", ("avx512vl",)),
    "avx512vnni": Feature("u8 x s8 -> s32 dot products, 512-bit", ("avx512_vnni",)),
    "avxvnni": Feature("u8 x s8 -> s32 dot products, 256-bit VEX encoding", ("avx_vnni",)),
    "avx512bf16": Feature("bf16 x bf16 -> fp32 dot products, 512-bit", ("avx512_bf16",)),
    "avx512fp16": Feature(
        "fp16 arithmetic, 512-bit, and the AVX-512 groups every CPU with it has (VBMI, VBMI2, "
        "IFMA, BITALG, VPOPCNTDQ, GFNI)",
        (
            "avx512_fp16",
            "avx512vbmi",
            "avx512_vbmi2",
            "avx512ifma",
            "avx512_bitalg",
            "avx512_vpopcntdq",
            "gfni",
        ),
    ),
    "amx-tile": Feature("x86 tile registers (the process must ask Linux first)", ("amx_tile",)),
    "amx-int8": Feature("8-bit integer tile products", ("amx_int8",)),
    "amx-bf16": Feature("bf16 tile products", ("amx_bf16",)),
    "neon": Feature("ARM 128-bit vectors", ("asimd",)),
    "dotprod": Feature("ARM 8-bit dot products (SDOT, UDOT)", ("asimddp",)),
    "i8mm": Feature("ARM 8-bit matrix products (SMMLA, USMMLA)", ("i8mm",)),
    "bf16": Feature("ARM bf16 products (BFDOT, BFMMLA)", ("bf16",)),
    "fp16": Feature("ARM fp16 arithmetic", ("fphp", "asimdhp")),
    "v": Feature("RISC-V vectors 1.0", ("v",)),
    "sm80": Feature("NVIDIA compute capability 8.0: int8, int4, fp16, bf16 tensor cores"),
    "sm89": Feature("NVIDIA compute capability 8.9: also e4m3 and e5m2 products of a warp"),
    "sm90": Feature("NVIDIA compute capability 9.0: e4m3 and e5m2 products of a group of warps"),
}


@dataclass(frozen=True)
class Caches:
    """Bytes of the data caches that one core can count on. l3: its share of a shared cache."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    l1d: int
    l2: int
    l3: int


@dataclass(frozen=True)
class TimingDefaults:
    """How a kernel is timed where the caller says nothing else: the fields of the same names of
    `hwmpq.measure`'s protocol. rounds: samples kept; epoch_s: about the seconds of one sample."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    rounds: int
    epoch_s: float


@dataclass(frozen=True)
class StaticModel:
    """How cycles are estimated where there is no chip (`hwmpq.measure.static_model`).

    cpu: the -mcpu of the scheduling model of LLVM 19 that comes closest; clock_hz: makes seconds of
    its cycles.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    cpu: str
    clock_hz: float


@dataclass(frozen=True)
class Measured:
    """What `target probe` measured on one machine: the clock of a busy core, and the bytes per
    second that one core reads from L1, L2, L3 and memory."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    clock_hz: float
    bandwidth: dict[str, float]


@dataclass(frozen=True)
class Target:
    """The facts about one class of chips.

    rank: `native()` prefers the highest. tvm: the dict for `tvm.target.Target`. vector_bytes:
    width of the widest vector register; registers: how many of them. peaks: '<activation>.<weight>'
    encodings that these features multiply natively -> most multiply-accumulates per cycle of one
    core.
    sources: for each of SOURCED, and of the static model and what was measured where they are, the
    documents the facts were taken from. emulator: what is put before a program of this class of
    chips to run it on another one, () where nothing is known. host: of a GPU, LLVM's name of the
    platform of the CPU beside it, '' = the one that runs this.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    SOURCED: ClassVar[frozenset[str]] = frozenset(
        {"features", "registers", "caches", "peaks", "protocol"}
    )

    name: str
    description: str
    rank: int
    tvm: dict[str, str | int | list[str]]
    features: frozenset[str]
    vector_bytes: int
    registers: int
    caches: Caches
    peaks: dict[str, float]
    protocol: TimingDefaults
    sources: dict[str, str]
    emulator: tuple[str, ...] = ()
    static_model: StaticModel | None = None
    measured: Measured | None = None

    host: str = ""

    @property
    def triple(self) -> str:
        """LLVM's name of the platform of its CPU, '' = the one that runs this."""
        return str(self.tvm.get("mtriple", self.host))

    @property
    def gpu(self) -> bool:
        """Do its kernels run on a device beside the CPU?"""
        return self.tvm["kind"] == "cuda"

    @property
    def foreign(self) -> bool:
        """Are its programs those of another kind of machine than the one that runs this?"""
        return is_foreign(self.triple)


def is_foreign(triple: str) -> bool:
    """Is that the platform of another kind of machine than the one that runs this? '' is not."""
    return bool(triple) and triple.partition("-")[0] != platform.machine()


def names() -> list[str]:
    """All targets that can be loaded, sorted."""
    return sorted(_files())


def load(name: str) -> Target:
    """The target of that name; 'native' is `native()`.

    Raises: UnknownName with the nearest names; InputError for a file that breaks the schema.
    """
    if name == "native":
        return native()
    files = _files()
    if name not in files:
        raise UnknownName("target", name, {*files, "native"})
    return read(files[name])


def read(path: Path) -> Target:
    """The target in a TOML file; its name is the file's.

    Raises: InputError naming the file and every broken rule; UnknownName for a feature word.
    """
    from pydantic import ValidationError

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"unreadable target file {path}", error, "a TOML file", "Correct it, or move it away."
        ) from error
    if "name" in data:
        raise InputError(
            f"target file {path} has a key `name`", next="The file names it: remove it."
        )
    try:  # as JSON: the strict reading of it takes lists for sets and tables for dataclasses
        text = json.dumps({"name": path.stem, **data}, default=str)
        target = _schema().validate_json(text)
    except ValidationError as error:
        broken = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"target file {path}", "; ".join(broken)) from error
    check_features(target.features, f"target file {path}")
    optional = {name for name in ("static_model", "measured") if getattr(target, name)}
    sourced = Target.SOURCED | optional
    if set(target.sources) != sourced or not all(target.sources.values()):
        raise InputError(f"sources in target file {path}", sorted(target.sources), sorted(sourced))
    return target


@cache
def _schema() -> TypeAdapter[Target]:
    """Making it takes longer than to read a file by it."""
    from pydantic import TypeAdapter

    return TypeAdapter(Target)


def check_features(words: Iterable[str], where: str) -> None:
    """Refuse a feature word outside the vocabulary. Raises: UnknownName naming `where`."""
    known = vocabulary()
    for word in words:
        if word not in known:
            raise UnknownName(f"feature in {where}", word, known)


@cache
def vocabulary() -> Mapping[str, Feature]:
    """All feature words: FEATURES, and tables like it that the entry-point group `hwmpq.features`
    names. Raises: InputError for a word that is defined twice."""
    found = dict(FEATURES)
    for point in entry_points(group=FEATURE_POINTS):
        for word, feature in point.load().items():
            if word in found:
                raise InputError("two features have one name", word, next="Uninstall one of them.")
            found[word] = feature
    return found


def native() -> Target:
    """The shipped target of the highest rank whose features this CPU has.

    Raises: InputError that says for each target what is missing.
    """
    shipped = [read(path) for path in sorted(data_folder("targets").glob("*.toml"))]
    missing = {target.name: satisfied_by_host(target) for target in shipped}
    fitting = [target for target in shipped if not missing[target.name]]
    if not fitting:
        raise InputError(
            "no shipped target fits this CPU",
            "; ".join(f"{name} lacks {' '.join(words)}" for name, words in missing.items()),
            next="Name a --target to compile for another machine, or add a target file.",
        )
    return max(fitting, key=lambda target: target.rank)


def satisfied_by_host(target: Target) -> list[str]:
    """The features of the target that this CPU lacks, sorted; empty if it can run there."""
    return sorted(target.features - host_features())


def host_features(cpuinfo: str | None = None) -> frozenset[str]:
    """The feature words of this CPU, or of one with the given text of /proc/cpuinfo."""
    flags = cpu_flags(cpuinfo)
    return frozenset(
        word
        for word, feature in vocabulary().items()
        if feature.flags and flags >= {*feature.flags}
    )


def cpu_flags(cpuinfo: str | None = None) -> frozenset[str]:
    """Linux' names of what this CPU can do, from /proc/cpuinfo or the given text of it; on ARM from
    the kernel itself, since an emulator shows the file of the machine that it runs on.

    Empty where there is no such file. Source: Linux arch/x86/include/asm/cpufeatures.h,
    Documentation/arch/arm64/elf_hwcaps.rst, Documentation/arch/riscv/uabi.rst.
    """
    if cpuinfo is None and platform.machine() == "aarch64":
        return _arm_flags()
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return frozenset()
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
        elif key.strip() == "isa":  # rv64imafdcv_zicsr_...: single letters, then long names
            base, *long = value.strip().removeprefix("rv64").removeprefix("rv32").split("_")
            flags.update(base, long)
    return frozenset(flags)


def _arm_flags() -> frozenset[str]:
    """Source: Linux arch/arm64/include/uapi/asm/hwcap.h, include/uapi/linux/auxvec.h."""
    words = {
        16: {"asimd": 1, "fphp": 9, "asimdhp": 10, "asimddp": 20},
        26: {"i8mm": 13, "bf16": 14},
    }
    ask = ctypes.CDLL(None).getauxval
    ask.argtypes, ask.restype = (ctypes.c_ulong,), ctypes.c_ulong
    return frozenset(
        name for word, bits in words.items() for name, bit in bits.items() if ask(word) >> bit & 1
    )


def data_folder(name: str) -> Path:
    """The folder 'targets' or 'cost_models': inside the package when installed from a wheel, beside
    it in a checkout or an editable install."""
    package = Path(__file__).resolve().parent
    installed = package / f"_{name}"
    return installed if installed.is_dir() else package.parent / name


def _files() -> dict[str, Path]:
    """Target name -> file. Raises: InputError when two folders hold the same name."""
    extra = os.environ.get("HWMPQ_TARGET_PATH", "")
    folders = [data_folder("targets"), *(Path(part) for part in extra.split(os.pathsep) if part)]
    for point in entry_points(group=ENTRY_POINTS):
        folders.append(Path(str(importlib.resources.files(point.value))))
    files: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError("no such folder of targets", folder, next="See HWMPQ_TARGET_PATH.")
        for path in sorted(folder.glob("*.toml")):
            if path.stem == "native" or files.setdefault(path.stem, path) != path:
                raise InputError(
                    f"target name {path.stem!r} is taken", path, next="Rename the file."
                )
    return files
