"""A space of small networks for the digits, and a search of a second in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from hwmpq import data
from hwmpq.data import DataSet
from hwmpq.frontend.model import load_model
from hwmpq.graph import Graph
from hwmpq.methods.fliqs.settings import Settings
from hwmpq.methods.fliqs_nas.found import Found
from hwmpq.methods.fliqs_nas.prices import Prices
from hwmpq.methods.fliqs_nas.space import ArchitectureSpace, StageSpace
from hwmpq.methods.fliqs_nas.train import search

MENU = ("w8a8", "w4a4", "w2a2", "e4m3")
STAGES = (
    StageSpace((3,), (2,), (4, 8), (1,), 1), StageSpace((3, 5), (2, 3), (6, 8), (1, 2), 2)
)  # fmt: skip
SPACE = ArchitectureSpace((1, 16, 16), (4, 2), STAGES, 12, 10)
SETTINGS = Settings(
    steps=12, batch=8, rate=3e-3, augment=False, checkpoint=6, warmup=0.2, policy_rate=0.1
)


@cache
def digits() -> DataSet:
    return data.load("digits#train", load_model("zoo:digits_cnn").normalization, (1, 16, 16), 10)


@cache
def teacher() -> Graph:
    return load_model("zoo:digits_cnn").graph()


def run(
    folder: Path, settings: Settings = SETTINGS, share: float = 0.5,
    note: Callable[[int, int], None] = lambda done, of: None,
) -> Found:  # fmt: skip
    """Towards a share of the bit operations of the largest network in w8a8."""
    prices = Prices(SPACE, MENU, None)
    legal = np.ones((len(prices.slots), len(MENU)), bool)
    whole = prices.costs("bops", largest(), np.zeros((1, len(prices.slots)), np.intp))
    budget = {"bops": share * float(whole[0])}
    return search(teacher(), prices, legal, budget, digits(), settings, folder, note=note)


def largest() -> np.ndarray:
    """Picks of the largest architecture, [1, rows]."""
    return np.array([[int(np.argmax(options)) for options in SPACE.options]])
