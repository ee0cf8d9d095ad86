"""A network that is searched with its formats, against a fixed one with searched formats.

    python tools/bench/fliqs_nas.py zoo:resnet20_cifar --weights F --train-data npz:train.npz \
        --data npz:test.npz --out DIR [--train steps=4000] [--seeds 2] [--share 1.0] [--target T]

Both train from the start, equally long, taught by the model; both are MobileNetV2's stages, the
fixed one as they are in the paper (kernel 3, expansion 6, full width and depth), the other with all
that `fliqs-nas` chooses from. The target is a share of the latency that the target's cost model
foretells for the fixed one in w8a8. Rows and runs are kept in DIR, with what `hwmpq compile` takes:
started again it goes on. Accuracies are the exact simulator's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fliqs import Made, Rows, options

from hwmpq import data as sets
from hwmpq import targets
from hwmpq.frontend.model import load_model
from hwmpq.graph import network_of
from hwmpq.methods.fliqs.policy import shares
from hwmpq.methods.fliqs.settings import parsed
from hwmpq.methods.fliqs_nas.found import numbers, write
from hwmpq.methods.fliqs_nas.prices import Prices, foretold
from hwmpq.methods.fliqs_nas.space import ArchitectureSpace, graph_of, space_for
from hwmpq.methods.fliqs_nas.train import DEFAULTS, search
from hwmpq.predict import Predictor
from hwmpq.quantize.judge import predict
from hwmpq.search.evaluate import index_of
from hwmpq.stages.menu import make_menu

FORMATS = ("w8a8", "w6a8", "w4a8", "w2a8")


def fixed(space: ArchitectureSpace) -> ArchitectureSpace:
    """The paper's stages, with nothing to choose."""
    stages = [
        replace(
            s, kernels=(3,), expansions=(6,), channels=(max(s.channels),), depths=(max(s.depths),)
        )
        for s in space.stages
    ]
    return replace(space, stages=tuple(stages))


def main() -> None:
    parser = options(__doc__.splitlines()[0], "", "the fixed in w8a8", 1)
    parser.add_argument("--target", default="native")
    words = parser.parse_args()
    model = load_model(words.model, Path(words.weights) if words.weights else None, None)
    teacher = model.graph()
    shape = teacher.tensors[teacher.inputs[0]]
    train, test = (
        sets.load(spec, model.normalization, shape, model.classes)
        for spec in (words.train_data, words.data)
    )
    if words.eval:
        test = test.subset(range(words.eval))
    out = Path(words.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = Rows(out, test, predict(model.module, test))
    target = targets.native() if words.target == "native" else targets.load(words.target)
    folder = targets.data_folder("cost_models") / target.name
    seconds = foretold(Predictor.load(folder, target), 1)
    free = space_for(tuple(shape[1:]), int(teacher.tensors[teacher.outputs[0]][1]))
    paper = network_of(graph_of(fixed(free).largest, free.image[1:])).layers
    whole = seconds([layer.workload for layer in paper], ["w8a8"]).sum()
    budget = {"latency_s": words.share * float(whole)}
    print(f"target {budget['latency_s'] * 1e6:.1f} us on {target.name}", flush=True)
    for seed in range(words.seeds):
        settings = parsed([w for w in words.train.split(",") if w], seed, DEFAULTS)
        for name, space in (("fixed", fixed(free)), ("searched", free)):
            prices = Prices(space, FORMATS, seconds)
            largest = network_of(graph_of(space.largest, space.image[1:]))
            legal = make_menu(largest, target, FORMATS).legal[:, -len(FORMATS) :] & prices.known

            def make(name=name, prices=prices, legal=legal, settings=settings) -> Made:
                run = out / f"{name}-{settings.seed}"
                found = search(teacher, prices, legal, budget, train, settings, run)
                plan = found.solution.choice
                share = shares(found.problem, index_of(found.problem, plan))["latency_s"]
                own = numbers(found.shared, found.graph, plan)
                write(run, found, own)
                return Made(found.graph, plan, own, float(share), found.told)

            rows.row(f"{name}-{seed}", make)
    rows.compare("searched-", "fixed-")
    rows.record(words.json)


if __name__ == "__main__":
    main()
