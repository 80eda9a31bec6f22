"""The losses of a run in, a small PNG out: the training loss as it was and smoothed, and each held-out loss."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, FAINT, TRAINED, HELD_OUT = "#1f2933", "#d9dee3", "#2b6cb0", "#c2410c"
"""Text, grid, training and held-out loss: dark enough on white, and told apart by everybody (contrast above 4.5)."""
SMOOTHING = 0.9
"""Weight of what came before, at each logged step; as trackers show it by default."""

NUM_COLOURS = 48
"""A palette of them makes a third of the file (25 instead of 73 KB for 1,000 steps), and nobody sees it."""


def draw_curve(
    file: Path,
    curve: Sequence[Mapping[str, float | None]],
    evaluations: Sequence[Mapping[str, float]],
    *,
    title: str,
    chosen_step: int | None = None,
) -> bool:
    """Draw the loss by step; returns whether there was anything to draw.

    Args:
        curve: rows with `step` and `loss`, in order.
        evaluations: rows with `step` and `eval_loss`, in order.
        chosen_step: is marked.
    """
    trained = [(row["step"], row["loss"]) for row in curve if row.get("step") is not None and _is_finite(row.get("loss"))]
    held_out = [(row["step"], row["eval_loss"]) for row in evaluations if _is_finite(row.get("eval_loss"))]
    if len(trained) < 2:
        return False
    # Not pyplot: it keeps state of its own, and may look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(8, 4.5), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    steps, losses = zip(*trained, strict=True)
    axes.plot(steps, losses, color=TRAINED, alpha=0.3, linewidth=1.0)
    axes.plot(steps, _smoothed(losses), color=TRAINED, linewidth=2.0, label="training loss, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=HELD_OUT, marker="o", markersize=5, linewidth=2.0, label="held-out loss")
    if chosen_step is not None and chosen_step > 0:
        axes.axvline(chosen_step, color=INK, linestyle=":", linewidth=1.2, label=f"adapter: step {chosen_step}")
    axes.set_title(title, color=INK, fontsize=12, parse_math=False)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel("loss per token (nats)", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(NUM_COLOURS).save(file, "PNG", optimize=True)
    return True


def _smoothed(values: Sequence[float | None]) -> list[float]:
    """Exponential mean, corrected for its short past at the start."""
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * (value or 0.0)
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    return smooth


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
