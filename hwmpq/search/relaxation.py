"""The semidefinite bound of a quadratic over one-hot groups, by a primal-dual interior point.

On one-hot x every t = u·x with 0/1 coefficients inside one group is 0 or 1, so w·t(1 - t) adds
nothing for any w, but changes the quadratic form by the rank-one -w·u uᵀ. `convexify` takes the w
that give the greatest minimum of the convex function xᵀ(C - U diag(w) Uᵀ)x + (U w)·x: the quadratic
convex reformulation of Billionnet, Elloumi and Lambert (Math. Programming 131, 2012), whose value
is that of the semidefinite relaxation. As every constraint matrix is rank one, the Schur matrix is
an elementwise product (HKM direction: Helmberg et al., SIAM J. Optim. 6, 1996; Benson, Ye and
Zhang, SIAM J. Optim. 10, 2000), and 50 layers cost tenths of a second; `minimise` then takes
milliseconds at every node. Dense and small: a QP library would bring nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from hwmpq.search.evaluate import IndexArray
from hwmpq.types import BoolArray, FloatArray

#: Interior-point steps at most, and the share of the way to the boundary that a step may go.
STEPS = 60
SHARE = 0.95
#: Complementarity, relative to the value, at which the interior points stop.
NEAR = 1e-7
#: The u's at most: beyond the cells themselves, pairs are left out.
MOST = 1500


@dataclass(frozen=True, eq=False)
class Form:
    """xᵀ matrix x + line·x: convex where the group sums are held, and never above xᵀCx at a
    one-hot x. matrix: [D·F, D·F], line: [D·F]."""

    matrix: FloatArray
    line: FloatArray


@dataclass(frozen=True, eq=False)
class Relaxed:
    """x [D, F]: the relaxed minimum; price [R] ≥ 0 of the rows; slope [D, F] and level: the tangent
    plane level + slope·x lies below the objective at every one-hot x."""

    x: FloatArray
    price: FloatArray
    slope: FloatArray
    level: float


@dataclass(frozen=True, eq=False)
class Frame:
    """The shares x without the group sums: y [n], one open cell of each group eliminated.

    cells [n]: the cell of each y; first [D]: the eliminated cells; owner [n]: the group of each y;
    same [n, n]: of one group; pairs [2, P]: two y of one group.
    """

    cells: IndexArray
    first: IndexArray
    owner: IndexArray
    same: BoolArray
    pairs: IndexArray

    def shares(self, y: FloatArray) -> FloatArray:
        """x of the cells y stands for, then of the eliminated ones: [n + D]."""
        return np.concatenate([y, 1.0 - self.sums(y)])

    def centre(self) -> FloatArray:
        """Equal shares in every group."""
        return np.asarray(1.0 / (1.0 + self.sums(np.ones(len(self.owner)))[self.owner]))

    def sums(self, y: FloatArray) -> FloatArray:
        return np.asarray(np.bincount(self.owner, y, len(self.first)), np.float64)

    def back(self, v: FloatArray) -> FloatArray:
        """The transpose of shares' linear part: [n + D] -> [n]."""
        return np.asarray(v[: len(self.cells)] - v[len(self.cells) :][self.owner])

    def bowl(self, v: FloatArray) -> FloatArray:
        """Sᵀ diag(v) S, S being shares' linear part."""
        found = np.where(self.same, v[len(self.cells) :][self.owner], 0.0)
        found[np.diag_indices(len(found))] += v[: len(self.cells)]
        return np.asarray(found)

    def columns(self, rows: FloatArray) -> FloatArray:
        """A linear form over cells [..., D·F] as one over y [..., n]."""
        return np.asarray(rows[..., self.cells] - rows[..., self.first[self.owner]])

    def lifted(self, matrix: FloatArray) -> FloatArray:
        """Uᵀ A U of A [n, n]: the u's are single y's, then sums of pairs."""
        low, high = self.pairs
        wide = np.concatenate([matrix, matrix[:, low] + matrix[:, high]], 1)
        return np.concatenate([wide, wide[low] + wide[high]])

    def bent(self, weight: FloatArray) -> FloatArray:
        """U diag(w) Uᵀ [n, n]."""
        count, (low, high) = len(self.cells), self.pairs
        found = np.zeros((count, count))
        found[low, high] = found[high, low] = weight[count:]
        found[np.diag_indices(count)] = self.spread(weight)
        return found

    def spread(self, weight: FloatArray) -> FloatArray:
        """U w [n]."""
        count = len(self.cells)
        total = weight[:count].copy()
        for end in self.pairs:
            total += np.bincount(end, weight[count:], count)
        return total


def convexify(
    matrix: FloatArray, legal: BoolArray, rows: FloatArray, limits: FloatArray, deadline: float
) -> Form | None:
    """The convex form of xᵀCx over one-hot x in legal [D, F] whose relaxed minimum is greatest.

    matrix: [D·F, D·F] symmetric. rows: [R, D·F] @ x ≤ limits [R]. deadline: time.perf_counter()
    seconds; the form is then a poorer one. Returns None where the numbers broke down.
    """
    frame = frame_of(legal)
    unit = float(np.abs(matrix).max()) or 1.0
    with np.errstate(all="ignore"):  # a breakdown shows as a non-finite result
        weight = _weights(matrix / unit, frame, rows, limits, deadline)
    if weight is None:
        return None
    curved, line = matrix.copy(), np.zeros(len(matrix))
    curved[np.ix_(frame.cells, frame.cells)] -= unit * frame.bent(weight)
    line[frame.cells] = unit * frame.spread(weight)
    return Form(curved, line)


def minimise(form: Form, legal: BoolArray, rows: FloatArray, limits: FloatArray) -> Relaxed | None:
    """The least of a convex form over shares x in legal [D, F] with rows @ x ≤ limits.

    A primal-dual interior point; the tangent plane is exact for whatever x it stops at. Returns
    None where the numbers broke down.
    """
    frame = frame_of(legal)
    unit = float(np.abs(form.matrix).max() + np.abs(form.line).max()) or 1.0
    with np.errstate(all="ignore"):  # a breakdown shows as a non-finite result
        found = _least(Form(form.matrix / unit, form.line / unit), frame, rows, limits)
    if found is None:
        return None
    y, price = found
    x = np.zeros(legal.size)
    x[np.concatenate([frame.cells, frame.first])] = frame.shares(y)
    slope = 2.0 * (form.matrix @ x) + form.line
    level = -float(x @ form.matrix @ x)
    return Relaxed(x.reshape(legal.shape), price * unit, slope.reshape(legal.shape), level)


def frame_of(legal: BoolArray) -> Frame:
    """The frame of the cells in legal [D, F], one at least of every group."""
    groups, width = legal.shape
    first = legal.argmax(1)
    rest = legal.copy()
    rest[np.arange(groups), first] = False
    owner, cell = np.nonzero(rest)
    same = owner[:, None] == owner
    pairs = np.stack(np.nonzero(np.triu(same, 1)))[:, : max(0, MOST - len(owner))]
    return Frame(owner * width + cell, np.arange(groups) * width + first, owner, same, pairs)


def _reduced(
    form: Form, frame: Frame, rows: FloatArray, limits: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """A form and rows over y: (matrix [n, n], line [n], rows [R, n], what is left of limits)."""
    across = frame.columns(form.matrix)
    line = frame.columns(2.0 * form.matrix[:, frame.first].sum(1) + form.line)
    room = limits - rows[:, frame.first].sum(1)
    return frame.columns(across.T), line, frame.columns(rows), room


def _weights(
    matrix: FloatArray, frame: Frame, rows: FloatArray, limits: FloatArray, deadline: float
) -> FloatArray | None:
    """The w of the u's at the saddle point, where y is the relaxed x and spread X - x xᵀ."""
    from scipy.linalg import cho_factor, cho_solve

    count = len(frame.cells)
    flat = Form(matrix, np.zeros(len(matrix)))
    form, line, side, room = _reduced(flat, frame, rows, limits)
    diagonal = np.abs(np.diagonal(form))
    diagonal = diagonal + 1e-3 * diagonal.mean() + 1e-12
    least = float(np.linalg.eigvalsh(form / np.sqrt(np.outer(diagonal, diagonal)))[0])
    weight = np.zeros(count + frame.pairs.shape[1])
    weight[:count] = -(max(0.0, -least) + 0.1) * diagonal
    y = frame.centre()
    x, slack = frame.shares(y), np.maximum(1e-2, room - side @ y)
    bowl = form - frame.bent(weight)
    mu = 0.2 * float(np.diagonal(bowl).mean())
    spread: FloatArray = np.asarray(mu * np.linalg.inv(bowl), np.float64)
    z, price = mu / x, mu / slack
    total, centring = len(x) + len(slack) + count, 0.3
    for _ in range(STEPS):
        t = np.concatenate([y, y[frame.pairs].sum(0)])
        value = y @ form @ y + line @ y + weight @ (t - t * t)
        done = mu * total <= NEAR * (abs(float(value)) + 1e-6)
        if (done and _met(room - side @ y - slack)) or time.perf_counter() > deadline:
            break
        aim = centring * mu
        inverse = _inverse(bowl)
        if inverse is None:
            break
        right = frame.lifted(inverse)
        schur = frame.lifted(spread) * right
        pull = t - t * t - aim * np.diagonal(right)
        turned = 1.0 - 2.0 * t
        slip = room - side @ y - slack
        hessian = 2.0 * bowl + frame.bowl(z / x) + (side.T * (price / slack)) @ side
        down = 2.0 * form @ y + line + frame.spread(weight * turned)
        down += side.T @ (aim / slack - price / slack * slip) - frame.back(aim / x)
        try:
            held = _inverse(schur)
            if held is None:
                break
            both = hessian + _pressed(frame, turned[:, None] * held * turned)
            dy: FloatArray = -cho_solve(
                cho_factor(both, check_finite=False), down + frame.spread(turned * (held @ pull))
            )
        except np.linalg.LinAlgError:
            break
        dw = held @ (turned * np.concatenate([dy, dy[frame.pairs].sum(0)]) + pull)
        dx, ds = frame.shares(dy), slip - side @ dy
        dx[count:] -= 1.0
        dz, dp = aim / x - z - z / x * dx, aim / slack - price - price / slack * ds
        tilt = frame.bent(dw)
        turn = spread @ tilt @ inverse
        dspread = aim * inverse - spread + 0.5 * (turn + turn.T)
        step = SHARE * _reach((x, dx), (slack, ds), (z, dz), (price, dp))
        while step > 1e-8 and not (
            _positive(bowl - step / SHARE * tilt) and _positive(spread + step / SHARE * dspread)
        ):
            step *= 0.8
        if step <= 1e-8:
            break
        y, slack, weight = y + step * dy, slack + step * ds, weight + step * dw
        z, price, spread = z + step * dz, price + step * dp, spread + step * dspread
        x, bowl = frame.shares(y), form - frame.bent(weight)
        mu = float(z @ x + price @ slack + (spread * bowl).sum()) / total
        centring = 0.1 if step > 0.8 else 0.3 if step > 0.4 else 0.6
    return weight if np.isfinite(weight).all() else None


def _pressed(frame: Frame, matrix: FloatArray) -> FloatArray:
    """U A Uᵀ [n, n] of A over the u's."""
    count, (low, high) = len(frame.cells), frame.pairs
    tall = matrix[:count].copy()
    np.add.at(tall, low, matrix[count:])
    np.add.at(tall, high, matrix[count:])
    found = tall[:, :count].copy()
    np.add.at(found.T, low, tall[:, count:].T)
    np.add.at(found.T, high, tall[:, count:].T)
    return found


def _least(
    form: Form, frame: Frame, rows: FloatArray, limits: FloatArray
) -> tuple[FloatArray, FloatArray] | None:
    """(y, price of rows) at the minimum."""
    from scipy.linalg import cho_factor, cho_solve

    count = len(frame.cells)
    bowl, line, side, room = _reduced(form, frame, rows, limits)
    y = frame.centre()
    x, slack = frame.shares(y), np.maximum(1e-2, room - side @ y)
    mu = 0.1 * float(np.abs(2.0 * bowl @ y + line).mean()) + 1e-12
    z, price = mu / x, mu / slack
    total, centring = len(x) + len(slack), 0.2
    for _ in range(STEPS):
        slip = room - side @ y - slack
        value = y @ bowl @ y + line @ y
        if mu * total <= NEAR * (abs(float(value)) + 1e-6) and _met(slip):
            break
        aim = centring * mu
        hessian = 2.0 * bowl + frame.bowl(z / x) + (side.T * (price / slack)) @ side
        down = 2.0 * bowl @ y + line - frame.back(aim / x)
        down += side.T @ (aim / slack - price / slack * slip)
        try:
            dy: FloatArray = -cho_solve(
                cho_factor(hessian, check_finite=False), down, check_finite=False
            )
        except np.linalg.LinAlgError:
            return None
        dx, ds = frame.shares(dy), slip - side @ dy
        dx[count:] -= 1.0
        dz, dp = aim / x - z - z / x * dx, aim / slack - price - price / slack * ds
        step = SHARE * _reach((x, dx), (slack, ds), (z, dz), (price, dp))
        y, slack, z, price = y + step * dy, slack + step * ds, z + step * dz, price + step * dp
        x = frame.shares(y)
        mu = float(z @ x + price @ slack) / total
        centring = 0.05 if step > 0.8 else 0.2 if step > 0.4 else 0.6
    return (y, price) if np.isfinite(y).all() and np.isfinite(price).all() else None


def _inverse(matrix: FloatArray) -> FloatArray | None:
    from scipy.linalg import lapack

    factor, bad = lapack.dpotrf(matrix, lower=1)
    if bad:
        return None
    half, _ = lapack.dpotri(factor, lower=1)
    return np.asarray(np.tril(half) + np.tril(half, -1).T)


def _met(slip: FloatArray) -> bool:
    return bool(np.abs(slip).max(initial=0.0) <= 1e-7)


def _reach(*moves: tuple[FloatArray, FloatArray]) -> float:
    """The longest step, at most 1 / SHARE, that keeps every value + step·change ≥ 0."""
    longest = 1.0 / SHARE
    for value, change in moves:
        falling = change < 0
        longest = min(longest, float((-value[falling] / change[falling]).min(initial=np.inf)))
    return longest


def _positive(matrix: FloatArray) -> bool:
    from scipy.linalg import lapack

    return not lapack.dpotrf(matrix, lower=1, clean=0)[1]
