"""The artifact's accuracy, measured on the artifact itself, and its parity with the simulator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwmpq import artifact, targets
from hwmpq.artifact.golden import Replay
from hwmpq.data import DataSet
from hwmpq.measure.remote import RemoteArtifact, RemoteWorker
from hwmpq.quantizers import Quantizers
from hwmpq.stages.cells import timer
from hwmpq.stages.job import Job, so_far

if TYPE_CHECKING:
    from hwmpq.quantize.judge import Judgement

#: Test images that the exact simulator also sees, for parity.
PARITY_IMAGES = 256
#: Images that the jury sees between two looks at the interval.
LOOK = 128


@dataclass(frozen=True, eq=False)
class Accuracy:
    """float: torch fp32; deployed: the artifact on the same images; parity with the simulator.

    Where no machine runs the artifact, the drop is the simulator's; deployed and parity are None.
    """

    metric: str
    float_score: float
    simulated: float
    deployed: float | None
    n: int
    drop: float
    drop_interval: tuple[float, float]
    top1_agreement: float | None
    max_abs: float | None
    worst_layer: str

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "float": self.float_score,
            "simulated": self.simulated,
            "deployed": self.deployed,
            "n": self.n,
            "drop": self.drop,
            "drop_interval": list(self.drop_interval),
        }

    def parity(self) -> dict[str, Any]:
        return {
            "top1_agreement": self.top1_agreement,
            "max_abs": self.max_abs,
            "worst_layer": self.worst_layer,
        }


def float_logits(job: Job, data: DataSet, what: str) -> Any:
    """The float model's outputs on a data set."""
    from hwmpq.quantize.judge import predict

    with job.progress.stage(f"float outputs on {what}", len(data)) as advance:
        return predict(job.model.module, data, progress=so_far(advance))


def simulated_drop(
    job: Job, assignment: Mapping[str, str], quantizers: Quantizers, data: DataSet, reference: Any
) -> float:
    """Paired drop of the exact simulator on held-out calibration images, in points."""
    return float(simulated(job, assignment, quantizers, data, reference).drop)


class Jury:
    """Simulated paired drops of plans on held-out images, each on as many as it needs.

    A plan is judged on a growing part of the images, until the 95 % interval of its drop lies on
    one side of the limit or all were seen. The interval is that of one look, not of all of them:
    what is wrong in one of twenty clear cases is found when the artifact's own drop is measured.
    """

    def __init__(self, job: Job, quantizers: Quantizers, data: DataSet, limit: float):
        """limit: points that are allowed."""
        self.job, self.quantizers, self.data, self.limit = job, quantizers, data, limit
        self._reference: list[Any] = []
        self.judged: dict[frozenset[tuple[str, str]], Judgement] = {}

    def judge(
        self, assignment: Mapping[str, str], quantizers: Quantizers | None = None
    ) -> Judgement:
        """The drop as far as it had to be known. quantizers: where the plan has its own."""
        import torch

        from hwmpq.quantize.judge import judge, predict
        from hwmpq.quantize.simulate import Simulator

        key, numbers = frozenset(assignment.items()), quantizers or self.quantizers
        if key in self.judged and numbers is self.quantizers:
            return self.judged[key]
        simulator = Simulator(self.job.graph, assignment, numbers)
        count, outputs = len(self.data), []
        with self.job.progress.stage("judge a candidate", count) as advance:
            for start in range(0, count, LOOK):
                stop = min(start + LOOK, count)
                part = self.data.subset(np.arange(start, stop))
                outputs.append(predict(simulator, part, progress=so_far(advance)))
                if len(self._reference) < len(outputs):
                    self._reference.append(predict(self.job.model.module, part))
                reference = torch.cat(self._reference[: len(outputs)])
                labels = self.data.labels
                seen = None if labels is None else torch.from_numpy(labels[:stop])
                found = judge(reference, torch.cat(outputs), seen, self.job.options.metric)
                low, high = found.drop_interval
                if high <= self.limit or low > self.limit:
                    break
        if numbers is self.quantizers:
            self.judged[key] = found
        return found

    def allows(self, assignment: Mapping[str, str], quantizers: Quantizers | None = None) -> bool:
        """Is the estimated drop within the limit?"""
        return self.judge(assignment, quantizers).drop <= self.limit


def simulated(
    job: Job, assignment: Mapping[str, str], quantizers: Quantizers, data: DataSet, reference: Any
) -> Judgement:
    """The exact simulator judged on images. reference: float's outputs on them."""
    import torch

    from hwmpq.quantize.judge import judge, predict
    from hwmpq.quantize.simulate import Simulator

    with job.progress.stage("judge a candidate", len(data)) as advance:
        outputs = predict(
            Simulator(job.graph, assignment, quantizers), data, progress=so_far(advance)
        )
    labels = None if data.labels is None else torch.from_numpy(data.labels)
    return judge(reference, outputs, labels, job.options.metric)


def runs(job: Job) -> bool:
    """Is there a machine that runs the job's artifacts?"""
    return job.device.remote or not job.estimated


@contextmanager
def running(job: Job, folder: Path) -> Iterator[artifact.Artifact | RemoteArtifact]:
    """The artifact where it can run: here, else on the job's device."""
    if job.device.remote and targets.satisfied_by_host(job.target):
        with timer(job) as worker:
            assert isinstance(worker, RemoteWorker)
            yield RemoteArtifact(worker, folder)
    else:
        yield artifact.load(folder)


def replayed(loaded: artifact.Artifact | RemoteArtifact) -> Replay:
    """The golden samples, run where the artifact is."""
    return loaded.replay() if isinstance(loaded, RemoteArtifact) else artifact.replay(loaded)


def deployed_outputs(job: Job, folder: Path, data: DataSet, what: str) -> np.ndarray:
    """The artifact's outputs on a data set."""
    rows = []
    with (
        running(job, folder) as loaded,
        job.progress.stage(f"accuracy of {what}", len(data)) as advance,
    ):
        for start in range(0, len(data), 256):
            part = data.batch(range(start, min(start + 256, len(data))))
            rows.append(loaded.run_samples(part, advance))
    return np.concatenate(rows)


def score(job: Job, outputs: np.ndarray, reference: Any, data: DataSet) -> float:
    """The metric of some outputs."""
    import torch

    from hwmpq.quantize.judge import judge

    labels = None if data.labels is None else torch.from_numpy(data.labels)
    found = judge(reference, torch.from_numpy(outputs), labels, job.options.metric)
    return float(found.simulated)


def measure_accuracy(
    job: Job,
    folder: Path,
    assignment: Mapping[str, str],
    quantizers: Quantizers,
    data: DataSet,
    reference: Any,
) -> Accuracy:
    """Deployed against float on all images, and against the exact simulator on some."""
    import torch

    from hwmpq.quantize.judge import judge, predict
    from hwmpq.quantize.simulate import Simulator

    if not runs(job):
        alone = simulated(job, assignment, quantizers, data, reference)
        return Accuracy(
            alone.metric, alone.float, alone.simulated, None, alone.n, alone.drop,
            alone.drop_interval, None, None, "",
        )  # fmt: skip
    deployed = deployed_outputs(job, folder, data, "the artifact")
    labels = None if data.labels is None else torch.from_numpy(data.labels)
    metric = job.options.metric
    found = judge(reference, torch.from_numpy(deployed), labels, metric)
    count = min(PARITY_IMAGES, len(data))
    part = data.subset(np.linspace(0, len(data) - 1, count).astype(int))
    picked = np.linspace(0, len(data) - 1, count).astype(int)
    with job.progress.stage("parity with the simulator", count) as advance:
        exact = predict(
            Simulator(job.graph, assignment, quantizers), part, progress=so_far(advance)
        )
    part_labels = None if labels is None else labels[picked]
    simulated_score = judge(reference[picked], exact, part_labels, metric).simulated
    ours = exact.numpy()
    flat = deployed[picked].reshape(count, -1)
    agreement = 100.0 * float((ours.reshape(count, -1).argmax(1) == flat.argmax(1)).mean())
    with running(job, folder) as loaded:
        difference = replayed(loaded).first_difference
    return Accuracy(
        found.metric, found.float, float(simulated_score), found.simulated, found.n, found.drop,
        found.drop_interval, agreement,
        float(np.abs(ours - deployed[picked]).max()), difference,
    )  # fmt: skip
