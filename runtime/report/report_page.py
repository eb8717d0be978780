"""The report as one HTML page without anything from elsewhere: no script, no font, no image."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from heteromesh.runtime.records.metrics import duration
from heteromesh.runtime.report.report_facts import Delays, RunFacts, StepFacts
from heteromesh.runtime.report.report_svg import bars, lines, spans

EVENTS_SHOWN = 500
SETTINGS_SHOWN = 60
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #8b949e; --rule: #d8dee4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #8b949e; --rule: #30363d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 900px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid var(--rule); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid var(--rule); }
td.left, th.left { text-align: left; } p.note { color: var(--faint); }
svg { max-width: 100%; height: auto; display: block; margin: .6em 0; }
svg text { font-size: 11px; fill: var(--ink); } svg text.axis { fill: var(--faint); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 1.6; }
svg .measured { stroke: #1f6feb; } svg .predicted { stroke: #d29922; stroke-dasharray: 5 3; }
svg .loss { stroke: #2da44e; } svg text.label { stroke: none; }
svg text.measured { fill: #1f6feb; } svg text.predicted { fill: #d29922; } svg text.loss { fill: #2da44e; }
svg .busy, svg .stay { fill: #1f6feb; } svg .wait { fill: #d0d7de; } svg .lost { fill: #cf222e; }
svg line.diagnosis { stroke: #cf222e; stroke-width: 2; } svg line.epoch { stroke: #8b949e; stroke-dasharray: 2 2; }
details summary { cursor: pointer; }
"""


def page(facts: RunFacts) -> str:
    """The whole document."""
    title = f"Run {facts.directory}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _summary(facts),
        _section("Steps", _steps(facts.steps)),
        _section("Ranks: busy and waiting", _ranks(facts)),
        _section("Members", _members(facts)),
        _section("Delays between members", _delays(facts.delays)),
        _section("Events", _events(facts.events)),
        _section("Settings", _settings(facts.settings)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(s for s in sections if s)
        + "\n</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Cells are text and are escaped; `left`: columns that are not numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kind = [' class="left"' if column in left else "" for column in range(len(row))]
        return "".join(f"<{tag}{k}>{escape(cell)}</{tag}>" for k, cell in zip(kind, row, strict=True))

    head = f"<tr>{cells('th', heads)}</tr>" if heads else ""
    body = "".join("<tr>" + cells("td", row) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _summary(facts: RunFacts) -> str:
    s = facts.summary
    rows = []
    if s.steps:
        rows.append(("steps", f"{s.steps} ({s.first_step} to {s.last_step})"))
    if s.first_loss is not None and s.last_loss is not None:
        rows.append(("loss", f"{s.first_loss:.4g} to {s.last_loss:.4g}"))
    if s.seconds:
        rows.append(("time in steps", duration(s.seconds)))
        rows.append(("tokens", f"{s.tokens:,.0f} ({s.tokens / s.seconds:,.0f} a second)"))
    if s.median_error is not None:
        rows.append(("predicted, against measured", f"median absolute error of a step {s.median_error:.1%}"))
    waits = [
        ("late plans", sum(f.plan_wait or 0 for f in facts.steps)),
        ("data", sum(f.data_wait or 0 for f in facts.steps)),
        ("communication that nothing hid", sum(f.exposed_comm or 0 for f in facts.steps)),
    ]
    if s.seconds:
        rows += [(f"waited for {what}", f"{seconds:.3g} s ({seconds / s.seconds:.1%})") for what, seconds in waits]
    if s.members:
        rows.append(("members", f"{s.members} came, {s.losses_of_members} were lost, {s.diagnoses} diagnoses"))
    if facts.unreadable_lines:
        rows.append(("unreadable lines", f"{facts.unreadable_lines}, left out here"))
    return table((), rows, (0, 1))


def _steps(steps: Sequence[StepFacts]) -> str:
    seconds = lines(
        "seconds of each step",
        " s",
        [
            ("measured", "measured", [(s.step, s.measured) for s in steps]),
            ("predicted", "predicted", [(s.step, s.predicted) for s in steps]),
        ],
    )
    loss = lines("loss of each step", "", [("loss", "loss", [(s.step, s.loss) for s in steps])])
    worst = sorted((s for s in steps if s.predicted and s.measured), key=lambda s: -abs(_over(s)))[:5]
    rows = [(str(s.step), f"{s.predicted:.4g}", f"{s.measured:.4g}", f"{_over(s):+.3g}") for s in worst]
    heads = ("step", "predicted s", "measured s", "measured - predicted s")
    far = f"<details><summary>Farthest from their prediction</summary>{table(heads, rows)}</details>" if rows else ""
    return seconds + loss + far


def _over(step: StepFacts) -> float:
    return (step.measured or 0.0) - (step.predicted or 0.0)


def _ranks(facts: RunFacts) -> str:
    chart = bars(
        "seconds in passes (blue) and waiting (grey), by rank",
        [(f"rank {r.rank}", (("busy", r.busy), ("wait", r.wait))) for r in facts.ranks],
    )
    if not chart:
        return ""
    return chart + '<p class="note">Blue: seconds in passes. Grey: the rest of the steps it took part in.</p>'


def _members(facts: RunFacts) -> str:
    if not facts.events:
        return ""
    end = max(float(e["at"]) for e in facts.events)
    rows: dict[str, list[tuple[float, float, str, str]]] = {}
    for stay in facts.stays:
        until = end if stay.lost is None else stay.lost
        text = f"member {stay.member} at {stay.address}, {stay.joined:.1f} s to " + (
            "the end" if stay.lost is None else f"{stay.lost:.1f} s: {stay.reason}"
        )
        rows.setdefault(stay.name, []).append((stay.joined, until, "stay", text))
        if stay.lost is not None and stay.reason != "left":
            rows[stay.name].append((stay.lost, stay.lost + end / 200, "lost", text))
    marks = [(float(e["at"]), e["kind"], describe(e)) for e in facts.events if e["kind"] in ("diagnosis", "epoch")]
    note = (
        '<p class="note">Blue: in the job. Red ends: lost. Red lines: diagnoses. Dotted lines: epochs. '
        "Hold the pointer over them to read them.</p>"
    )
    chart = spans("members over time", list(rows.items()), marks, end)
    return chart + note if chart else ""


def _delays(delays: Sequence[Delays]) -> str:
    if not delays:
        return ""
    return "".join(_matrix(d) for d in delays[-3:])


def _matrix(delays: Delays) -> str:
    """Seconds for a MB, coloured by their ratio to the lower quartile."""
    known = sorted(cell for row in delays.matrix for cell in row if cell is not None)
    usual = known[len(known) // 4] if known else 0.0
    heads = "".join(f"<th>{escape(name)}</th>" for name in delays.names)
    body = []
    for name, row, share in zip(delays.names, delays.matrix, delays.blocked, strict=True):
        cells = "".join(_cell(cell, usual) for cell in row)
        waits = "" if share is None else f"{share:.0%}"
        body.append(f'<tr><th class="left">{escape(name)}</th>{cells}<td>{waits}</td></tr>')
    return (
        f"<p>{delays.at:.1f} s, group {escape(delays.group)}: ms for a MB, from the row to the column.</p><table><tr>"
        f'<th class="left"></th>{heads}<th>waits</th></tr>{"".join(body)}</table>'
    )


def _cell(seconds: float | None, usual: float) -> str:
    if seconds is None:
        return "<td></td>"
    ratio = seconds / usual if usual > 0 else 1.0
    strength = min(0.75, max(0.0, (ratio - 1) / 8))
    return f'<td style="background: rgb(207 34 46 / {strength:.2f})">{seconds * 1e9:.3g}</td>'


def describe(event: Mapping[str, Any]) -> str:
    """An event in words."""
    kind = event["kind"]
    if kind == "diagnosis":
        names = event.get("names")
        who = " to ".join(str(n) for n in names) if isinstance(names, list) else ""
        where = f"{event.get('operation')} {event.get('sequence')} of group {event.get('group')}"
        lead = f"{event.get('syndrome')}: {event.get('place')} {who} in {where}"
        return f"{lead}: {event.get('why')}; {event.get('action')}"
    if kind == "epoch":
        names = event.get("names")
        count = len(names) if isinstance(names, list) else 0
        steps = event.get("committed")
        return f"epoch {event.get('epoch')} of {event.get('group')}: {count} members, {steps} steps committed"
    if kind in ("joined", "lost"):
        why = f": {event.get('reason')}" if kind == "lost" else f" from {event.get('address')}"
        return f"{event.get('name')} (member {event.get('member')}){why}"
    rest = {k: v for k, v in event.items() if k not in ("at", "time", "kind")}
    return ", ".join(f"{key} {value}" for key, value in rest.items())


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    if not events:
        return ""
    shown = events[-EVENTS_SHOWN:]
    rows = [(f"{float(e['at']):.1f}", _clock(float(e["time"])), str(e["kind"]), describe(e)) for e in shown]
    note = f'<p class="note">The last {len(shown)} of {len(events)}.</p>' if len(shown) < len(events) else ""
    return note + table(("s", "UTC", "what", ""), rows, (2, 3))


def _clock(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return ""


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [(key, str(value)) for key, value in list(settings.items())[:SETTINGS_SHOWN]]
    return f"<details><summary>config.json</summary>{table((), rows, (0, 1))}</details>" if rows else ""


def text(facts: RunFacts) -> str:
    """One line for people who don't open the page."""
    s = facts.summary
    parts = [f"{s.steps} step{'s' * (s.steps != 1)}"]
    measured = [f.measured for f in facts.steps if f.measured]
    if measured:
        parts.append(f"{statistics.median(measured):.3g} s each (median)")
    if s.median_error is not None:
        parts.append(f"predicted within {s.median_error:.1%} (median)")
    if s.members:
        parts.append(f"{s.members} members, {s.losses_of_members} lost, {s.diagnoses} diagnoses")
    return ", ".join(parts)
