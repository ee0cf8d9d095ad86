"""The job: what the user asked for, resolved to a graph, data, a target and a store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hwmpq import data, devices, executor, targets, toolchain
from hwmpq.data import DataSet
from hwmpq.devices import Device
from hwmpq.errors import InputError, UnknownName
from hwmpq.graph import Graph, network_of
from hwmpq.measure import cuda, fingerprint, static_model
from hwmpq.measure.reach import reach
from hwmpq.measure.store import Store
from hwmpq.targets import Target
from hwmpq.types import Network, digest

#: Calibration images set aside to judge candidates by; no choice of scale or sensitivity sees them.
#: Fewer for large inputs (from 64 pixels on), where each costs a hundred times the time.
HOLDOUT, HOLDOUT_LARGE = 512, 256
#: Most of them that a drop is judged on, as long as it is not clear on which side of a limit it is.
JURY = 1024
#: Post-training quantization where nothing is asked: cheap, and MobileNetV2 in w6a8 needs it.
PTQ = ("bias",)

_ON_A_GPU = (
    "Times need such a GPU: run this there, describe that machine in {1} and give --device, or "
    "pack the kernels with `hwmpq profile MODEL --target {0} --bundle out.tar.gz`. `hwmpq compile` "
    "needs none, and `hwmpq verify ARTIFACT --emulated` runs what it makes on this CPU."
)
IndexArray = NDArray[np.intp]


class Progress(Protocol):
    """How a run shows that it moves."""

    def stage(
        self, name: str, total: int | None
    ) -> AbstractContextManager[Callable[[int], None]]: ...

    def note(self, text: str) -> None: ...


def so_far(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """Takes (done, of how many) and tells a stage of the progress how many are new."""
    before = 0

    def note(done: int, _of: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return note


class Silent:
    """Progress that nobody sees."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        yield lambda _: None

    def note(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class Options:
    """The words of `hwmpq quantize`, as the user wrote them; the contract explains each."""

    model: str
    weights: str | None = None
    input_shape: tuple[int, ...] | None = None
    target: str = "native"
    device: str = "local"
    data: str | None = None
    calib_data: str | None = None
    latency: str | None = None
    max_size: str | None = None
    max_bops: str | None = None
    max_drop: float | None = None
    formats: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    method: str = "auto"
    search: str | None = None
    sensitivity: str | None = None
    metric: str = ""
    loss: str = ""
    calib: int = 256
    ptq: tuple[str, ...] = PTQ
    eval: int | None = None
    threads: int = 1
    seed: int = 0
    store: str | None = None
    out: str = "hwmpq-out"
    fresh: bool = False
    max_time: float | None = None
    train_data: str | None = None
    train: tuple[str, ...] = ()
    train_out: str | None = None
    tune: int = 0
    processes: int = 1
    executor: str = "serial"
    allow_estimates: bool = False
    dry_run: bool = False
    explain_cache: bool = False


@dataclass(frozen=True, eq=False)
class Images:
    """calib: for ranges and sensitivities; holdout: for choosing among candidates; jury: the
    holdout and more behind it, for judging drops; pool: all that these come from, for training;
    held: which of the pool are the holdout; test: for the reported accuracy only; split: how they
    were made, in words."""

    calib: DataSet
    holdout: DataSet
    jury: DataSet
    pool: DataSet
    held: IndexArray
    test: DataSet
    split: str


@dataclass(frozen=True, eq=False)
class Job:
    """A run's fixed circumstances. model: the loaded model; key: digest of graph and weights;
    fingerprint: of the machine that times; estimated: none does, a static model stands for it."""

    options: Options
    progress: Progress
    model: Any
    graph: Graph
    network: Network
    key: str
    target: Target
    device: Device
    store: Store
    fingerprint: str
    estimated: bool = False

    @property
    def times_elsewhere(self) -> bool:
        """Are cells timed on another machine than the one that compiles them?"""
        return self.device.remote and not self.estimated


def check_options(o: Options) -> None:
    """Refuse what can be refused before any work. Raises InputError, UnknownName."""
    from hwmpq import search, sensitivity
    from hwmpq.quantize.ptq import check_steps
    from hwmpq.quantize.scores import LOSSES, METRICS, find_score

    for name, value in (
        ("--threads", o.threads), ("--calib", o.calib), ("--eval", o.eval),
        ("--processes", o.processes),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise InputError(name, value, "1 or more")
    check_steps(o.ptq)
    executor.check(o.executor)
    if o.tune < 0:
        raise InputError("--tune", o.tune, "0 (off) or more")
    if o.max_drop is not None and not 0 <= o.max_drop <= 100:
        raise InputError("--max-drop", o.max_drop, "0 to 100 points")
    if o.max_time is not None and not o.max_time > 0:
        raise InputError("--max-time", o.max_time, "a time above 0")
    if solver_of(o) not in search.names():
        raise UnknownName("solver", solver_of(o), search.names())
    if o.metric:
        find_score("metric", o.metric, METRICS)
    estimator = estimator_of(o)
    if o.loss:
        sensitivity.check_loss(estimator, find_score("loss", o.loss, LOSSES).name)
    if sensitivity.needs_gradients(estimator) and o.model.endswith(".onnx"):
        raise InputError(
            "sensitivity estimator by gradients for an ONNX model", estimator,
            [name for name in sensitivity.names() if not sensitivity.needs_gradients(name)],
        )  # fmt: skip


def estimator_of(o: Options) -> str:
    """The sensitivity estimator: as asked, else one that looks at the loss where one is given."""
    return o.sensitivity or ("measured" if o.loss else "output-error")


def solver_of(o: Options) -> str:
    """The solver: as asked, else the exact one of separate layers."""
    return o.search or "ilp"


def open_job(
    options: Options, progress: Progress, model: Any = None, here: bool = True, timed: bool = True
) -> Job:
    """Load and trace the model, resolve target and device, open the store.

    model: a LoadedModel instead of the one that the options name. here: must the target be one
    that the device can run? timed: are times taken there? Raises the errors of each part;
    nothing has been written by then but an empty store.
    """
    from hwmpq.frontend.model import load_model

    toolchain.check()
    check_options(options)
    device = devices.load(options.device)
    target = _target(options.target, device)
    if target.gpu and options.threads > 1:
        raise InputError(f"--threads for target {target.name}", options.threads, "1, of the CPU")
    estimated = here and timed and _estimated(options, device, target)
    if estimated:
        machine = static_model.identity(target)
        progress.note(f"no board: nothing is timed, cycles come from {machine}")
    else:
        if here and timed:
            device.check_times()
        machine = _machine(device, target) if here else fingerprint()
    weights = Path(options.weights) if options.weights else None
    with progress.stage("trace", None):
        model = model or load_model(options.model, weights, options.input_shape)
        graph = model.graph()
    store = Store.open(options.store, fresh=options.fresh)
    return Job(
        options, progress, model, graph, network_of(graph), graph_key(graph), target, device, store,
        machine, estimated,
    )  # fmt: skip


def _estimated(options: Options, device: Device, target: Target) -> bool:
    """Shall a static model stand for the chip? Only where it may, and there is none."""
    no_board = device.emulated or (target.foreign and not device.remote)
    return options.allow_estimates and no_board


def _target(name: str, device: Device) -> Target:
    """'native' is the device's own target. Raises InputError where nobody knows it."""
    if name == "native" and device.target:
        name = device.target
    if name != "native":
        return targets.load(name)
    if device.remote:
        raise InputError(
            f"target of device {device.name}", "native", targets.names(),
            f"Give --target, or write it into {devices.path()}.",
        )  # fmt: skip
    return targets.native()


def _machine(device: Device, target: Target) -> str:
    """Fingerprint of the machine behind the device. Raises InputError when it cannot run the
    target, DeviceError when it cannot be reached."""
    if device.remote:
        with reach(device) as worker:
            found = worker.describe()
        timed = found["gpu"] if target.gpu else found
        missing = sorted(target.features - frozenset(timed["features"]))
        name = str(timed["fingerprint"])
    elif target.gpu:
        found = cuda.identity()
        missing, name = sorted(target.features - frozenset(found["features"])), found["fingerprint"]
    else:
        missing, name = targets.satisfied_by_host(target), fingerprint()
        device.recognize(name)
    if missing:
        where = f"device {device.name}" if device.remote else "this machine"
        able = None if device.remote else [
            n for n in targets.names() if not targets.satisfied_by_host(targets.load(n))
        ]  # fmt: skip
        raise InputError(
            f"{where} cannot run target {target.name}", f"no {', '.join(missing)}", able,
            _ON_A_GPU.format(target.name, devices.path())
            if target.gpu
            else f"Use another target, or a device that has the features: {devices.path()}."
            if not target.foreign
            else "Times need a chip of that kind: describe a board in "
            f"{devices.path()} and give --device. `hwmpq compile` needs none; --allow-estimates "
            "goes by estimated cycles instead.",
        )  # fmt: skip
    return name


def graph_key(graph: Graph) -> str:
    """Digest of the graph's structure and of every constant."""
    constants = {
        name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
        for name, value in graph.constants.items()
    }
    nodes = [[n.name, n.op, list(n.inputs), dict(n.attrs), dict(n.params)] for n in graph.nodes]
    return digest([list(graph.inputs), list(graph.outputs), nodes, constants])


def load_images(job: Job) -> Images:
    """The three disjoint sets of images.

    Raises InputError without any data, or with too few images.
    """
    o, graph = job.options, job.graph
    if not (o.data or o.calib_data):
        raise InputError(
            "no data", None, data.FORMS, "Give --calib-data (and --data for the accuracy)."
        )
    shape = input_shape(graph)

    def load(spec: str) -> DataSet:
        return data.load(spec, job.model.normalization, shape, classes(job))

    if o.data and o.calib_data:
        return divide(load(o.calib_data), load(o.data), o)
    return divide(load(o.data or o.calib_data or ""), None, o)


def classes(job: Job) -> int | None:
    """What labels must stay below: the model's classes, else the width of a flat output."""
    if job.model.classes is not None:
        return int(job.model.classes)
    shape = job.graph.tensors[job.graph.outputs[0]]
    return int(shape[1]) if len(shape) == 2 else None


def input_shape(graph: Graph) -> tuple[int, ...]:
    """N, C, H, W of the one input. Raises InputError for a model with several."""
    if len(graph.inputs) != 1:
        raise InputError("data for a model with several inputs", len(graph.inputs), "one input")
    return tuple(graph.tensors[graph.inputs[0]])


def divide(source: DataSet, test: DataSet | None, o: Options) -> Images:
    """Calibration and held-out images from `source`; without `test`, half of it is the test.

    Raises InputError with too few images.
    """
    if test is not None:
        words = f"calibration from {source.name}, accuracy on {test.name}"
    else:
        if len(source) < 4:
            raise InputError(f"images in {source.name}", len(source), "4 or more")
        words = f"{source.name} split in two halves with seed {o.seed}: calibration and accuracy"
        source, test = data.split(source, len(source) // 2, o.seed)
    count = min(o.calib, max(len(source) // 2, 1))
    if len(source) - count < 1:
        raise InputError(f"images in {source.name}", len(source), "2 or more")
    order = np.random.default_rng(o.seed).permutation(len(source))
    calib = source.subset(np.sort(order[:count]), f"{source.name} [{count} for calibration]")
    limit = HOLDOUT_LARGE if source.shape[-1] >= 64 else HOLDOUT
    held, more = np.sort(order[count : count + limit]), np.sort(order[count + limit : count + JURY])
    holdout = source.subset(held, f"{source.name} [{len(held)} held out]")
    jury = source.subset(
        np.concatenate([held, more]), f"{source.name} [{len(held) + len(more)} to judge by]"
    )
    if o.eval is not None and o.eval < len(test):
        pick = np.sort(np.random.default_rng(o.seed).permutation(len(test))[: o.eval])
        test = test.subset(pick, f"{test.name} [{o.eval} of them]")
    return Images(calib, holdout, jury, source, held, test, words)


def training_images(job: Job, images: Images) -> DataSet:
    """--train-data; else those for calibration without the held-out ones. Raises InputError."""
    o = job.options
    if o.train_data not in (None, o.calib_data):
        return data.load(
            o.train_data, job.model.normalization, input_shape(job.graph), classes(job)
        )
    rest = np.setdiff1d(np.arange(len(images.pool)), images.held)
    return images.pool.subset(rest, f"{images.pool.name} [{len(rest)} to train on]")


def train_folder(o: Options) -> str:
    """Where a method that trains keeps its run: beside --out, which is replaced as a whole."""
    return o.train_out or f"{o.out.rstrip('/')}-train"
