"""How often an artifact, or another program beside it, is right on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq import data
from hwmpq.data import DataSet

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Samples:
    """The first `count` samples of DATA as an artifact takes them, `step` of them at a time."""

    spec: str
    data: DataSet
    count: int
    step: int

    @staticmethod
    def of(manifest: Mapping[str, Any], spec: str, limit: int | None) -> Samples:
        """limit: the most samples; all where None. Raises InputError."""
        entry = manifest["inputs"][0]
        told = entry.get("normalization")
        known = isinstance(told, Mapping) and {"mean", "std"} <= told.keys()
        normalization = (tuple(told["mean"]), tuple(told["std"])) if known else None
        dataset = data.load(spec, normalization, entry["shape"])
        count = min(len(dataset), limit or len(dataset))
        return Samples(spec, dataset, count, 64 * int(entry["shape"][0]))

    def classes(self, run: Callable[[Array], Array]) -> NDArray[np.int64]:
        """The best class of each. run: samples [N, ...] -> the first output for each."""
        found = []
        for at in range(0, self.count, self.step):
            part = range(at, min(self.count, at + self.step))
            found.append(run(self.data.batch(part)).reshape(len(part), -1).argmax(1))
        return np.concatenate(found)

    def accuracy(self, classes: NDArray[np.int64]) -> dict[str, Any]:
        """top1: in %, None without labels."""
        labels, top1 = self.data.labels, None
        if labels is not None:
            top1 = 100.0 * float((classes == labels[: self.count]).mean())
        return {"metric": "top1", "data": self.spec, "n": self.count, "top1": top1}
