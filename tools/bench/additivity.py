"""Is the price of a plan its time? Random mixed assignments, predicted against measured.

    python tools/bench/additivity.py zoo:resnet20_cifar --calib-data npz:train.npz [--plans 10]

Cells come from the store (and are measured where it lacks them); the prices are fitted on the
uniform artifacts and a few random mixed ones, as `hwmpq quantize` does, and judged on others. All
are compiled, and timed in one interleaved run. inside: how many steps are priced by what they took
inside the fitted ones, for the sum of the cells was not good enough.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import record

from hwmpq.measure import WorkerProcess
from hwmpq.stages.bench import Bench, Clock
from hwmpq.stages.facts import Facts, calibrate
from hwmpq.stages.fit import Whole, fit_prices
from hwmpq.stages.job import Options, Silent, load_images, open_job
from hwmpq.stages.latency import profile
from hwmpq.stages.menu import make_menu
from hwmpq.stages.pricing import price
from hwmpq.types import Sensitivity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--calib-data", required=True)
    parser.add_argument("--plans", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="native")
    parser.add_argument("--store")
    record.option(parser)
    words = parser.parse_args()
    options = Options(
        words.model, weights=words.weights, calib_data=words.calib_data, target=words.target,
        seed=words.seed, calib=64, store=words.store,
    )  # fmt: skip
    job = open_job(options, Silent())
    images = load_images(job)
    menu = make_menu(job.network, job.target)
    latency = profile(job, menu)
    quantizers = calibrate(job, images, menu)
    none = Sensitivity(job.network.names, menu.formats, np.zeros((0, 0)), "none", 0)
    rng = np.random.default_rng([words.seed, 1])  # other plans than those of the fit
    facts = Facts(images, menu, quantizers, none, latency)
    with tempfile.TemporaryDirectory() as folder, WorkerProcess(threads=1) as worker:
        bench = Bench(job, facts, Clock(), Path(folder), worker)
        fitted = bench.uniforms() | bench.mixed()
        plans = dict(fitted)
        for i in range(words.plans):
            plans[f"random{i}"] = {
                n: str(rng.choice(sorted(menu.kernels[n]))) for n in job.network.names
            }
        mixed = {n: p for n, p in plans.items() if n not in bench.uniforms()}
        timed = bench.time({n: bench.compile(p, n, quantizers) for n, p in mixed.items()})
    wholes = [Whole(p, timed[n].latency_s, timed[n].calls_s) for n, p in fitted.items()]
    latency = fit_prices(job, latency, wholes)
    rows = []
    for name, plan in plans.items():
        predicted, measured = price(job, plan, latency), timed[name].latency_s
        rows.append({"plan": name, "predicted_s": predicted, "measured_s": measured})
        print(f"{name:10s} {predicted * 1e3:9.4f} ms {measured * 1e3:9.4f} ms "
              f"{predicted / measured:6.3f}", file=sys.stderr)  # fmt: skip
    random = [r for r in rows if str(r["plan"]).startswith("random")]
    errors = np.array([abs(r["predicted_s"] / r["measured_s"] - 1) for r in random])
    told = {
        "model": words.model, "target": job.target.name, "overhead_s": latency.overhead_s,
        "speed": latency.speed, "inside": len(latency.inside), "residual": latency.residual,
        "worst_error": float(errors.max()), "median_error": float(np.median(errors)),
        "within_10_percent": int((errors <= 0.10).sum()),
        "within_residual": int((errors <= latency.residual).sum()), "plans": len(random),
    }  # fmt: skip
    print(json.dumps({**told, "rows": rows}, indent=1))
    record.write(words.json, record.quantities(told), rows=rows)


if __name__ == "__main__":
    main()
