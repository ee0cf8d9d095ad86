"""Pair terms by one worker and by several: the same numbers, how much sooner, and after a crash?

    python tools/bench/executor.py MODEL CALIB_DATA [WEIGHTS] [--images 32] [--formats fp32,w4a4]
        [--workers 2] [--ray]

The `clado` estimator on the calibration images: in this process, by one worker, by --workers, and
by --workers of which one is killed in the middle. Every worker has one thread and was used before,
so that torch is loaded. Prints one JSON object; ends with 1 where any number differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

from hwmpq import sensitivity
from hwmpq.executor import Pool, open_pool
from hwmpq.measure import WorkerProcess
from hwmpq.measure.worker import answer
from hwmpq.stages.facts import calibrate
from hwmpq.stages.job import Options, Silent, load_images, open_job
from hwmpq.stages.menu import make_menu
from hwmpq.types import Sensitivity


def opened(words: argparse.Namespace, store: Path) -> Callable[..., Sensitivity]:
    """A pool or None, and who is told of the progress -> the estimates."""
    options = Options(
        words.model, weights=words.weights, calib_data=words.data, calib=words.images,
        formats=tuple(words.formats.split(",")), store=str(store),
    )  # fmt: skip
    job = open_job(options, Silent(), here=False)
    images = load_images(job)
    menu = make_menu(job.network, job.target, options.formats)
    quantizers = calibrate(job, images, menu)
    x = torch.from_numpy(images.calib.batch(range(len(images.calib))))
    labels = None if images.calib.labels is None else torch.from_numpy(images.calib.labels)

    def run(pool: Pool | None, progress: Any = None) -> Sensitivity:
        return sensitivity.estimate(
            "clado", quantizers.graph(job.graph), quantizers, x, labels, formats=menu.formats,
            legal=menu.legal, pool=pool, progress=progress,
        )  # fmt: skip

    return run


def killer(pool: Pool) -> Callable[[int, int, float], None]:
    """Progress that ends the first worker, once, as soon as the first items are done: with the rest
    of its part in its hands."""
    pid = pool.workers[0].call("ping", {"payload": {}}, 60.0)["pid"]
    alive = threading.Lock()

    def note(_done: int, _of: int, _left: float) -> None:
        if alive.acquire(blocking=False):
            os.kill(pid, signal.SIGKILL)

    return note


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("weights", nargs="?")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--formats", default="fp32,w4a4")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", action="store_true", help="actors of a local Ray cluster")
    record.option(parser)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = opened(words, Path(folder) / "store.sqlite")
    torch.set_num_threads(1)
    found: dict[str, Sensitivity] = {}
    seconds: dict[str, float] = {}

    def timed(name: str, pool: Pool | None, progress: Any = None) -> None:
        began = time.perf_counter()
        found[name] = run(pool, progress)
        seconds[name] = time.perf_counter() - began

    timed("here", None)
    for count in (1, words.workers):
        with pool_of(count, words.ray) as pool:
            run(pool)
            timed(f"{count} workers", pool)
            if count > 1:
                timed(f"{count} workers, one killed", pool, killer(pool))
    first = found["here"]
    equal = all(
        np.array_equal(one.loss, first.loss, equal_nan=True)
        and np.array_equal(one.pair_loss, first.pair_loss)
        for one in found.values()
    )
    told = {
        "model": words.model, "images": words.images, "formats": words.formats,
        "executor": "ray" if words.ray else "processes", "seconds": seconds,
        "speed_up": seconds["1 workers"] / seconds[f"{words.workers} workers"], "equal": equal,
    }  # fmt: skip
    print(json.dumps(told))
    record.write(words.json, record.quantities(told))
    return 0 if equal else 1


def pool_of(count: int, ray: bool) -> Pool:
    if ray:
        import ray as cluster

        cluster.shutdown()
        cluster.init(num_cpus=count, include_dashboard=False, log_to_driver=False)
    pool = open_pool("ray" if ray else f"processes:{count}", WorkerProcess, answer)
    assert pool is not None
    return pool


if __name__ == "__main__":
    sys.exit(main())
