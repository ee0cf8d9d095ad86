"""Train the cost model of a target from the measured rows of a store."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hwmpq import targets
from hwmpq.errors import HwmpqError
from hwmpq.measure.store import Store
from hwmpq.predict.train import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="native", help="a target's name")
    parser.add_argument("--store", help="file or URL of the store (default: the user's)")
    parser.add_argument("--out", type=Path, help="folder (default: cost_models/<target>)")
    parser.add_argument("--fingerprint", default="", help="the machine, where there are several")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ablate", action="store_true", help="also judge without parts of the features"
    )
    args = parser.parse_args()
    try:
        target = targets.load(args.target)
        with Store.open(args.store) as store:
            _, report = train(
                store, target, args.out, args.seed, args.fingerprint, ablate=args.ablate
            )
    except HwmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
