"""The menu: which formats a layer may take on the target, by kernels, pins and ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import Format, format_named
from hwmpq.kernels import Kernel, best, why_not
from hwmpq.targets import Target
from hwmpq.types import BoolArray, Network

#: What is offered when nothing is asked for, as far as the target has kernels for it.
DEFAULT = ("fp32", "bf16", "w8a8", "w6a8", "w5a8", "w4a8", "w2a8")


@dataclass(frozen=True, eq=False)
class Menu:
    """formats in order; legal[L, F]; reasons[layer][format] where it is not; kernels[layer][format]
    where it is; ties: groups of layers that must agree."""

    formats: tuple[str, ...]
    legal: BoolArray
    reasons: dict[str, dict[str, str]]
    kernels: dict[str, dict[str, Kernel]]
    ties: tuple[tuple[str, ...], ...]


def make_menu(
    network: Network,
    target: Target,
    formats: Sequence[str] = (),
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
) -> Menu:
    """fp32 is always on the menu: it is the baseline.

    pins: 'GLOB=FORMAT|FORMAT,...'; ties: globs, each one group. Raises UnknownName or InputError.
    """
    asked = [format_named(name).name for name in formats] if formats else list(DEFAULT)
    names = list(dict.fromkeys(["fp32", *asked, *_pinned_formats(pins)]))
    reasons: dict[str, dict[str, str]] = {layer.name: {} for layer in network.layers}
    kernels: dict[str, dict[str, Kernel]] = {layer.name: {} for layer in network.layers}
    for layer in network.layers:
        for name in names:
            fmt = format_named(name)
            kernel = best(layer.workload, fmt, target.features)
            if kernel is None:
                reasons[layer.name][name] = (
                    why_not(layer.workload, fmt, target.features) or "no kernel"
                )
            else:
                kernels[layer.name][name] = kernel
    offered = tuple(n for n in names if any(n in kernels[la.name] for la in network.layers))
    useless = [n for n in asked if n not in offered]
    if formats and useless:
        one = network.layers[0].name
        raise InputError(
            f"no layer can run in {', '.join(useless)} on {target.name}",
            reasons[one].get(useless[0]), offered, "See `hwmpq inspect`.",
        )  # fmt: skip
    legal = np.array(
        [[name in kernels[layer.name] for name in offered] for layer in network.layers], bool
    )
    _apply_pins(network, offered, legal, reasons, pins)
    for name in set(offered) - {*asked, "fp32"}:
        column = offered.index(name)
        for i, layer in enumerate(network.layers):
            if legal[i, column] and not _is_pinned(layer.name, name, pins):
                legal[i, column] = False
                reasons[layer.name][name] = "only where --pin names it"
    if formats and "fp32" not in asked:
        column = offered.index("fp32")
        for i, layer in enumerate(network.layers):
            # fp32 was not asked for: only where nothing else is left
            if legal[i].sum() > 1 and not _is_pinned(layer.name, "fp32", pins):
                legal[i, column] = False
                reasons[layer.name]["fp32"] = "not among --formats"
    groups = _tie_groups(network, ties)
    for group in groups:
        rows = [i for i, name in enumerate(network.names) if name in group]
        if not legal[rows].all(axis=0).any():
            raise InputError(
                "tied layers have no format in common", ", ".join(group), None,
                "Loosen --pin, --formats or --tie.",
            )  # fmt: skip
    return Menu(offered, legal, reasons, kernels, groups)


def uniform(menu: Menu, network: Network, name: str) -> tuple[dict[str, str], list[str]]:
    """Every layer in a format where it has a kernel, else the least precise kernel-backed format
    with at least its bits; and the layers where it is another one."""
    wanted = format_named(name)
    assignment, others = {}, []
    for layer in network.layers:
        able = menu.kernels[layer.name]
        if name in able:
            assignment[layer.name] = name
            continue
        wide = [
            f for f in map(format_named, able)
            if f.weight.bits >= wanted.weight.bits and f.activation.bits >= wanted.activation.bits
        ]  # fmt: skip
        assignment[layer.name] = min(wide, key=_rank).name
        others.append(layer.name)
    return assignment, others


def _rank(fmt: Format) -> int:
    return fmt.rank


def _split_pin(pin: str) -> tuple[str, list[str]]:
    glob, equals, formats = pin.partition("=")
    if not equals or not glob or not formats:
        raise InputError("--pin", repr(pin), "GLOB=FORMAT or GLOB=FORMAT|FORMAT")
    return glob, [format_named(name).name for name in formats.split("|")]


def _pinned_formats(pins: Sequence[str]) -> list[str]:
    return [name for pin in pins for name in _split_pin(pin)[1]]


def _is_pinned(layer: str, fmt: str, pins: Sequence[str]) -> bool:
    return any(
        fnmatchcase(layer, glob) and fmt in formats for glob, formats in map(_split_pin, pins)
    )


def _matching(network: Network, glob: str, option: str) -> list[int]:
    hits = [i for i, name in enumerate(network.names) if fnmatchcase(name, glob)]
    if not hits:
        raise UnknownName(f"layer pattern of {option}", glob, network.names)
    return hits


def _apply_pins(
    network: Network, offered: Sequence[str], legal: BoolArray,
    reasons: dict[str, dict[str, str]], pins: Sequence[str],
) -> None:  # fmt: skip
    for pin in pins:
        glob, formats = _split_pin(pin)
        for i in _matching(network, glob, "--pin"):
            name = network.layers[i].name
            able = [f for f in formats if f in offered and legal[i, offered.index(f)]]
            if not able:
                reason = "; ".join(reasons[name].get(f, "no kernel") for f in formats)
                raise InputError(
                    f"--pin {pin!r}: layer {name!r} cannot run in it", reason,
                    [f for j, f in enumerate(offered) if legal[i, j]],
                )  # fmt: skip
            for j, f in enumerate(offered):
                if f not in able and legal[i, j]:
                    legal[i, j] = False
                    reasons[name][f] = f"pinned by {pin!r}"


def _tie_groups(network: Network, ties: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    groups = []
    for glob in ties:
        names = tuple(network.layers[i].name for i in _matching(network, glob, "--tie"))
        if len(names) > 1:
            groups.append(names)
    return tuple(groups)
