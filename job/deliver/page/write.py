"""A report in, `report.html` out: one file that asks for nothing else, to be opened from a disk or sent to someone.

All that a model, a data set or a user wrote is escaped, and the page forbids itself scripts and requests. What is not handled
here: writing it into the store.
"""

from jinja2 import Environment, PackageLoader, StrictUndefined

from job.data.tally import Stretch
from job.deliver.page import facts, wording
from job.deliver.page.charts import score_chart, training_charts
from job.deliver.page.data_charts import data_charts
from job.deliver.page.settings_table import settings_shown
from job.deliver.report import Report, Sample
from job.events import Answer

MAX_SAMPLES, MAX_ANSWERS = 40, 8
MAX_TEXT = 6000
"""Characters of an answer or an example: forty prompts with four long answers still make less than a megabyte."""
MAX_MOMENTS = 200
MAX_DROPPED, MAX_DROPPED_TEXT = 3, 400
"""Rows of each reason, and characters of each."""


def write_page(report: Report) -> str:
    """Render the page; whatever the report does not know is left out, or said to be unknown."""
    environment = Environment(
        loader=PackageLoader("job.deliver.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=wording.count,
        cut=wording.cut,
        dollars=wording.dollars,
        duration=wording.duration,
        loss=wording.loss,
        moment=wording.moment,
        perplexity=wording.perplexity,
        share=wording.share,
        size=wording.size,
        spelled=wording.spelled,
    )
    training, missing = training_charts(report)
    moments = facts.timeline(report)
    return environment.get_template("report.html.jinja").render(
        report=report,
        outcome=facts.outcome(report),
        tiles=facts.tiles(report),
        rows=facts.comparison(report),
        memory_parts=facts.memory_parts(report),
        training=training,
        missing=missing,
        score=score_chart(report),
        data_charts=data_charts(report),
        moments=moments[-MAX_MOMENTS:],
        num_moments=len(moments),
        settings=settings_shown(report),
        samples=[(sample, answers_shown(sample, report)) for sample in report.samples[:MAX_SAMPLES]],
        chosen_step=report.chosen.step if report.chosen else None,
        example=example_shown,
        max_text=MAX_TEXT,
        max_dropped=MAX_DROPPED,
        max_dropped_text=MAX_DROPPED_TEXT,
        address=web_address(report.publication.url) if report.publication else None,
    )


def answers_shown(sample: Sample, report: Report) -> list[tuple[str, Answer]]:
    """(whose, answer): the base model's, then the checkpoints', the chosen one's among them."""
    chosen = report.chosen.step if report.chosen else None
    if not sample.answers:
        step = report.actual.num_steps if chosen is None else chosen
        return [("base model", Answer(step=0, text=sample.before)), ("adapter", Answer(step=step, text=sample.after))]
    base = [one for one in sample.answers if one.step == 0][:1]
    others = [one for one in sample.answers if one.step != 0]
    most = MAX_ANSWERS - len(base)
    shown = others[-most:]
    if missing := [one for one in others[:-most] if one.step == chosen]:
        shown = [*missing[:1], *shown[1:]]
    return [*(("base model", one) for one in base), *((f"step {one.step:,}", one) for one in shown)]


def example_shown(stretches: list[Stretch]) -> list[Stretch]:
    """As much of an example as a reader looks at."""
    shown, left = [], MAX_TEXT
    for stretch in stretches:
        if left <= 0:
            break
        shown.append(stretch.model_copy(update={"text": wording.cut(stretch.text, left)}))
        left -= len(stretch.text)
    return shown


def web_address(url: str) -> str | None:
    """The address if it is safe to follow: a page on the web, nothing that a browser would run."""
    return url if url.startswith(("https://", "http://")) else None
