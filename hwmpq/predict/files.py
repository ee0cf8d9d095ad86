"""The folder of a cost model: model.ubj, heads.ubj, card.toml, rows.jsonl. No pickle, no dates.

The card holds the hash of the other files and the predicted seconds of some rows: a folder that
was cut short, or whose features have silently changed since, is refused.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq.errors import InputError, in_words
from hwmpq.kernels import CODEGEN_VERSION
from hwmpq.predict.analytic import TERMS
from hwmpq.predict.boost import Point, Settings
from hwmpq.predict.features import FEATURES_VERSION, NAMES
from hwmpq.predict.model import Predictor, Scope
from hwmpq.predict.rows import Row, Table
from hwmpq.predict.spread import Spread
from hwmpq.targets import Target
from hwmpq.targets import load as load_target
from hwmpq.toml_text import dumps
from hwmpq.types import digest

CARD_VERSION = 3
MODEL, HEADS, CARD, ROWS = "model.ubj", "heads.ubj", "card.toml", "rows.jsonl"
_MAX_BYTES = 256 << 20
_PROBES = 16
_HEAD = "# Written by hwmpq.predict; its numbers are read back exactly.\n"
_AGAIN = "Train it again: `hwmpq cost-model train --target {target}`."


def save(predictor: Predictor, folder: Path) -> None:
    """Write the files; the card last, so that an interrupted save is seen by `load`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    rows = "".join(json.dumps(row.to_json(), sort_keys=True) + "\n" for row in predictor.rows)
    parts = {
        MODEL: bytes(predictor.point.booster.save_raw(raw_format="ubj")),
        HEADS: bytes(predictor.spread.booster.save_raw(raw_format="ubj")),
        ROWS: rows.encode(),
    }
    for name, data in parts.items():
        (folder / name).write_bytes(data)
    (folder / CARD).write_text(_HEAD + dumps(_card(predictor, parts)), encoding="utf-8")


def load(folder: Path, target: Target | None) -> Predictor:
    """See `Predictor.load`."""
    card = _read_card(folder)
    try:
        return _predictor(card, folder, target)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"values of the card {folder / CARD}", in_words(error),
            next="Get the folder again, or train the model again.",
        ) from error  # fmt: skip


def _predictor(card: Mapping[str, Any], folder: Path, target: Target | None) -> Predictor:
    name = str(card["target"])
    if target is None:
        target = load_target(name)
    again = _AGAIN.format(target=target.name)
    for what, got, allowed in (
        ("version of the features", card["features"], FEATURES_VERSION),
        ("names of the features", digest(card["names"]), digest(list(NAMES))),
        ("version of the emitted kernels", card["codegen"], CODEGEN_VERSION),
        ("target", name, target.name),
        ("facts of the target", card["target_facts"], facts(target)),
        ("terms of the static model", sorted(card["factors"]), sorted(TERMS)),
    ):
        if got != allowed:
            raise InputError(f"{what} of the cost model {folder}", got, allowed, again)
    model, heads, lines = (
        _read(folder / item, card["sha256"][item]) for item in (MODEL, HEADS, ROWS)
    )
    rows = _rows(lines)
    scope, bands = card["scope"], card["band"]
    predictor = Predictor(
        target,
        Point(
            np.array([card["factors"][term] for term in TERMS], np.float64),
            _booster(folder, model, again), float(card["load"]),
        ),
        Spread(
            _booster(folder, heads, again), float(bands["below"]),
            tuple(map(float, bands["above"])), float(card["settings"]["coverage"]),
        ),
        (bands["novel"][0], bands["novel"][1]) if "novel" in bands else None,
        Scope(
            frozenset(scope["ops"]), frozenset(scope["threads"]), frozenset(scope["formats"]),
            frozenset(scope["kernels"]), (scope["estimate_s"][0], scope["estimate_s"][1]),
        ),
        rows, card["seed"], Settings(**card["settings"]), card["fingerprint"],
        card["toolchain"], card["errors"], card["prior"],
    )  # fmt: skip
    again_s = _probes(predictor)
    kept_s = card["probe_s"]
    same = len(kept_s) == len(again_s) and np.allclose(again_s, kept_s, rtol=1e-4, atol=0.0)
    if not same:
        raise InputError(
            f"predictions of the cost model {folder}", "others than when it was saved",
            "the same", f"Its features or kernels have changed since. {again}",
        )  # fmt: skip
    return predictor


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a rows.jsonl. Raises InputError for a file that is none."""
    try:
        return _rows(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"rows of a cost model in {path}", error, f"a {ROWS}") from None


def _rows(lines: bytes) -> tuple[Row, ...]:
    return tuple(Row.from_json(json.loads(line)) for line in lines.decode().splitlines())


def facts(target: Target) -> str:
    """Hash of what the features take from a target."""
    caches = target.caches
    return digest(
        [
            sorted(target.features), target.vector_bytes, target.registers,
            [caches.l1d, caches.l2, caches.l3], dict(sorted(target.peaks.items())),
        ]
    )  # fmt: skip


def _card(p: Predictor, parts: Mapping[str, bytes]) -> dict[str, Any]:
    bands: dict[str, Any] = {"below": p.spread.below, "above": list(p.spread.above)}
    bands |= {"novel": list(p.novel)} if p.novel else {}
    settings = vars(p.settings)
    return {
        "card": CARD_VERSION,
        "features": FEATURES_VERSION,
        "codegen": CODEGEN_VERSION,
        "target": p.target.name,
        "target_facts": facts(p.target),
        "fingerprint": p.fingerprint,
        "prior": p.prior,
        "seed": p.seed,
        "rows": len(p.rows),
        "load": p.point.load,
        "probe_s": _probes(p),
        "names": list(NAMES),
        "settings": settings,
        "toolchain": dict(p.toolchain),
        "factors": dict(zip(TERMS, p.point.factors.tolist(), strict=True)),
        "band": bands,
        "scope": {
            "ops": sorted(p.scope.ops),
            "threads": sorted(p.scope.threads),
            "formats": sorted(p.scope.formats),
            "kernels": sorted(p.scope.kernels),
            "estimate_s": list(p.scope.estimate_s),
        },
        "sha256": {name: _sha256(data) for name, data in parts.items()},
        "errors": {split: dict(values) for split, values in p.errors.items()},
    }


def _probes(predictor: Predictor) -> list[float]:
    """Predicted seconds of some of the rows, evenly spread."""
    step = -(-len(predictor.rows) // _PROBES)
    table = Table.of(predictor.rows[::step], predictor.target)
    return [float(v) for v in predictor.point.seconds(table.x, table.terms)]


def _read_card(folder: Path) -> Mapping[str, Any]:
    try:
        card = tomllib.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"no readable cost model in {folder}", error, f"{MODEL}, {HEADS}, {CARD} and {ROWS}",
            "Run `hwmpq cost-model sample`, then `hwmpq cost-model train`.",
        ) from error  # fmt: skip
    if card.get("card") != CARD_VERSION:
        raise InputError(
            f"version of the card {folder / CARD}", card.get("card"), CARD_VERSION,
            "Train the model again, or update hwmpq.",
        )  # fmt: skip
    known = {
        "card", "features", "codegen", "target", "target_facts", "fingerprint", "prior", "seed",
        "rows",
        "load", "probe_s", "names", "settings", "toolchain", "factors", "band", "scope", "sha256",
        "errors",
    }  # fmt: skip
    if set(card) != known:
        raise InputError(f"entries of the card {folder / CARD}", sorted(card), sorted(known))
    return card


def _read(path: Path, sha256: str) -> bytes:
    """The file's bytes. Raises InputError unless they are those of the card."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _MAX_BYTES else b""
    except OSError as error:
        raise InputError(f"unreadable part of a cost model {path}", error) from error
    if not data or _sha256(data) != sha256:
        raise InputError(
            f"damaged part of a cost model {path}", f"{size} bytes of another hash", sha256,
            "Get the folder again, or train the model again.",
        )  # fmt: skip
    return data


def _booster(folder: Path, model: bytes, again: str) -> Any:
    import xgboost

    if not model.startswith(b"{"):  # UBJSON and nothing else: no legacy binary, no pickle
        raise InputError(f"model of {folder}", model[:4], "UBJSON of XGBoost", again)
    booster = xgboost.Booster({"nthread": 1})
    try:
        booster.load_model(bytearray(model))
    except xgboost.core.XGBoostError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"model of {folder}", first, "UBJSON of XGBoost", again) from error
    if tuple(booster.feature_names or ()) != NAMES:
        raise InputError(f"features of the model of {folder}", "others", "those of its card", again)
    return booster


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
