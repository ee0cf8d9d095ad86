"""Looking into torch's zip archives before torch does.

A pickle may name any function and have it called. Here its opcodes are read, not run: only the few
names that rebuild plain tensors may occur. What passed is packed anew, so that torch reads exactly
the bytes that were inspected, whatever another zip reader would have found in the file.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from hwmpq.errors import InputError, UnsafeFile

#: all that a pickle may name
TENSOR_NAMES = frozenset(
    {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
     "collections OrderedDict", "torch serialization._get_layout", "torch device",
     "torch Size"}
    | {f"torch {kind}Storage" for kind in (
        "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
    )}
)  # fmt: skip
#: what to do with a file of anything else
PLAIN = "Save the weights with safetensors.torch.save_file."
#: opcodes that call, build or extend something under a name that the opcodes do not spell out
_OPAQUE = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


def check_pickle(data: bytes, where: str) -> None:
    """Read a pickle's opcodes without running them.

    Raises UnsafeFile for any name outside TENSOR_NAMES and for what cannot be read.
    """
    try:
        opcodes = list(pickletools.genops(data))
    except Exception as error:
        raise UnsafeFile("pickle that cannot be read", where, "tensors only") from error
    for opcode, argument, _ in opcodes:
        named = opcode.name == "GLOBAL" and argument not in TENSOR_NAMES
        if named or opcode.name in _OPAQUE:
            got = f"{opcode.name} {argument or ''}".strip()
            raise UnsafeFile(
                f"{where} would run code when unpickled",
                got,
                "tensors only",
                PLAIN,
            )


def read_archive(source: Path | bytes, what: str = "") -> dict[str, bytes]:
    """Members of a zip archive by name.

    Raises: InputError for a broken archive; UnsafeFile for a member that is named twice, reaches
    outside its folder, or is compressed or encrypted (torch stores its members plainly).
    """
    what = what or str(source)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            _check_members(infos, what)
            return {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise InputError("broken archive", f"{what} ({error})", next="Copy it again.") from error


def _check_members(infos: list[zipfile.ZipInfo], what: str) -> None:
    seen: set[str] = set()
    for info in infos:
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise UnsafeFile(f"{what}: member outside the archive", info.filename)
        if info.filename in seen:
            raise UnsafeFile(f"{what}: member named twice", info.filename)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UnsafeFile(f"{what}: compressed or encrypted member", info.filename)
        seen.add(info.filename)


def check_tensor_archive(members: Mapping[str, bytes], where: str) -> None:
    """A torch zip archive that holds tensors only. Raises UnsafeFile, InputError."""
    pickles = [name for name in members if name.endswith(".pkl")]
    data = [name for name in pickles if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(data) != 1 or len(pickles) != 1:
        raise UnsafeFile(
            f"{where} is no archive of tensors", ", ".join(pickles) or "no data.pkl", next=PLAIN
        )
    root = data[0].split("/")[0]
    plain = ("data/", "version", "byteorder", ".data/", ".format_version", ".storage_alignment")
    for name in members:
        inner = name.removeprefix(f"{root}/")
        if name != data[0] and (inner == name or not inner.startswith(plain)):
            raise UnsafeFile(f"{where} is no archive of tensors", name, next=PLAIN)
    check_pickle(members[data[0]], where)


def repack(members: Mapping[str, bytes]) -> bytes:
    """A stored zip archive of exactly these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()
