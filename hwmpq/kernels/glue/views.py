"""What a chain of view operations reads: the passes of a strided copy, as plain numbers.

A tensor is seen as logical axes, each a product of *atoms* (extent, stride), outermost first.
Because an axis may have several atoms, joining axes in a reshape never needs a copy; only an axis
that is cut across an atom, or a slice of an axis of several atoms, does. Then the elements so far
are written to a scratch buffer in logical order and the chain goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from hwmpq.errors import InputError
from hwmpq.kernels.glue.call import Operand

Atom = tuple[int, int]
Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class View:
    """Axes over a buffer, from element `offset` on."""

    offset: int
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(extent for extent, _ in axis) for axis in self.axes)

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """All atoms, outermost first, neighbours merged where they lie as one."""
        return merged(tuple(atom for axis in self.axes for atom in axis))

    @property
    def contiguous(self) -> bool:
        return self.offset == 0 and self.atoms in (((prod(self.shape), 1),), ())


def merged(atoms: Sequence[Atom]) -> Axis:
    """Without extents of 1; (a, b·s)(b, s) becomes (a·b, s)."""
    found: list[Atom] = []
    for extent, stride in atoms:
        if extent == 1:
            continue
        if found and found[-1][1] == extent * stride:
            found[-1] = (found[-1][0] * extent, stride)
        else:
            found.append((extent, stride))
    return tuple(found)


def passes(source: Operand, steps: Sequence[Sequence[Any]], out: Operand) -> tuple[View, ...]:
    """The copies that carry `source` through the steps into `out`; each writes all its elements in
    order. All but the last fill a scratch buffer, from which the next one reads.

    Raises InputError when the steps do not lead to the result's shape.
    """
    done: list[View] = []
    strides = zip(source.shape, source.strides, strict=True)
    view = View(0, tuple(((extent, stride),) for extent, stride in strides))
    for name, *args in steps:
        after = _STEPS[name](view, *args)
        if after is None:
            done.append(view)
            after = _STEPS[name](_fresh(view.shape), *args)
            assert after is not None
        view = after
    if view.shape != out.shape:
        raise InputError("shape that a rearrange leads to", view.shape, str(out.shape))
    view = View(view.offset, tuple(view.axes[axis] for axis in out.order))
    if done and view.contiguous:  # the copy before wrote the result itself
        return tuple(done)
    return (*done, view)


def _fresh(shape: Sequence[int]) -> View:
    """A row-major buffer."""
    axes, step = [], 1
    for extent in reversed(shape):
        axes.append(((extent, step),))
        step *= extent
    return View(0, tuple(reversed(axes)))


def _reshape(view: View, shape: Sequence[int]) -> View | None:
    left = list(view.atoms)
    axes: list[Axis] = []
    for size in reversed(shape):
        axis: list[Atom] = []
        while size > 1:
            extent, stride = left.pop()
            if size % extent == 0:
                axis.append((extent, stride))
                size //= extent
            elif extent % size == 0:
                axis.append((size, stride))
                left.append((extent // size, stride * size))
                size = 1
            else:
                return None
        axes.append(tuple(reversed(axis)))
    return View(view.offset, tuple(reversed(axes)))


def _permute(view: View, order: Sequence[int]) -> View:
    return View(view.offset, tuple(view.axes[axis] for axis in order))


def _expand(view: View, shape: Sequence[int]) -> View:
    pairs = zip(view.axes, view.shape, shape, strict=True)
    return View(
        view.offset, tuple(axis if have == want else ((want, 0),) for axis, have, want in pairs)
    )


def _slice(view: View, axis: int, start: int, stop: int, step: int) -> View | None:
    picked = range(view.shape[axis])[start:stop:step]
    atoms = merged(view.axes[axis]) or ((1, 0),)
    if len(picked) == view.shape[axis]:
        return view
    if len(atoms) > 1:
        return None
    stride = atoms[0][1]
    axes = list(view.axes)
    axes[axis] = ((len(picked), stride * step),)
    return View(view.offset + picked.start * stride, tuple(axes))


_STEPS: dict[str, Callable[..., View | None]] = {
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
}
