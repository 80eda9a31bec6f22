"""Strokes in, an SVG to be put into a page out: its colours are variables of the page's style, so it follows the theme.

matplotlib draws; it is imported here, inside functions, because that takes most of a second. Text that others wrote never
reaches it (`Canvas.label`): it would read `$` as mathematics and complain about letters that its own fonts lack.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from job.deliver.page.wording import tick_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    name: f"#0a00{index:02x}"
    for index, name in enumerate(
        ("ink", "muted", "grid", "surface", "series-1", "series-2", "series-3", "good", "bad", "accent", "quiet"), start=1
    )
}
"""A variable of the page's style, and the colour that stands for it while matplotlib draws."""
WIDTH, HEIGHT = 4.6, 2.45
"""Inches at 72 points: drawn at this width a point is a pixel on a phone of 400 pixels, and 1.2 of them on a desktop."""
FONT_POINTS = 10.5
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib's own; only to lay out, the page's font replaces it
    "font.size": FONT_POINTS,
    "path.simplify": True,
    "axes.unicode_minus": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LegendEntry:
    """One line of a legend; the page shows it, so that it never lies over the chart."""

    text: str
    colour: str
    """A name of COLOURS."""
    mark: str
    """line, dash, dots, dot, ring or block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One figure of the page."""

    name: str
    """Unique in the page."""
    title: str
    unit: str
    """What the axes count."""
    svg: Markup
    legend: tuple[LegendEntry, ...] = ()


class Canvas:
    """Axes in the page's style, and the labels that are put in afterwards."""

    def __init__(self, axes: "Axes") -> None:
        self.axes = axes
        self._labels: list[str] = []

    def label(self, text: str) -> str:
        """A stand-in for a text that others wrote."""
        self._labels.append(text)
        return f"L{len(self._labels) - 1}L"

    def insert_labels(self, svg: str) -> str:
        return re.sub(r">L(\d+)L<", lambda match: f">{escape(self._labels[int(match[1])])}<", svg)

    def x_ticks(self, *, is_integer: bool = False, num_ticks: int = 5) -> None:
        from matplotlib.ticker import MaxNLocator

        low, high = self.axes.get_xlim()
        ticks = MaxNLocator(nbins=num_ticks, integer=is_integer, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        shown = [float(tick) for tick in ticks if low <= tick <= high]
        self.axes.set_xticks(shown, tick_labels(shown))
        self.axes.set_xlim(low, high)

    def y_ticks(self, *, prefix: str = "", num_ticks: int = 4) -> None:
        from matplotlib.ticker import MaxNLocator

        low, high = self.axes.get_ylim()
        ticks = MaxNLocator(nbins=num_ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        shown = [float(tick) for tick in ticks if low <= tick <= high]
        self.axes.set_yticks(shown, tick_labels(shown, prefix=prefix))
        self.axes.set_ylim(low, high)

    def log_y_ticks(self) -> None:
        """Powers of ten, with 2 and 5 between them where these are few; the axis must be logarithmic already."""
        from matplotlib.ticker import LogLocator, NullLocator

        low, high = self.axes.get_ylim()
        shown: list[float] = []
        for parts in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            ticks = LogLocator(subs=parts, numticks=6).tick_values(low, high)
            shown = [float(tick) for tick in ticks if low <= tick <= high]
            if len(shown) >= 3:
                break
        self.axes.yaxis.set_minor_locator(NullLocator())
        self.axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
        self.axes.set_ylim(low, high)

    def bars(self, names: Sequence[str], *, num_letters: int = 17) -> None:
        """Name rows of horizontal bars, the first one on top."""
        shown = [name if len(name) <= num_letters else f"{name[: num_letters - 1]}…" for name in names]
        self.axes.set_yticks(range(len(names)), [self.label(name) for name in shown])
        self.axes.set_ylim(len(names) - 0.45, -0.55)
        self.axes.set_xticks([])
        self.axes.grid(visible=False)
        self.axes.spines["bottom"].set_visible(False)
        self.axes.tick_params(axis="y", labelcolor=COLOURS["ink"])


def draw(name: str, told: str, paint: Callable[[Canvas], None], *, height: float = HEIGHT, left: float = 0.135) -> Markup:
    """Draw one chart; `told` says in a sentence what it shows, for those who cannot see it.

    Args:
        name: sets the ids apart from those of the page's other charts.
        left: share of the width that the labels of the y axis take.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), facecolor="none")
        FigureCanvasSVG(figure)
        bottom = 0.31 / height  # room for one row of labels
        axes = figure.add_axes((left, bottom, 0.985 - left, 0.95 - bottom), facecolor="none")
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.spines["bottom"].set_color(COLOURS["quiet"])
        axes.tick_params(length=0, pad=4, labelcolor=COLOURS["muted"])
        axes.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        canvas = Canvas(axes)
        paint(canvas)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Markup(canvas.insert_labels(_for_page(written.getvalue(), name, told)))


def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The x values and the y values."""
    return [x for x, _ in points], [y for _, y in points]


_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}


def _for_page(svg: str, name: str, told: str) -> str:
    """What stands alone becomes part of a page: no ids that others have, no style for everything, the page's colours and font."""
    found = re.search(r'viewBox="([^"]+)"[^>]*>\s*(.*)</svg>', svg, re.DOTALL)
    assert found is not None, "matplotlib writes one svg element"
    box, body = found[1], found[2]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;\"]*(; )?", "", body)
    body = re.sub(r"#0a00[0-9a-f]{2}", lambda match: _VARIABLES[match[0]], body)
    body = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]).replace("\n", ""), body)
    body = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", body)
    body = re.sub(r">\s+<", "><", body)
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{escape(told)}" data-chart="{name}">'
        f"<title>{escape(told)}</title>{body.strip()}</svg>"
    )
