"""Measure, train, judge, and write the cost model of a target: cost_models/<target> in one go."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hwmpq import targets
from hwmpq.errors import HwmpqError
from hwmpq.measure.store import Store
from hwmpq.predict import Predictor
from hwmpq.predict.train import train
from hwmpq.side_jobs import sample_cells
from hwmpq.stages.job import Options


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="native", help="a target's name")
    parser.add_argument("--store", help="file or URL of the store (default: the user's)")
    parser.add_argument("--out", type=Path, help="folder (default: cost_models/<target>)")
    parser.add_argument("--fingerprint", default="", help="the machine, where there are several")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rows", type=int, default=0, help="cells to measure first (default: 0, none)"
    )
    parser.add_argument("--max-time", type=float, help="seconds to measure at most")
    parser.add_argument("--threads", type=int, default=1, help="of the cells to measure")
    parser.add_argument("--prior", type=Path, help="folder of another target's model to start from")
    parser.add_argument(
        "--ablate", action="store_true", help="also judge without parts of the features"
    )
    args = parser.parse_args()
    try:
        target = targets.load(args.target)
        if args.rows:
            options = Options(
                "", target=target.name, store=args.store, seed=args.seed, max_time=args.max_time,
                threads=args.threads,
            )  # fmt: skip
            print(sample_cells(options, args.rows), file=sys.stderr)
        prior = Predictor.load(args.prior) if args.prior else None
        with Store.open(args.store) as store:
            _, report = train(
                store, target, args.out, args.seed, args.fingerprint, ablate=args.ablate,
                prior=prior,
            )  # fmt: skip
    except HwmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
