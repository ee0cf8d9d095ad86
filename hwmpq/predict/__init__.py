"""Seconds of cells that were not measured, with intervals: `Predictor.load(folder).predict(...)`.

A static estimate of what a kernel does (analytic) times what boosted trees learn from measured
rows (boost), with a band from residuals on shapes that were held out (model). Rows come from the
store (train); evaluate judges beside baselines. Importing this loads neither tvm nor xgboost.
"""

from hwmpq.predict.boost import Settings
from hwmpq.predict.evaluate import as_text, evaluate
from hwmpq.predict.features import FEATURES_VERSION, NAMES, features
from hwmpq.predict.model import Predictor
from hwmpq.predict.rows import Row

__all__ = [
    "FEATURES_VERSION",
    "NAMES",
    "Predictor",
    "Row",
    "Settings",
    "as_text",
    "evaluate",
    "features",
]
