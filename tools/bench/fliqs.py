"""One-shot search against its controls, at equal bit operations and equally many steps.

    python tools/bench/fliqs.py zoo:resnet20_cifar --weights F --train-data npz:train.npz \
        --data npz:test.npz --out DIR [--train steps=1560] [--only search,controls,ablation,formats]

Every row is kept in DIR/rows.json, every run in a folder of DIR, with the assignment and the
quantizers that `hwmpq compile` takes: started again it goes on. Accuracies are the exact
simulator's. "drop" is against the float model on the same images; its interval is the paired one.
The target is a uniform w4a4's bit operations, unless --share says otherwise.

  search     mixed menu with --seeds seeds, integers with one: no retraining
  controls   (a) the plan found, retrained from the float weights; (b) uniform w4a4;
             (c) the plans of Hessian traces and of Gauss-Newton pairs; (d) random plans
  ablation   the search without its penalty on entropy
  formats    integers against floats: both menus searched at 1.15 of the target, where floats have
             a choice, and every format alone, trained as long; drawn in DIR/formats.html

At the end the table of comparisons: the search's accuracy less a control's, with its standard
error, over images (paired) and, where there are several seeds, over them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from torch import Tensor

from hwmpq import data as sets
from hwmpq.artifact.folder import write_json
from hwmpq.formats import bops, format_named
from hwmpq.frontend.model import load_model
from hwmpq.graph import Graph, network_of
from hwmpq.methods.fliqs.policy import shares
from hwmpq.methods.fliqs.settings import parsed
from hwmpq.methods.fliqs.train import search
from hwmpq.methods.fliqs_nas.found import ASSIGNMENT, QUANTIZERS
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
PARTS = ("search", "controls", "ablation", "formats")
#: Images for ranges, and for sensitivities; random plans; how near to the target they must be.
CALIBRATION, SENSITIVITY, RANDOM, NEAR = 512, 128, 3, 0.97
#: Share of the target that integers and floats are compared at.
WIDE = 1.15
#: Of integers and of floats, in the plot.
COLOURS = ("#30638e", "#d1495b")


@dataclass(frozen=True, eq=False)
class Made:
    """A trained network under a plan; share: its cost, of the target; told: about its making."""

    graph: Graph
    plan: Assignment
    numbers: Quantizers
    share: float
    told: Mapping[str, Any]


class Rows:
    """What was judged so far, in a folder. float_logits: of the float model on the test images."""

    def __init__(self, out: Path, test: sets.DataSet, float_logits: Tensor):
        assert test.labels is not None
        self.out, self.test, self.float_logits = out, test, float_logits
        self.labels = torch.from_numpy(test.labels)
        self.kept: dict[str, Any] = {}
        self.judged: list[tuple[str, ...]] = []
        self.compared: list[tuple[str, ...]] = []
        if (out / "rows.json").exists():
            self.kept = json.loads((out / "rows.json").read_text())

    def row(self, name: str, make: Callable[[], Made]) -> Any:
        """Make it, judge it and keep it, unless it is there."""
        if name not in self.kept:
            made = make()
            outputs = predict(Simulator(made.graph, made.plan, made.numbers), self.test)
            found = judge(self.float_logits, outputs, self.labels, "")
            np.save(self._right(name), (outputs.argmax(1) == self.labels).numpy())
            self.kept[name] = {
                **asdict(found), "cost / target": made.share, "plan": made.plan, **made.told
            }  # fmt: skip
            (self.out / "rows.json").write_text(json.dumps(self.kept, indent=1, default=float))
        row = self.kept[name]
        low, high = row["drop_interval"]
        drop, cost = f"{row['drop']:.2f} [{low:.2f}, {high:.2f}]", f"{row['cost / target']:.3f}"
        self.judged.append((name, f"{row['simulated']:.2f}", drop, cost))
        print(f"{name:<28} top-1 {row['simulated']:6.2f}  drop {drop}  cost {cost}", flush=True)
        return row

    def _right(self, name: str) -> Path:
        """Which test images a row's network gets right."""
        (self.out / name).mkdir(exist_ok=True)
        return self.out / name / "right.npy"

    def compare(self, ours: str, other: str) -> None:
        """Rows whose names begin so: mean accuracies, their difference and its standard error."""
        groups = [
            np.stack([np.load(self._right(n)) for n in self.kept if n.startswith(begin)] or [[]])
            for begin in (ours, other)
        ]
        if not all(group.size for group in groups):
            return
        per_image = groups[0].mean(0) - groups[1].mean(0)
        variance = per_image.var(ddof=1) / len(per_image)
        for group in groups:
            if len(group) > 1:
                variance += group.mean(1).var(ddof=1) / len(group)
        runs = " - ".join(f"{g.mean() * 100:.2f} ({len(g)})" for g in groups)
        less = f"{per_image.mean() * 100:+.2f} ± {np.sqrt(variance) * 100:.2f}"
        self.compared.append((f"{ours} less {other}", runs, less))
        print(f"{ours} less {other:<12} {runs}: {less}")

    def record(self, file: Path | None) -> None:
        """What was shown, where it is asked for."""
        record.write(
            file,
            record.Table(("run", "top-1", "drop", "cost, of the target"), self.judged),
            record.Table(("compared", "top-1 (runs)", "points ± standard error"), self.compared),
        )


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
        x = torch.from_numpy(self.train.batch(range(min(CALIBRATION, len(self.train)))))
        self.start = calibrate(self.graph, x.split(64), MENUS["mixed"])
        plain = self.uniform("fp32")
        logits = predict(Simulator(self.graph, plain, self.start), self.test)
        self.rows = Rows(self.out, self.test, logits)

    def uniform(self, name: str) -> Assignment:
        return dict.fromkeys((layer.name for layer in self.layers), name)

    def problem(self, menu: Sequence[str], share: float = 1.0) -> Problem:
        """Bit operations alone. share: of the target."""
        work = [[bops(format_named(f), la.workload.macs) for f in menu] for la in self.layers]
        cells = np.array(work, float)
        return Problem(
            tuple(la.name for la in self.layers), tuple(menu), loss=np.zeros_like(cells),
            bops=cells, legal=np.ones(cells.shape, bool), budgets={"bops": share * self.target},
        )  # fmt: skip

    def made(
        self, name: str, plan: Assignment, numbers: Quantizers, told: Mapping[str, Any]
    ) -> Made:
        """With its files in the row's folder."""
        write_json(self.out / name / ASSIGNMENT, dict(plan))
        numbers.save(self.out / name / QUANTIZERS)
        problem = self.problem(MENUS["mixed"])
        share = float(shares(problem, index_of(problem, plan))["bops"])
        return Made(self.graph, plan, numbers, share, told)

    def searched(
        self, name: str, menu: str, seed: int, share: float = 1.0, **changes: Any
    ) -> Assignment:
        """A run of the search; its most probable plan within the target, not retrained."""
        settings = replace(self.settings, seed=seed, **changes)

        def make() -> Made:
            problem = self.problem(MENUS[menu], share)
            found = search(
                self.graph, problem, self.start, self.train, settings, self.out / name, menu
            )
            plan = found.within(problem, solve).choice
            best = index_of(problem, found.best)
            told = {
                "steps": len(found.rows), "seconds": found.seconds,
                "entropy": found.policy.entropy(), "most probable": found.best,
                "most probable cost": float(shares(problem, best)["bops"]),
            }  # fmt: skip
            return self.made(name, plan, found.shared.quantizers(plan), told)

        plan: Assignment = self.rows.row(name, make)["plan"]
        return plan

    def trained(self, name: str, plan: Assignment, seed: int = 0) -> None:
        """A fixed plan, trained from the float weights with the search's steps and settings."""
        settings = replace(self.settings, seed=seed).training(len(self.train))

        def make() -> Made:
            folder = self.out / name
            folder.mkdir(exist_ok=True)
            file = folder / "checkpoint.safetensors"
            found = finetune(self.graph, plan, self.start, self.train, settings, file)
            told = {"steps": settings.steps, "seconds": found.seconds}
            return self.made(name, plan, found.quantizers, told)

        self.rows.row(name, make)

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


def controls(bench: Bench, plans: Sequence[Assignment]) -> None:
    """plans: of the searches, by seed."""
    for seed, plan in enumerate(plans):
        bench.trained(f"b-w4a4-{seed}", bench.uniform("w4a4"), seed)
        bench.trained(f"a-retrained-{seed}", plan, seed)
    for n, plan in enumerate(bench.random()):
        bench.trained(f"d-random-{n}", plan)
    bench.trained("c-hessian", bench.by_estimate("hessian-trace", "ilp"))
    bench.trained("c-clado-gn", bench.by_estimate("clado-gn", "iqp"))


def formats(bench: Bench) -> None:
    """Integers and floats, searched and alone."""
    for menu in ("int", "float"):
        bench.searched(f"wide-{menu}-0", menu, 0, WIDE)
    for name in MENUS["mixed"]:
        bench.trained(f"uniform-{name}", bench.uniform(name))
    drawn(bench.rows.kept, bench.out / "formats.html")


def drawn(rows: Mapping[str, Any], path: Path) -> None:
    """Accuracy against cost: every format alone, and what was searched, by family."""
    from plotly.graph_objects import Figure

    figure = Figure()
    alone = {menu: [f"uniform-{name}" for name in MENUS[menu]] for menu in ("int", "float")}
    searched = {
        menu: [n for n in rows if n.startswith((f"{menu}-", f"wide-{menu}-"))] for menu in alone
    }
    for (menu, names), colour in zip(alone.items(), COLOURS, strict=True):
        shown = sorted(names, key=lambda n: rows[n]["cost / target"])
        for kind, own, mark in (("alone", shown, "circle"), ("searched", searched[menu], "star")):
            figure.add_scatter(
                x=[rows[n]["cost / target"] for n in own], y=[rows[n]["simulated"] for n in own],
                text=[n.removeprefix("uniform-") for n in own], name=f"{menu}, {kind}",
                mode="lines+markers+text" if kind == "alone" else "markers+text",
                textposition="top center", marker={"symbol": mark, "size": 11, "color": colour},
            )  # fmt: skip
    figure.update_layout(
        template="plotly_white", xaxis_title="bit operations, of the target", yaxis_title="top-1, %"
    )
    figure.write_html(path)


def options(about: str, train: str, share: str, seeds: int) -> argparse.ArgumentParser:
    """What the benches of searches take. train, seeds: defaults; share: what --share is of."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--train", default=train, help="as --train of hwmpq search")
    parser.add_argument("--eval", type=int, help="images to judge on; all")
    parser.add_argument("--share", type=float, default=1.0, help=f"target, of {share}")
    parser.add_argument("--seeds", type=int, default=seeds)
    record.option(parser)
    return parser


def main() -> None:
    parser = options(__doc__.splitlines()[0], "epochs=2", "uniform w4a4", 3)
    parser.add_argument("--only", default=",".join(PARTS))
    words = parser.parse_args()
    parts = words.only.split(",")
    bench = Bench(words)
    print(
        f"{bench.steps} steps a run on {len(bench.train)} images, judged on {len(bench.test)}; "
        f"target {bench.target / 1e9:.4g} G bit operations", flush=True,
    )  # fmt: skip
    plans = []
    if {"search", "controls"} & set(parts):
        plans = [bench.searched(f"mixed-{seed}", "mixed", seed) for seed in range(words.seeds)]
    if "controls" in parts:
        controls(bench, plans)
    if "search" in parts:
        bench.searched("int-0", "int", 0)
    if "ablation" in parts:
        bench.searched("no-entropy-penalty-0", "mixed", 0, entropy=0.0)
    if "formats" in parts:
        formats(bench)
    for other in ("a-", "b-", "c-hessian", "c-clado", "d-", "int-", "no-entropy"):
        bench.rows.compare("mixed-", other)
    bench.rows.compare("wide-float", "wide-int")
    bench.rows.record(words.json)


if __name__ == "__main__":
    main()
