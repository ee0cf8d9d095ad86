"""Levels L2 and L3: sums of layers. The errors of a network's layers partly cancel; those of the
choices among its formats do not.

L2, blocks: a residual or attention block, or a single layer of a chain, as its cells take together.
L3, whole networks: all layers. Both in uniform and in random mixed formats, foretold by models that
saw no shape of the network and no row of its family, against the same sums of measured cells.
Whether a sum of cells is the time of an artifact needs a device: tools/bench/additivity.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwmpq.errors import InputError
from hwmpq.predict.baselines import BASELINES, Baseline, ours
from hwmpq.predict.boost import DEFAULTS, Settings
from hwmpq.predict.metrics import errors, interval, kendall_tau_b, over_seeds
from hwmpq.predict.rows import Row, Table, group_of
from hwmpq.targets import Target
from hwmpq.types import FloatArray

#: Random mixed assignments of a network.
MIXED = 50
Levels = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Net:
    """A network whose cells were measured. layers: of each, format -> its measured cell; blocks: of
    each, the number of its block; family: '' where it has none."""

    name: str
    family: str
    layers: tuple[Mapping[str, Row], ...]
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers or not all(self.layers):
            raise InputError(
                f"measured cells of {self.name}", "layers without any", "some of every layer",
                "Run `hwmpq profile` first.",
            )  # fmt: skip


def levels(
    nets: Sequence[Net], rows: Sequence[Row], target: Target, seed: int = 0,
    settings: Settings = DEFAULTS, seeds: int = 1, draws: int = 500,
) -> Levels:  # fmt: skip
    """{'L2' | 'L3': {model: metrics}}: errors as those of layers (metrics.errors) and `sums`, their
    number; tau (L3): Kendall's over the assignments of one network, averaged; L2 has the 'interval'
    of a bootstrap of blocks. seeds: so many models of ours, their values are means and 'spread' has
    the standard deviations. 'noise ceiling': odd samples of the cells against even ones, an upper
    bound, as both are of one session.
    """
    models: dict[str, Baseline] = {"hwmpq": ours, **BASELINES}
    cuts = [_Cut(net, rows, target, seed) for net in nets]
    truth = [cut.asked.y for cut in cuts]
    found: Levels = {"L2": {}, "L3": {}}

    def foretold(model: Baseline, seed: int) -> list[FloatArray]:
        return [model(cut.known, cut.asked, seed, settings) for cut in cuts]

    for name, model in models.items():
        first = _judged(cuts, truth, foretold(model, seed), seed, draws)
        more = [
            _judged(cuts, truth, foretold(ours, s), s, 0)
            for s in range(seed + 1, seed + seeds)
            if name == "hwmpq"
        ]
        for level, values in first.items():
            found[level][name] = over_seeds(values, [one[level] for one in more])
    odd, even = ([_half(cut.asked, start) for cut in cuts] for start in (0, 1))
    for level, values in _judged(cuts, odd, even, seed, 0).items():
        found[level]["noise ceiling"] = values
    return found


def as_text(found: Levels) -> str:
    """A plain text table of each level."""
    keys = ("rmspe_pct", "within_5_pct", "within_10_pct", "p90_pct", "bias_pct", "tau")
    lines = []
    for level, models in found.items():
        told = [key for key in keys if key in models["hwmpq"]]
        lines += ["", f"{level:<14}" + "".join(f"{key:>15}" for key in told)]
        for name, values in models.items():
            lines.append(f"{name:<14}" + "".join(f"{values[key]:>15.2f}" for key in told))
        ours_ = models["hwmpq"]
        for key in ("rmspe_pct", "within_10_pct"):
            if "interval" in ours_:
                low, high = ours_["interval"][key]
                lines.append(f"  hwmpq {key}: 95 % interval {low:.2f} to {high:.2f}")
            if "spread" in ours_:
                lines.append(f"  hwmpq {key}: over seeds ± {ours_['spread'][key]:.2f}")
    return "\n".join(lines) + "\n"


class _Cut:
    """One network held out: known, asked: tables to train on and to predict; plans: [plans, layers]
    places in asked; y: seconds of asked."""

    def __init__(self, net: Net, rows: Sequence[Row], target: Target, seed: int):
        self.net = net
        cells = {(r.workload, r.format): r for layer in net.layers for r in layer.values()}
        place = {cell: i for i, cell in enumerate(cells)}
        own = {group_of(workload) for workload, _ in cells}
        others = [
            r for r in rows if group_of(r.workload) not in own and net.family not in r.networks
        ]
        self.known, self.asked = Table.of(others, target), Table.of(list(cells.values()), target)
        plans = _plans(net, seed)
        self.plans = np.array(
            [
                [place[layer[f].workload, f] for layer, f in zip(net.layers, plan, strict=True)]
                for plan in plans
            ]
        )

    def sums(self, seconds: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Of every plan: [plans, blocks], [plans]."""
        cells = seconds[self.plans]
        member = np.equal.outer(self.net.blocks, np.unique(self.net.blocks))
        return cells @ member, cells.sum(axis=1)


def _plans(net: Net, seed: int) -> list[list[str]]:
    """Uniform formats, fp32 (else the first) where a layer lacks one, then random mixed ones."""
    chance = np.random.default_rng(seed)
    names = sorted({name for layer in net.layers for name in layer})
    plans = [
        [name if name in layer else min(layer, key=lambda f: f != "fp32") for layer in net.layers]
        for name in names
    ]
    return plans + [
        [str(chance.choice(sorted(layer))) for layer in net.layers] for _ in range(MIXED)
    ]


def _half(table: Table, start: int) -> FloatArray:
    """Medians of every other sample: [n]; of a cell with one sample, that."""
    return np.array([np.median(row.samples_s[start::2] or row.samples_s) for row in table.rows])


def _judged(
    cuts: Sequence[_Cut], truth: Sequence[FloatArray], foretold: Sequence[FloatArray], seed: int,
    draws: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Of seconds of the cells of every cut. draws: of the bootstrap; 0: no interval."""
    y = [cut.sums(seconds) for cut, seconds in zip(cuts, truth, strict=True)]
    p = [cut.sums(seconds) for cut, seconds in zip(cuts, foretold, strict=True)]
    small_y, small_p = (np.concatenate([part.ravel() for part, _ in side]) for side in (y, p))
    large_y, large_p = (np.concatenate([whole for _, whole in side]) for side in (y, p))
    taus = [kendall_tau_b(one[1], two[1]) for one, two in zip(y, p, strict=True)]
    l2: dict[str, Any] = {**errors(small_y, small_p), "sums": len(small_y)}
    if draws:
        groups = np.concatenate([
            np.tile([f"{cut.net.name}:{i}" for i in range(part.shape[1])], len(part))
            for cut, (part, _) in zip(cuts, y, strict=True)
        ])  # fmt: skip
        l2["interval"] = interval(small_y, small_p, groups, seed, draws)
    l3 = {**errors(large_y, large_p), "sums": len(large_y), "tau": float(np.mean(taus))}
    return {"L2": l2, "L3": l3}
