"""One-shot search against its controls, at equal bit operations and equally many steps.

    python tools/bench/fliqs.py zoo:resnet20_cifar --weights F --train-data npz:train.npz \
        --data npz:test.npz --out DIR [--train steps=1560] [--only search,controls,ablation,uniform]

Every row is kept in DIR/rows.json, every run in a folder of DIR: started again it goes on. Nothing
is compiled; accuracies are the exact simulator's. "drop" is against the float model on the same
images; its interval is the paired one. The target is a uniform w4a4's bit operations, unless
--share says otherwise.

  search     mixed menu with --seeds seeds, integers and floats with one: no retraining
  controls   (a) the plan found, retrained from the float weights; (b) uniform w4a4;
             (c) the plans of Hessian traces and of Gauss-Newton pairs; (d) random plans
  ablation   the search without its penalty on entropy
  uniform    every format alone, trained as long: integers against floats
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwmpq import data as sets
from hwmpq.formats import bops, format_named
from hwmpq.frontend.model import load_model
from hwmpq.graph import network_of
from hwmpq.methods.fliqs.policy import cost_gap
from hwmpq.methods.fliqs.settings import parsed
from hwmpq.methods.fliqs.train import search
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.finetune import finetune
from hwmpq.quantize.judge import judge, predict
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.search import solve
from hwmpq.search.evaluate import choice_of, evaluate, index_of
from hwmpq.search.random import samples
from hwmpq.sensitivity import estimate
from hwmpq.types import Assignment, Problem

INTEGERS = ("w8a8", "w7a7", "w6a6", "w5a5", "w4a4", "w3a3")
FLOATS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
MENUS = {"int": INTEGERS, "float": FLOATS, "mixed": (*INTEGERS, *FLOATS)}
PARTS = ("search", "controls", "ablation", "uniform")
#: Images for ranges, and for sensitivities; random plans; how near to the target they must be.
CALIBRATION, SENSITIVITY, RANDOM, NEAR = 512, 128, 3, 0.97


class Bench:
    """The model, its images, and the rows so far."""

    def __init__(self, words: argparse.Namespace):
        self.out = Path(words.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.settings = parsed([w for w in words.train.split(",") if w], 0)
        model = load_model(words.model, Path(words.weights) if words.weights else None, None)
        self.graph = model.graph()
        shape = self.graph.tensors[self.graph.inputs[0]]

        def load(spec: str) -> sets.DataSet:
            return sets.load(spec, model.normalization, shape, model.classes)

        self.train, self.test = load(words.train_data), load(words.data)
        if words.eval:
            self.test = self.test.subset(range(words.eval))
        self.steps = self.settings.training(len(self.train)).steps
        self.layers = network_of(self.graph).layers
        four = sum(bops(format_named("w4a4"), layer.workload.macs) for layer in self.layers)
        self.target = words.share * four
        x = torch.from_numpy(self.train.batch(range(CALIBRATION)))
        self.start = calibrate(self.graph, x.split(64), MENUS["mixed"])
        plain = dict.fromkeys((la.name for la in self.layers), "fp32")
        self.float_logits = predict(Simulator(self.graph, plain, self.start), self.test)
        self.rows: dict[str, Any] = {}
        if (self.out / "rows.json").exists():
            self.rows = json.loads((self.out / "rows.json").read_text())

    def problem(self, menu: Sequence[str]) -> Problem:
        """Bit operations alone."""
        work = [[bops(format_named(f), la.workload.macs) for f in menu] for la in self.layers]
        cells = np.array(work, float)
        return Problem(
            tuple(la.name for la in self.layers), tuple(menu), loss=np.zeros_like(cells),
            bops=cells, legal=np.ones(cells.shape, bool), budgets={"bops": self.target},
        )  # fmt: skip

    def row(self, name: str, make: Callable[[], tuple[Assignment, Quantizers, Any]]) -> Any:
        """Make it, judge it and keep it, unless it is there."""
        if name not in self.rows:
            plan, numbers, more = make()
            outputs = predict(Simulator(self.graph, plan, numbers), self.test)
            assert self.test.labels is not None
            found = judge(self.float_logits, outputs, torch.from_numpy(self.test.labels), "")
            problem = self.problem(MENUS["mixed"])
            share = cost_gap(problem, index_of(problem, plan))["bops"]
            self.rows[name] = {**asdict(found), "bops / target": share, "plan": plan, **more}
            (self.out / "rows.json").write_text(json.dumps(self.rows, indent=1, default=float))
        row = self.rows[name]
        low, high = row["drop_interval"]
        print(
            f"{name:<28} top-1 {row['simulated']:6.2f}  drop {row['drop']:5.2f} [{low:.2f}, "
            f"{high:.2f}]  cost {row['bops / target']:.3f}", flush=True,
        )  # fmt: skip
        return row

    def searched(self, name: str, menu: str, seed: int, **changes: Any) -> Any:
        """A run of the search; its most probable plan within the target, not retrained."""
        settings = replace(self.settings, seed=seed, **changes)

        def make() -> tuple[Assignment, Quantizers, Any]:
            problem = self.problem(MENUS[menu])
            found = search(
                self.graph, problem, self.start, self.train, settings, self.out / name, menu
            )
            plan = solve(found.likelihood(problem)).choice
            best = index_of(problem, found.best)
            told = {
                "steps": len(found.rows), "seconds": found.seconds,
                "entropy": found.policy.entropy(), "most probable": found.best,
                "most probable cost": cost_gap(problem, best)["bops"],
            }  # fmt: skip
            return plan, found.shared.quantizers(plan), told

        return self.row(name, make)

    def trained(self, name: str, plan: Assignment, seed: int = 0) -> Any:
        """A fixed plan, trained from the float weights with the search's steps and settings."""
        settings = replace(self.settings, seed=seed).training(len(self.train))

        def make() -> tuple[Assignment, Quantizers, Any]:
            folder = self.out / name
            folder.mkdir(exist_ok=True)
            file = folder / "checkpoint.safetensors"
            found = finetune(self.graph, plan, self.start, self.train, settings, file)
            return plan, found.quantizers, {"steps": settings.steps, "seconds": found.seconds}

        return self.row(name, make)

    def by_estimate(self, estimator: str, solver: str) -> Assignment:
        """The plan of an estimator's losses on the mixed menu."""
        problem = self.problem(MENUS["mixed"])
        x = torch.from_numpy(self.train.batch(range(SENSITIVITY)))
        assert self.train.labels is not None
        labels = torch.from_numpy(self.train.labels[:SENSITIVITY])
        found = estimate(
            estimator, self.graph, self.start, x, labels, formats=problem.formats, seed=0
        )
        posed = replace(problem, loss=found.loss, pair_loss=found.pair_loss)
        return solve(posed, solver).choice

    def random(self) -> Iterator[Assignment]:
        """Random plans that use the target up."""
        problem = self.problem(MENUS["mixed"])
        left = RANDOM
        for index in samples(problem, 2000, 1):
            if left and float(evaluate(problem, index).of("bops")) >= NEAR * self.target:
                left -= 1
                yield choice_of(problem, index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--train", default="epochs=2", help="as --train of hwmpq search")
    parser.add_argument("--eval", type=int, help="images to judge on; all")
    parser.add_argument("--share", type=float, default=1.0, help="target, of uniform w4a4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS))
    words = parser.parse_args()
    parts = words.only.split(",")
    bench = Bench(words)
    print(f"{bench.steps} steps a run; target {bench.target / 1e9:.4g} G bit operations")
    found = []
    if {"search", "controls"} & set(parts):
        found = [bench.searched(f"mixed-{seed}", "mixed", seed) for seed in range(words.seeds)]
    if "search" in parts:
        bench.searched("int-0", "int", 0)
        bench.searched("float-0", "float", 0)
    if "controls" in parts:
        four = dict.fromkeys(found[0]["plan"], "w4a4")
        for seed, row in enumerate(found):
            bench.trained(f"a-retrained-{seed}", row["plan"], seed)
            bench.trained(f"b-w4a4-{seed}", four, seed)
        bench.trained("c-hessian", bench.by_estimate("hessian-trace", "ilp"))
        bench.trained("c-clado-gn", bench.by_estimate("clado-gn", "iqp"))
        for n, plan in enumerate(bench.random()):
            bench.trained(f"d-random-{n}", plan)
    if "ablation" in parts:
        bench.searched("no-entropy-penalty-0", "mixed", 0, entropy=0.0)
    if "uniform" in parts:
        for name in MENUS["mixed"]:
            plan = dict.fromkeys((la.name for la in bench.layers), name)
            bench.trained(f"uniform-{name}", plan)


if __name__ == "__main__":
    main()
