"""Predicted against measured times as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from pathlib import Path

from hwmpq.errors import InputError

#: measured seconds, predicted seconds, operator, format
Point = tuple[float, float, str, str]


def write_parity(points: Sequence[Point], title: str, path: Path) -> None:
    """Both axes logarithmic, a colour per format, lines at ± 10 %.

    Raises InputError without points, or when the file cannot be written.
    """
    import plotly.graph_objects as go

    if not points:
        raise InputError("points of the parity plot", 0, "some", "Evaluate the split S1.")
    figure = go.Figure()
    for fmt in dict.fromkeys(sorted(point[3] for point in points)):
        mine = [point for point in points if point[3] == fmt]
        figure.add_scatter(
            x=[1e6 * point[0] for point in mine], y=[1e6 * point[1] for point in mine],
            text=[f"{point[2]} {100 * (point[1] / point[0] - 1):+.1f} %" for point in mine],
            name=fmt, mode="markers", marker={"size": 5, "opacity": 0.7},
        )  # fmt: skip
    ends = [1e6 * pick(min(p[:2]) if pick is min else max(p[:2]) for p in points)
            for pick in (min, max)]  # fmt: skip
    for factor, dash in ((0.9, "dot"), (1.0, "solid"), (1.1, "dot")):
        figure.add_scatter(
            x=ends, y=[factor * end for end in ends], mode="lines", showlegend=False,
            line={"color": "gray", "width": 1, "dash": dash}, hoverinfo="skip",
        )  # fmt: skip
    limits = [log10(ends[0]) - 0.1, log10(ends[1]) + 0.1]
    figure.update_layout(
        title=title, template="plotly_white",
        xaxis={"type": "log", "title": "measured, us", "range": limits},
        yaxis={"type": "log", "title": "predicted, us", "range": limits},
    )  # fmt: skip
    try:
        figure.write_html(str(path), include_plotlyjs=True, full_html=True)
    except OSError as error:
        raise InputError("cannot write", f"{path} ({error.strerror})") from None
