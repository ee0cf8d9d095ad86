"""`fliqs-nas`: the network is searched together with its formats.

As `fliqs` (arXiv 2308.03290) draws formats, this draws architectures as well: kernel size,
expansion, width and depth of each stage of a MobileNetV2-like space, whose weights are shared
(`shared`). The model that is given says what to learn: the size of the images, the classes, and
its answers. What is found is another network, an ordinary module with a plan of its formats
(`found`); `hwmpq quantize` goes on with it, `hwmpq search` leaves it as files.

The cost is that of the layers: seconds predicted for each, in a table made before the training
begins, bit operations, or bytes.
"""

from __future__ import annotations

import numpy as np

from hwmpq.methods.fliqs.searched import most_probable
from hwmpq.methods.fliqs.settings import parsed
from hwmpq.methods.fliqs_nas.designed import Designed, design
from hwmpq.methods.fliqs_nas.found import numbers
from hwmpq.methods.fliqs_nas.train import DEFAULTS
from hwmpq.methods.study import Chosen, Method, Study
from hwmpq.types import Problem

__all__ = ["METHOD", "Designed", "design"]


def choose(study: Study, problem: Problem) -> Chosen:
    """The most probable plan of the network that was found, with its trained weights."""
    model = study.job.model
    assert isinstance(model, Designed)
    found = model.found
    log_p = np.full((len(problem.layers), len(problem.formats)), -np.inf)
    for f, name in enumerate(problem.formats):
        if name in found.problem.formats:
            log_p[:, f] = found.log_p[:, found.problem.formats.index(name)]
    solution = most_probable(problem, log_p, study.solve)
    own = numbers(found.shared, found.graph, solution.choice)
    loss = study.judge_with(solution.choice, own)
    return Chosen(solution, own, found.told | {"measured_loss": loss})


METHOD = Method(
    choose, trained=lambda options: parsed(options.train, options.seed, DEFAULTS), design=design
)
