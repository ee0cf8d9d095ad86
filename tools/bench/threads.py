"""Python threads that call loaded artifacts all at once: right numbers, and memory that stays flat?

    python tools/bench/threads.py ARTIFACT ... [--threads 8] [--calls 10000] [--each]

Every thread calls every artifact in turn, at each of its batch sizes, on inputs whose outputs one
thread computed before. The artifacts are loaded once, or with --each once for each thread, so that
calls need not wait for one another. Prints one JSON object; ends with 1 where an output differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import record

from hwmpq import artifact

#: Different inputs of each batch size.
_INPUTS = 4


def cases(loaded: artifact.Artifact) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Seeded inputs of every batch size, and their outputs."""
    chance, found = np.random.default_rng(0), []
    for size in loaded.sizes:
        shapes = [(size, *entry["shape"][1:]) for entry in loaded.manifest["inputs"]]
        for _ in range(_INPUTS):
            inputs = [chance.standard_normal(shape).astype(np.float32) for shape in shapes]
            found.append((inputs, _outputs(loaded, inputs)))
    return found


def _outputs(loaded: artifact.Artifact, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    result = loaded(*inputs)
    return result if isinstance(result, list) else [result]


def hammer(
    sets: Sequence[Sequence[artifact.Artifact]], threads: int, calls: int
) -> tuple[int, int]:
    """How many of the calls gave other outputs, and the bytes of memory held at the end.

    sets: the loaded artifacts of each thread; with one, all threads share it.
    """
    known = [cases(one) for one in sets[0]]
    wrong = [0] * threads

    def work(number: int) -> None:
        own = sets[number % len(sets)]
        for k in range(number, number + calls):
            which = k % len(own)
            inputs, want = known[which][k // len(own) % len(known[which])]
            wrong[number] += not all(map(np.array_equal, _outputs(own[which], inputs), want))

    started = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return sum(wrong), resident()


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=10_000, help="of each thread")
    parser.add_argument("--each", action="store_true", help="one instance for each thread")
    record.option(parser)
    given = parser.parse_args()
    count = given.threads if given.each else 1
    sets = [[artifact.load(path) for path in given.artifacts] for _ in range(count)]
    _, before = hammer(sets, given.threads, given.calls // 10)
    began = time.perf_counter()
    wrong, after = hammer(sets, given.threads, given.calls)
    told = {
        "calls": given.threads * given.calls, "wrong": wrong, "grown_bytes": after - before,
        "resident_bytes": after, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    print(json.dumps(told))
    record.write(given.json, record.quantities(told))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
