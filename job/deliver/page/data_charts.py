"""A tally in, the charts of the data out: the funnel of each source, and how long and in which language what was kept is."""

from collections import Counter
from collections.abc import Sequence

from job.data.tally import SourceTally, Tally
from job.deliver.page.drawing import COLOURS, Canvas, Chart, LegendEntry, draw
from job.deliver.page.series import setting
from job.deliver.page.wording import count, share, short_count, spelled
from job.deliver.report import Report

MAX_FUNNELS = 4
"""Sources with a chart of their own; smaller ones are summed in the last one."""
MAX_REASONS, MAX_LANGUAGES = 7, 8
BAR_INCHES = 0.26
MAX_LENGTH_POWER = 40
"""No example is longer than 2 to the power of this."""


def data_charts(report: Report) -> list[Chart]:
    """What there is to draw; sources without rows, lengths or languages are left out."""
    if report.data is None:
        return []
    training = [source for source in report.data.sources if not source.held_out]
    charts = _funnels(report.data)
    lengths = _lengths(training, setting(report, "data", "max_length"))
    languages = _languages(training)
    return [*charts, *(chart for chart in (lengths, languages) if chart is not None)]


def _funnels(tally: Tally) -> list[Chart]:
    sources = sorted((source for source in tally.sources if source.num_rows > 0), key=lambda source: source.held_out)
    if len(sources) <= MAX_FUNNELS:
        groups = [(source.source, [source]) for source in sources]
    else:
        by_size = sorted(sources, key=lambda source: -source.num_rows)
        groups = [(source.source, [source]) for source in by_size[: MAX_FUNNELS - 1]]
        rest = by_size[MAX_FUNNELS - 1 :]
        groups.append((f"{len(rest)} smaller sources", rest))
    return [_funnel(f"funnel-{at}", name, group) for at, (name, group) in enumerate(groups, start=1)]


def _funnel(name: str, title: str, sources: Sequence[SourceTally]) -> Chart:
    num_rows = sum(source.num_rows for source in sources)
    num_kept = sum(source.num_kept for source in sources)
    dropped: Counter[str] = Counter()
    for source in sources:
        dropped.update(source.dropped)
    reasons = _largest(dropped, MAX_REASONS, "other reasons")
    rows = [("read", 0, num_rows, "muted")]
    left = num_rows
    for reason, number in reasons:
        left -= number
        rows.append((spelled(reason), left, number, "bad"))
    rows.append(("kept", 0, num_kept, "good"))

    def paint(canvas: Canvas) -> None:
        for at, (_, start, number, colour) in enumerate(rows):
            canvas.axes.barh(at, max(number, num_rows / 250), left=start, height=0.62, color=COLOURS[colour])
            # Counts stand behind the bar, or before it where it ends too far right.
            is_right = start + number <= 0.66 * num_rows
            x, align = (start + number, "left") if is_right else (start, "right") if start > 0.2 * num_rows else (0, "left")
            is_inside = not is_right and start <= 0.2 * num_rows
            text = count(number) if colour == "muted" else f"{count(number)} · {share(number, num_rows)}"
            canvas.axes.annotate(
                canvas.label(text),
                (x, at),
                (-4 if align == "right" else 5, 0),
                textcoords="offset points",
                ha=align,
                va="center_baseline",
                color=COLOURS["surface" if is_inside else "ink"],
            )
        canvas.axes.set_xlim(0, num_rows)
        canvas.bars([row[0] for row in rows])

    told = f"Of {count(num_rows)} rows {count(num_kept)} are kept; dropped: " + (
        ", ".join(f"{count(number)} {spelled(reason)}" for reason, number in reasons) or "none"
    )
    unit = "rows, held out" if all(source.held_out for source in sources) else "rows"
    return Chart(name=name, title=title, unit=unit, svg=draw(name, told, paint, height=_height(rows), left=0.335))


def _lengths(sources: Sequence[SourceTally], max_length: float | None) -> Chart | None:
    """One bar for each power of two, as wide on the axis as the others."""
    rows: Counter[int] = Counter()
    for source in sources:
        for edge, number in source.lengths.items():
            if edge.isascii() and edge.isdigit() and 0 < (power := int(edge[:15]).bit_length() - 1) <= MAX_LENGTH_POWER:
                rows[power] += max(number, 0)
    if not +rows:
        return None
    low, high = min(+rows), max(+rows)
    powers = range(low, high + 1)

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        axes.bar([power - 0.5 for power in powers], [rows[power] for power in powers], width=0.92, color=COLOURS["series-1"])
        for power in powers:
            if rows[power]:
                text = short_count(rows[power]).replace(" ", "")
                at = (power - 0.5, rows[power])
                axes.annotate(text, at, (0, 3), textcoords="offset points", ha="center", color=COLOURS["ink"])
        if max_length is not None and max_length > 0:
            axes.axvline(_log2(max_length), color=COLOURS["bad"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(low - 1.1, max(high, low + 3) + 0.1)
        axes.set_ylim(0, 1.14 * max(rows.values()))
        stride = -(-(len(powers) + 1) // 9)
        edges = list(range(low - 1, high + 1, stride))
        axes.set_xticks(edges, [_edge(power) for power in edges])
        canvas.y_ticks()

    told = "Rows kept by length in tokens: " + ", ".join(f"{rows[power]} up to {2**power}" for power in powers if rows[power])
    is_shown = max_length is not None and low - 1.1 <= _log2(max_length) <= max(high, low + 3) + 0.1
    legend = [LegendEntry(text="examples", colour="series-1", mark="block")]
    if is_shown:
        legend.append(LegendEntry(text=f"MAX_LENGTH {count(max_length)}", colour="bad", mark="dash"))
    return Chart(
        name="lengths", title="Lengths", unit="rows kept, by tokens", svg=draw("lengths", told, paint), legend=tuple(legend)
    )


def _languages(sources: Sequence[SourceTally]) -> Chart | None:
    languages: Counter[str] = Counter()
    for source in sources:
        languages.update(source.languages)
    rows = _largest(languages, MAX_LANGUAGES, "others")
    if not rows:
        return None
    total = sum(number for _, number in rows)

    def paint(canvas: Canvas) -> None:
        largest = max(number for _, number in rows)
        for at, (_, number) in enumerate(rows):
            canvas.axes.barh(at, number, height=0.62, color=COLOURS["series-3"])
            text = f"{count(number)} · {share(number, total)}"
            canvas.axes.annotate(
                text, (number, at), (5, 0), textcoords="offset points", va="center_baseline", color=COLOURS["ink"]
            )
        canvas.axes.set_xlim(0, 1.42 * largest)
        canvas.bars([name for name, _ in rows])

    told = "Rows by language: " + ", ".join(f"{count(number)} {name}" for name, number in rows)
    svg = draw("languages", told, paint, height=_height(rows), left=0.19)
    return Chart(name="languages", title="Languages", unit="rows that were looked at", svg=svg)


def _largest(counts: Counter[str], limit: int, others: str) -> list[tuple[str, int]]:
    """The largest counts, in order; what is beyond `limit` summed in a last one."""
    ranked = (+counts).most_common()
    if len(ranked) <= limit:
        return ranked
    return [*ranked[: limit - 1], (others, sum(number for _, number in ranked[limit - 1 :]))]


def _height(rows: Sequence[object]) -> float:
    """Inches; at least as much as makes it look like the others beside it."""
    return max(1.2, BAR_INCHES * len(rows) + 0.4)


def _log2(length: float) -> float:
    from math import log2

    return log2(length)


def _edge(power: int) -> str:
    return f"{2**power:,}" if power < 14 else f"{2**power // 1024}k"
