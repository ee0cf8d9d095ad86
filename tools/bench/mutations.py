"""Damaged copies of an artifact: each must be refused, or compute the very same numbers.

    python tools/bench/mutations.py ARTIFACT [--count 10000] [--key KEY.pub] [--cpp RUNNER]

Bits are flipped, files cut, lengthened, exchanged, linked, added and taken away; entries of the
manifest are removed, exchanged and replaced, also with hashes made to fit (`forged`): those only a
signature finds, so they are judged with --key alone. With --cpp the C++ runner of examples/cpp
must come to the same verdict on every copy. A crash ends this program, which then names the copy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record

from hwmpq import artifact
from hwmpq.artifact.manifest import interface
from hwmpq.errors import InputError

#: Values put in place of others in a manifest.
_ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2, 3, 2**31, 2**70, 1e300, 0.5, "", "x", "../x", "/etc/passwd", "float16",
    "\0", "é", [], {}, [1], [[]], {"name": "x"}, ["avx9000"],
)  # fmt: skip
REFUSED, EQUAL, DIFFERENT = "refused", "equal", "different"


def mutate(folder: Path, chance: random.Random, forge: bool) -> str:
    """Damage an artifact; says how. Its files are replaced, never written to: they may be links.

    forge: the hashes may be made to fit."""
    kinds = [_flip, _flip, _cut, _lengthen, _exchange, _link, _add, _remove, _edit, _edit, _edit]
    done = chance.choice(kinds)(folder, chance)
    if forge and chance.random() < 0.5 and _reseal(folder):
        done += ", forged"
    return done


def verdict(folder: Path, key: Path | None, want: list[np.ndarray]) -> str:
    """What the Python loader makes of it; want: the outputs on the golden inputs."""
    try:
        got = outputs(artifact.load(folder, key))
    except InputError:
        return REFUSED
    return EQUAL if all(map(np.array_equal, got, want)) else DIFFERENT


def outputs(loaded: artifact.Artifact) -> list[np.ndarray]:
    """All outputs on two seeded inputs."""
    chance, found = np.random.default_rng(0), []
    for _ in range(2):
        shapes = [entry["shape"] for entry in loaded.manifest["inputs"]]
        result = loaded(*(chance.standard_normal(s).astype(np.float32) for s in shapes))
        found += result if isinstance(result, list) else [result]
    return found


def mutants(
    whole: Path, place: Path, count: int, seed: int, forge: bool
) -> Iterator[tuple[Path, str]]:
    """Damaged copies in `place`, and what was done to each. Files that stay whole are hard links to
    those of `whole`, on the same disk."""
    chance = random.Random(seed)
    for number in range(count):
        copy = place / str(number)
        shutil.copytree(whole, copy, copy_function=os.link)
        yield copy, mutate(copy, chance, forge)


def _some(folder: Path, chance: random.Random) -> Path:
    """A file; the manifest as often as all others together."""
    files = sorted(folder.iterdir())
    return folder / "manifest.json" if chance.random() < 0.5 else chance.choice(files)


def _put(path: Path, raw: bytes) -> None:
    path.unlink()
    path.write_bytes(raw)


def _flip(folder: Path, chance: random.Random) -> str:
    path = _some(folder, chance)
    raw = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    _put(path, bytes(raw))
    return f"bit {bit} of {path.name}"


def _cut(folder: Path, chance: random.Random) -> str:
    path = _some(folder, chance)
    size = chance.randrange(path.stat().st_size)
    _put(path, path.read_bytes()[:size])
    return f"{path.name} cut to {size} bytes"


def _lengthen(folder: Path, chance: random.Random) -> str:
    path = _some(folder, chance)
    more = chance.choice([b"\0", b" ", b"}", b"\n", bytes(4096)])
    _put(path, path.read_bytes() + more)
    return f"{len(more)} bytes after {path.name}"


def _exchange(folder: Path, chance: random.Random) -> str:
    one, other = chance.sample(sorted(folder.iterdir()), 2)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    return f"{one.name} and {other.name} exchanged"


def _link(folder: Path, chance: random.Random) -> str:
    path = _some(folder, chance)
    aside = folder.parent / f"{folder.name}.{path.name}"
    path.rename(aside)
    kind = chance.choice(["symlink", "pipe", "folder"])
    if kind == "symlink":
        path.symlink_to(aside)
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    return f"{path.name} as a {kind}"


def _add(folder: Path, chance: random.Random) -> str:
    name = chance.choice(["more", ".hidden", "libc.so.6", "model.so.1", "a\nb"])
    (folder / name).write_bytes(b"x")
    return f"{name!r} added"


def _remove(folder: Path, chance: random.Random) -> str:
    path = _some(folder, chance)
    path.unlink()
    return f"{path.name} removed"


def _edit(folder: Path, chance: random.Random) -> str:
    """One entry of the manifest, anywhere in it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    places = list(_places(manifest))
    holder, key, name = chance.choice(places)
    how = chance.randrange(3)
    if how == 0:
        del holder[key]
        done = f"{name} removed"
    elif how == 1:
        holder[key] = value = chance.choice(_ODD)
        done = f"{name} = {value!r}"
    else:
        other, place, its_name = chance.choice(places)
        holder[key], other[place] = other[place], holder[key]
        done = f"{name} and {its_name} exchanged"
    try:
        text = json.dumps(manifest)
    except ValueError:  # a part put into itself
        text = "{}"
    _put(path, text.encode())
    return done


def _places(value: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, part in items:
        yield value, key, f"{name}/{key}"
        yield from _places(part, f"{name}/{key}")


def _reseal(folder: Path) -> bool:
    """Make the hashes in the manifest fit; False where nobody could."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text()) if path.is_file() else None
        for name in manifest["files"]:
            file = folder / name
            if not file.is_file():  # also a pipe, which nobody fills
                return False
            manifest["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest["interface"] = interface(manifest)
        _put(path, json.dumps(manifest).encode())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False
    return True


def compare(
    whole: Path, count: int, seed: int, key: Path | None, cpp: Sequence[str | Path],
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Counter[str], list[str]]:  # fmt: skip
    """How often each verdict was reached, and what went wrong.

    cpp: the command of the C++ runner, or nothing. tell: gets each copy's damage.
    """
    want = outputs(artifact.load(whole, key))
    counts: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        own = Path(shutil.copytree(whole, Path(folder) / "whole"))
        for start in range(0, count, 250):
            place = Path(folder) / str(start)
            place.mkdir()
            batch = min(250, count - start)
            found = []
            for copy, done in mutants(own, place, batch, seed + start, forge=key is not None):
                tell(done)
                found.append((copy, done, verdict(copy, key, want)))
                counts[found[-1][2]] += 1
            wrong += [done for _, done, result in found if result == DIFFERENT]
            if cpp:
                refused = cpp_refused(cpp, [copy for copy, _, _ in found], key)
                wrong += [
                    f"{done}: Python {result}, C++ {'refused' if no else 'took it'}"
                    for (_, done, result), no in zip(found, refused, strict=True)
                    if (result == REFUSED) != no
                ]
            shutil.rmtree(place)
    return counts, wrong


def cpp_refused(runner: Sequence[str | Path], copies: list[Path], key: Path | None) -> list[bool]:
    """Which of the copies the C++ runner refuses."""
    required = ["--require-signature", str(key)] if key else []
    command = [*runner, "check", *required, *copies]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = ran.stdout.splitlines()
    if len(lines) != len(copies):
        raise SystemExit(f"the runner ended ({ran.returncode}) after {len(lines)} copies")
    return [line.startswith(REFUSED) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key", type=Path, help="require this signature; forge hashes too")
    parser.add_argument("--cpp", type=Path, help="runner of examples/cpp to compare with")
    record.option(parser)
    given = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", prefix="mutation-", delete=False) as log:
        print(f"the copy at work is named in {log.name}", file=sys.stderr)

        def tell(done: str) -> None:
            log.seek(0)
            log.truncate()
            log.write(done)
            log.flush()

        cpp = [given.cpp] if given.cpp else []
        counts, wrong = compare(given.artifact, given.count, given.seed, given.key, cpp, tell)
    Path(log.name).unlink()
    print(json.dumps({**counts, "wrong": wrong}, indent=1))
    record.write(given.json, record.quantities({**counts, "wrong": len(wrong)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
