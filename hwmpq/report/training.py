"""How a policy came to its plan, as a page: one self-contained HTML file of plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Steps that a curve is averaged over, as a share of all.
_SMOOTH = 0.02
_HEIGHT = 230
_COLOURS = ("#30638e", "#edae49", "#d1495b", "#00798c", "#66a182", "#8d6a9f", "#2e4057", "#9aa0a6")


def html(rows: Sequence[Mapping[str, float]], policy: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    rows: scalars of each step, all of the same names, `step` among them. policy: rows: what each
    row decides; options: their names; steps, probabilities [shots, R, O]: when each was so.
    """
    from plotly.graph_objects import Figure

    figure = Figure()
    curves = [name for name in rows[0] if name != "step"]
    titles = [*curves, *policy["rows"]]
    steps = [row["step"] for row in rows]
    for n, name in enumerate(curves):
        values = _smoothed([row[name] for row in rows])
        figure.add_scatter(x=steps, y=values, showlegend=False, line={"color": _COLOURS[0]},
                           **_axes(n))  # fmt: skip
        if name.endswith("/ target"):
            figure.add_shape(type="line", x0=steps[0], x1=steps[-1], y0=1, y1=1,
                             line={"dash": "dot"}, **_axes(n, "ref"))  # fmt: skip
    seen: dict[str, str] = {}
    for r, options in enumerate(policy["options"]):
        for o, option in enumerate(options):
            new = option not in seen
            colour = seen.setdefault(option, _COLOURS[len(seen) % len(_COLOURS)])
            figure.add_scatter(
                x=policy["steps"], y=[shot[r][o] for shot in policy["probabilities"]],
                stackgroup=str(r), name=option, legendgroup=option, showlegend=new,
                line={"width": 0.5, "color": colour}, **_axes(len(curves) + r),
            )  # fmt: skip
    _place(figure, titles)
    path.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means of the last few values."""
    width = max(1, round(_SMOOTH * len(values)))
    parts = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _axes(n: int, suffix: str = "axis") -> dict[str, str]:
    """The n-th panel's axes, in plotly's words."""
    number = "" if n == 0 else str(n + 1)
    return {f"x{suffix}": f"x{number}", f"y{suffix}": f"y{number}"}


def _place(figure: Any, titles: Sequence[str]) -> None:
    """Panels below each other in three columns, each with its title."""
    lines = -(-len(titles) // 3)
    for n, title in enumerate(titles):
        line, column = divmod(n, 3)
        number = "" if n == 0 else str(n + 1)
        left, bottom = column / 3, 1 - (line + 1) / lines
        across, up = [left + 0.03, left + 0.31], [bottom + 0.12 / lines, bottom + 0.8 / lines]
        figure.layout[f"xaxis{number}"] = {"domain": across, "anchor": f"y{number}"}
        figure.layout[f"yaxis{number}"] = {"domain": up, "anchor": f"x{number}"}
        figure.add_annotation(
            text=title, x=across[0], y=up[1], xref="paper", yref="paper", xanchor="left",
            yanchor="bottom", showarrow=False,
        )  # fmt: skip
    figure.update_layout(height=_HEIGHT * lines, template="plotly_white")
