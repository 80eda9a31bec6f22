"""A report in, the charts of its training and its checkpoints out, each drawn or, without data, the word why not."""

from collections.abc import Callable

from job.deliver.page.drawing import COLOURS, Canvas, Chart, LegendEntry, columns, draw
from job.deliver.page.series import is_drawable, spending
from job.deliver.page.step_charts import LEVEL, gradient_chart, learning_rate_chart, loss_chart, memory_chart, speed_chart
from job.deliver.page.wording import dollars, duration, tick_labels
from job.deliver.report import Report

MAX_BARS = 12


def training_charts(report: Report) -> tuple[list[Chart], list[str]]:
    """The charts, and a word on each one that has no data."""
    drawn: list[Chart] = []
    missing: list[str] = []
    for make in (loss_chart, learning_rate_chart, gradient_chart, speed_chart, memory_chart, spending_chart):
        chart = make(report)
        if isinstance(chart, str):
            missing.append(chart)
        else:
            drawn.append(chart)
    return drawn, missing


def score_chart(report: Report) -> Chart | None:
    """Scores of the base model and the checkpoints; None when nothing was scored."""
    scored = [(one.step, one.score) for one in report.candidates if is_drawable(one.score)][-MAX_BARS:]
    if not scored:
        return None
    chosen = report.chosen.step if report.chosen else None

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        for at, (step, score) in enumerate(scored):
            colour = COLOURS["quiet"] if not step else COLOURS["accent"] if step == chosen else COLOURS["series-1"]
            axes.bar(at, score, width=0.62, color=colour)
            axes.annotate(f"{score:.2f}", (at, score), (0, 3), textcoords="offset points", ha="center", color=COLOURS["ink"])
        axes.set_xlim(-0.6, max(len(scored), 3) - 0.4)
        axes.set_ylim(0, 1.12 * max(1.0, *(score for _, score in scored)))
        names = ["base" if not step else f"{step:,}" for step, _ in scored]
        stride = -(-len(names) // 7)
        axes.set_xticks(range(0, len(names), stride), names[::stride])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], tick_labels([0, 0.25, 0.5, 0.75, 1]))

    told = "Score by checkpoint: " + ", ".join(f"{score:.2f} at step {step}" for step, score in scored)
    legend = [LegendEntry(text="base model", colour="quiet", mark="block")] if not scored[0][0] else []
    legend.append(LegendEntry(text="checkpoint", colour="series-1", mark="block"))
    if any(step == chosen for step, _ in scored):
        legend.append(LegendEntry(text="chosen", colour="accent", mark="block"))
    return Chart(name="score", title="Score", unit="0 to 1, by step", svg=draw("score", told, paint), legend=tuple(legend))


def spending_chart(report: Report) -> Chart | str:
    spent = spending(report)
    if spent is None:
        return "cost: no time has passed"
    end, total = spent.points[-1]
    limit = spent.limit if spent.limit is not None and spent.limit < 4 * total else None  # a far one would flatten the course
    if not spent.is_usd and len(spent.attempts) == 1 and limit is None:
        return "cost: the price is unknown"  # and the time alone is a straight line
    name, per = ("minutes", 60.0) if end < 2 else ("hours", 1.0) if end < 96 else ("days", 1 / 24)
    upwards = 1.0 if spent.is_usd else per
    points = [(hour * per, amount * upwards) for hour, amount in spent.points]

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        for start, stop in spent.attempts:
            axes.axvspan(start * per, stop * per, color=COLOURS["series-1"], alpha=0.13, linewidth=0)
        axes.plot(*columns(points), color=COLOURS["quiet"], linestyle=(0, (2, 2)), linewidth=1.2)
        for at in range(0, len(points), 2):
            axes.plot(*columns(points[at : at + 2]), color=COLOURS["series-1"], linewidth=2)
        if limit is not None:
            axes.axhline(limit * upwards, color=COLOURS["bad"], linewidth=1.2, linestyle=LEVEL)
        axes.set_xlim(0, points[-1][0])
        axes.set_ylim(0, 1.08 * upwards * max(total, limit or 0.0) or 1.0)
        canvas.x_ticks()
        canvas.y_ticks(prefix="$" if spent.is_usd else "")

    says: Callable[[float], str] = dollars if spent.is_usd else lambda hours: duration(3600 * hours)
    told = f"{'Cost' if spent.is_usd else 'Running time'} of {len(spent.attempts)} attempts, in the end {says(total)}"
    legend = [LegendEntry(text="attempts", colour="series-1", mark="block")]
    if len(spent.attempts) > 1:
        legend.append(LegendEntry(text="between them", colour="quiet", mark="dash"))
    if limit is not None:
        text = f"{'MAX_COST_USD' if spent.is_usd else 'MAX_HOURS'} {says(limit)}"
        legend.append(LegendEntry(text=text, colour="bad", mark="dash"))
    return Chart(
        name="cost",
        title="Cost" if spent.is_usd else "Running time",
        unit=f"{'US dollars' if spent.is_usd else f'{name}, price unknown'}, by {name} since the first start",
        svg=draw("cost", told, paint),
        legend=tuple(legend),
    )
