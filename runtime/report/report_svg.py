"""Charts as inline SVG text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

Series = Sequence[tuple[float, float | None]]
"""(x, y) in order of x; None leaves a gap."""
WIDTH, HEIGHT, LEFT, BOTTOM = 860, 190, 62, 22
_POINTS = 400


def thin(series: Series) -> list[tuple[float, float | None]]:
    """At most 400 points, each the mean of its neighbours and the largest of their x."""
    size = -(-len(series) // _POINTS)
    if size <= 1:
        return list(series)
    found = []
    for at in range(0, len(series), size):
        part = series[at : at + size]
        values = [y for _, y in part if y is not None]
        found.append((part[-1][0], sum(values) / len(values) if values else None))
    return found


def lines(title: str, unit: str, series: Sequence[tuple[str, str, Series]]) -> str:
    """A chart of (label, css class, points) from zero (or the lowest) up; empty where there is nothing to draw."""
    thinned = [(label, style, thin(points)) for label, style, points in series]
    known = [(x, y) for _, _, points in thinned for x, y in points if y is not None]
    if not known:
        return ""
    low_x, high_x = min(x for x, _ in known), max(x for x, _ in known)
    low, high = min(0.0, *(y for _, y in known)), max(y for _, y in known)
    high = high if high > low else low + 1

    def place(x: float, y: float) -> str:
        across = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        return f"{LEFT + across * (WIDTH - LEFT - 8):.1f},{10 + (high - y) / (high - low) * (HEIGHT - BOTTOM - 10):.1f}"

    body = [_grid(low, high, unit), _ends(low_x, high_x)]
    for index, (label, style, points) in enumerate(thinned):
        body += [f'<polyline class="{style}" points="{" ".join(part)}"/>' for part in _parts(points, place)]
        body.append(f'<text class="{style} label" x="{LEFT + 10 + 150 * index}" y="20">{escape(label)}</text>')
    return _svg(title, HEIGHT, body)


def _parts(points: Series, place: Callable[[float, float], str]) -> list[list[str]]:
    """Runs without gaps; a single point is drawn as a short line."""
    runs: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append(place(x, y))
    return [run if len(run) > 1 else run * 2 for run in runs if run]


def _grid(low: float, high: float, unit: str) -> str:
    found = []
    for part in range(5):
        value = low + (high - low) * part / 4
        y = 10 + (high - value) / (high - low) * (HEIGHT - BOTTOM - 10)
        found.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}{escape(unit)}</text>'
        )
    return "".join(found)


def _ends(low: float, high: float) -> str:
    return (
        f'<text class="axis" x="{LEFT}" y="{HEIGHT - 4}">{low:g}</text>'
        f'<text class="axis" x="{WIDTH - 8}" y="{HEIGHT - 4}" text-anchor="end">{high:g}</text>'
    )


def bars(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """Stacked horizontal bars: (label, (css class, value) in order); one scale for all."""
    most = max((sum(value for _, value in parts) for _, parts in rows), default=0.0)
    if most <= 0:
        return ""
    body, scale = [], (WIDTH - LEFT - 90) / most
    for index, (label, parts) in enumerate(rows):
        y, x = 6 + 22 * index, float(LEFT)
        body.append(f'<text class="axis" x="{LEFT - 6}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        for style, value in parts:
            body.append(
                f'<rect class="{style}" x="{x:.1f}" y="{y}" width="{value * scale:.1f}" height="16">'
                f"<title>{value:.4g} s</title></rect>"
            )
            x += value * scale
        body.append(f'<text class="axis" x="{x + 5:.1f}" y="{y + 13}">{sum(v for _, v in parts):.4g} s</text>')
    return _svg(title, 12 + 22 * len(rows), body)


def spans(
    title: str,
    rows: Sequence[tuple[str, Sequence[tuple[float, float, str, str]]]],
    marks: Sequence[tuple[float, str, str]],
    end: float,
) -> str:
    """Rows of (from, until, css class, text) on one time axis from 0 to `end` seconds, and marks (at, class, text)."""
    if not rows:
        return ""
    left = 120
    scale = (WIDTH - left - 8) / max(end, 1e-9)
    height, body = 12 + 22 * len(rows) + BOTTOM, []
    for index, (label, parts) in enumerate(rows):
        y = 6 + 22 * index
        body.append(f'<text class="axis" x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(label[:18])}</text>')
        body += [
            f'<rect class="{style}" x="{left + a * scale:.1f}" y="{y}" width="{max(1.0, (b - a) * scale):.1f}" '
            f'height="16"><title>{escape(text)}</title></rect>'
            for a, b, style, text in parts
        ]
    for at, style, text in marks:
        x = left + at * scale
        body.append(
            f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{height - BOTTOM}">'
            f"<title>{escape(text)}</title></line>"
        )
    body.append(f'<text class="axis" x="{left}" y="{height - 4}">0 s</text>')
    body.append(f'<text class="axis" x="{WIDTH - 8}" y="{height - 4}" text-anchor="end">{end:.4g} s</text>')
    return _svg(title, height, body)


def _svg(title: str, height: int, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(body)}</svg>'
    )
