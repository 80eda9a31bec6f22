"""A report in, the charts whose x axis counts steps out, each drawn or, without data, the word why not."""

from collections.abc import Callable

from job.deliver.page.drawing import COLOURS, Canvas, Chart, LegendEntry, columns, draw
from job.deliver.page.series import LARGEST, SMOOTHED_FROM, Point, curve, is_drawable, restarts, setting, smoothed, speeds
from job.deliver.page.wording import GIB, loss, number, short_count, size
from job.deliver.report import Report

LOG_FROM = 30
"""Largest over smallest value from which a linear axis shows only the largest ones."""
LEVEL = (0, (4, 3))
"""Dashes of a line that values are compared with."""


def loss_chart(report: Report) -> Chart | str:
    training, held_out = curve(report.curve, "loss"), curve(report.evaluations, "eval_loss")
    if not training and not held_out:
        return "loss: no step was logged"
    chosen = report.chosen
    legend = []

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        _plot(canvas, training, "series-1")
        if held_out:
            axes.plot(*columns(held_out), color=COLOURS["series-2"], marker="o", markersize=3.6)
        if chosen is not None and 0 <= chosen.step < LARGEST:
            axes.axvline(chosen.step, color=COLOURS["accent"], linewidth=1, linestyle=LEVEL)
            if is_drawable(chosen.eval_loss):
                at = ([chosen.step], [chosen.eval_loss])
                axes.plot(*at, "o", color=COLOURS["accent"], markersize=9, markerfacecolor="none", markeredgewidth=1.8)
        _by_step(canvas, report, is_log=False)

    told = []
    if training:
        told.append(f"Training loss from {loss(training[0][1])} to {loss(training[-1][1])}")
        legend.append(LegendEntry(text="training", colour="series-1", mark="line"))
    if held_out:
        told.append(f"held-out loss from {loss(held_out[0][1])} to {loss(held_out[-1][1])}")
        legend.append(LegendEntry(text="held out", colour="series-2", mark="dots"))
    if chosen is not None:
        told.append(f"chosen: step {chosen.step}")
        legend.append(LegendEntry(text=f"chosen, step {chosen.step:,}", colour="accent", mark="ring"))
    svg = draw("loss", ", ".join(told), paint)
    return Chart(name="loss", title="Loss", unit="nats per token, by step", svg=svg, legend=(*legend, *_restart_entry(report)))


def learning_rate_chart(report: Report) -> Chart | str:
    points = curve(report.curve, "learning_rate")
    if not points:
        return "learning rate: no step was logged"
    highest = max(value for _, value in points)
    told = f"Learning rate, at most {highest:.2g}, at the end {points[-1][1]:.2g}"
    svg = draw("learning-rate", told, _stroke(report, points, "series-3", is_raw=True))
    return Chart(name="learning-rate", title="Learning rate", unit="by step", svg=svg)


def gradient_chart(report: Report) -> Chart | str:
    points = curve(report.curve, "grad_norm")
    if not points:
        return "gradient norm: no step was logged"
    values = [value for _, value in points]
    is_log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    clipped = setting(report, "train", "max_grad_norm")
    lines = [] if clipped is None or not min(values) <= clipped <= max(values) else [(clipped, "bad", "clipped above")]
    told = f"Gradient norm from {number(values[0])} to {number(values[-1])}, at most {number(max(values))}"
    return Chart(
        name="gradient-norm",
        title="Gradient norm",
        unit="logarithmic, by step" if is_log else "by step",
        svg=draw("gradient-norm", told, _stroke(report, points, "series-3", lines=lines, is_log=is_log)),
        legend=_line_entries(lines, number),
    )


def speed_chart(report: Report) -> Chart | str:
    points = speeds(report)
    if not points:
        return "speed: it takes two logged steps of one attempt"
    middle = sorted(value for _, value in points)[len(points) // 2]
    svg = draw(
        "speed", f"Tokens a second, {short_count(middle)} at the median", _stroke(report, points, "series-1", from_zero=True)
    )
    return Chart(name="speed", title="Speed", unit="tokens per second, by step", svg=svg)


def memory_chart(report: Report) -> Chart | str:
    points = [(step, value / GIB) for step, value in curve(report.curve, "memory_bytes")]
    if not points:
        return "memory: it was not measured"
    planned = report.plan.memory if report.plan else None
    lines = []
    if planned is not None:
        lines = [(planned.peak_bytes / GIB, "good", "expected"), (planned.safe_peak_bytes / GIB, "series-2", "to be safe")]
    available = report.plan.memory_bytes if report.plan else None
    highest = max([value for _, value in points] + [level for level, _, _ in lines])
    if available is not None and highest < available / GIB < 2 * highest:
        lines.append((available / GIB, "bad", "there is"))
    lines = [line for line in lines if is_drawable(line[0])]
    told = f"Peak memory so far, at the end {size(points[-1][1] * GIB)}"
    paint = _stroke(report, points, "series-1", lines=lines, from_zero=True, is_raw=True)
    legend = (LegendEntry(text="in use", colour="series-1", mark="line"), *_line_entries(lines, lambda gib: size(gib * GIB)))
    return Chart(name="memory", title="Memory", unit="GiB, by step", svg=draw("memory", told, paint), legend=legend)


Lines = list[tuple[float, str, str]]
"""Levels to compare with: (value, colour, what it is)."""


def _stroke(
    report: Report,
    points: list[Point],
    colour: str,
    *,
    lines: Lines | None = None,
    is_log: bool = False,
    from_zero: bool = False,
    is_raw: bool = False,
) -> Callable[[Canvas], None]:
    """One curve over the steps."""

    def paint(canvas: Canvas) -> None:
        if is_log:
            canvas.axes.set_yscale("log")
        _plot(canvas, points, colour, is_raw=is_raw)
        for level, shade, _ in lines or []:
            canvas.axes.axhline(level, color=COLOURS[shade], linewidth=1.2, linestyle=LEVEL)
        if from_zero:
            canvas.axes.set_ylim(0, 1.08 * max([value for _, value in points] + [level for level, *_ in lines or []]) or 1.0)
        _by_step(canvas, report, is_log=is_log)

    return paint


def _plot(canvas: Canvas, points: list[Point], colour: str, *, is_raw: bool = False) -> None:
    """The points, faint behind their smoothed course where there are many."""
    is_noisy = len(points) >= SMOOTHED_FROM and not is_raw
    if is_noisy:
        canvas.axes.plot(*columns(points), color=COLOURS[colour], linewidth=0.8, alpha=0.35)
    shown = smoothed(points) if is_noisy else points
    mark = "o" if len(points) < 8 else None
    canvas.axes.plot(*columns(shown), color=COLOURS[colour], marker=mark, markersize=3.6)


def _by_step(canvas: Canvas, report: Report, *, is_log: bool) -> None:
    """Mark where later attempts continued, and label both axes."""
    low, high = canvas.axes.get_xlim()
    for step in restarts(report):
        if low <= step <= high:
            canvas.axes.axvline(step, color=COLOURS["quiet"], linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
    canvas.axes.margins(x=0.015)
    canvas.x_ticks(is_integer=True)
    if is_log:
        canvas.log_y_ticks()
    else:
        canvas.y_ticks()


def _restart_entry(report: Report) -> tuple[LegendEntry, ...]:
    return (LegendEntry(text="restart", colour="quiet", mark="dots-only"),) if restarts(report) else ()


def _line_entries(lines: Lines, says: Callable[[float], str]) -> tuple[LegendEntry, ...]:
    return tuple(LegendEntry(text=f"{what} {says(value)}", colour=colour, mark="dash") for value, colour, what in lines)
