"""The page of a report: all that is known is on it, nothing that others wrote acts in it, and it holds for every report."""

import math
import re
from collections import Counter
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reports import START, bare_report, rich_report, rich_settings

from job.data.tally import Sample as DroppedRow
from job.data.tally import SourceTally, Stretch
from job.deliver.page.facts import outcome, timeline
from job.deliver.page.series import smoothed, speeds, spending
from job.deliver.page.settings_table import settings_shown
from job.deliver.page.write import MAX_ANSWERS, MAX_SAMPLES, answers_shown, write_page
from job.deliver.report import Chosen, Happening, Publication, Report, Sample
from job.events import Answer, Stopped

TRAINING = {"loss", "learning-rate", "gradient-norm", "speed", "memory", "cost"}
DATA = {"funnel-1", "funnel-2", "funnel-3", "lengths", "languages"}
VOID = {"meta", "link", "br", "img", "use", "path", "rect"}
HOSTILE = "</svg></pre></style><script>alert(1)</script><img src=x onerror=\"alert('2')\"> & $\\frac{ \x00 {{ 7 * 7 }} 漢"
CSS = Path(__file__).resolve().parent.parent / "job/deliver/page/report.css"


class Page(HTMLParser):
    """What a parser makes of a page: its tags and their attributes, whether they close, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def rich() -> str:
    return write_page(rich_report())


def charts_of(html: str) -> set[str]:
    return set(Page(html).values("data-chart"))


def test_a_rich_report_has_every_chart(rich: str) -> None:
    assert charts_of(rich) == TRAINING | DATA | {"score"}
    for svg in re.findall(r"<svg.*?</svg>", rich, re.DOTALL):
        assert 'viewBox="0 0 331.2' in svg and "<path" in svg and "<title>" in svg and not re.match(r"<svg[^>]* width=", svg)


def test_charts_take_all_their_colours_from_the_page(rich: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", rich, re.DOTALL):
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?!-)", re.sub(r'(href="|url\()#[^")]*', "", svg))
        assert "font-family" not in svg and "<style" not in svg
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", rich)), set(re.findall(r"(--[\w-]+):", rich))
    assert used <= defined


def test_ids_are_unique_and_what_is_referred_to_is_there(rich: str) -> None:
    page = Page(rich)
    ids = Counter(page.values("id"))
    assert max(ids.values()) == 1
    referred = {value[1:] for value in page.values("href") if value.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", rich))
    assert referred and referred <= set(ids)


def test_the_page_asks_for_nothing_else(rich: str) -> None:
    page = Page(rich)
    assert not {"script", "iframe", "object", "img"} & set(page.tags) and not page.values("src")
    assert {value for value in page.values("href") if not value.startswith(("#", "data:"))} == {
        "https://huggingface.co/pusula/qwen2.5-1.5b-pusula"
    }
    assert "@import" not in rich and "url(http" not in rich and "default-src 'none'" in rich
    assert len(rich.encode()) < 300_000


def test_the_page_tells_what_the_report_knows(rich: str) -> None:
    text = Page(rich).text
    for told in (
        "Finished", "exit status 0", "1 h 52 min", "$0.957", "10.7 M", "2.412 → 1.198", "11.16 → 3.31", "NVIDIA GeForce RTX 4090",
        "0.742 kWh", "9.38 GiB to 11.08 GiB", "1.03 ×", "attempt 2: ended without a word after 41 min 00 s",
        "diverged at step 455",
        "step 800 chosen", "İstanbul Boğazı hangi iki denizi", "1 of 2 tests failed", "871 duplicate", "MAX_COST_USD 1.25",
        "pusula/soru-cevap?weight=2", "bitsandbytes not installed", "14% of its rows are duplicates",
    ):  # fmt: skip
        assert told in text, told
    assert re.search(r"<mark>Dünya Güneş&#39;in çevresinde yaklaşık", rich)


def planted(text: str) -> Report:
    """The rich report with a text wherever others may have written one."""
    rich = rich_report()
    assert rich.data is not None
    source = SourceTally(
        source=text, shape=text, revision=text, num_rows=9, num_kept=4, dropped={text: 5}, num_tokens=9, languages={text: 3},
        samples={text: [DroppedRow(row=1, text=text)]}, first_example=[Stretch(text=text, learned=True)],
    )  # fmt: skip
    answers = [Answer(step=step, text=text, score=0.5, reason=text) for step in (0, 800)]
    attempts = [attempt.model_copy(update={"machine": text}) for attempt in rich.attempts]
    return rich_report(
        run_id=text, reason=text, attempts=attempts, model={"id": text, "revision": text}, versions={text: text},
        data=rich.data.model_copy(update={"sources": [source], "warnings": [text]}),
        happenings=[Happening(at=START, step=1, text=text)],
        samples=[Sample(prompt=text, before=text, after=text, scorer=text, answers=answers)],
        settings={"model": {"model_id": text}, text: {text: text}}, chosen=Chosen(step=800, by=text),
        publication=Publication(repo_id=text, revision=text, commit=text, url=f"javascript:{text}", merged_repo_id=text),
        actual=rich.actual.model_copy(update={"device": text}),
        plan=rich.plan.model_copy(update={"gpu": text, "price_source": text, "assumptions": [text]}) if rich.plan else None,
    )  # fmt: skip


def test_what_others_wrote_is_text_and_nothing_else() -> None:
    hostile, harmless = Page(write_page(planted(HOSTILE))), Page(write_page(planted("x" * len(HOSTILE))))
    assert hostile.tags == harmless.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert not [value for value in hostile.values("href") if "javascript" in value]
    assert hostile.text.count("alert(1)") > 25 and "49" not in hostile.text.partition("alert(1)")[2][:80]


@pytest.mark.parametrize("stopped", list(Stopped))
def test_every_end_is_said_in_plain_words(stopped: Stopped) -> None:
    report = bare_report(stopped=stopped, exit_status=75, reason=None)
    assert outcome(report).title in Page(write_page(report)).text
    assert len({outcome(bare_report(stopped=one)).title for one in Stopped}) == len(Stopped)


def test_a_finished_run_that_was_not_published_is_no_success() -> None:
    assert outcome(rich_report(exit_status=6)).tone == "warn" and outcome(rich_report()).tone == "good"


def test_a_report_that_knows_nothing_has_no_empty_frames() -> None:
    html = write_page(bare_report())
    page = Page(html)
    assert charts_of(html) == set() and "no step was logged" in page.text and "such data set on the Hub" in page.text
    assert not {"Checkpoints", "Samples", "Data", "Settings"} & set(page.words)
    assert "unknown" in page.text and "$" not in page.text


def test_a_chart_without_data_is_left_out_with_a_word_why() -> None:
    rows: list[dict[str, float | None]] = [{"step": 1, "loss": 2.0, "memory_bytes": None}]
    html = write_page(rich_report(curve=rows))
    assert charts_of(html) & TRAINING == {"loss", "cost"}
    assert "memory: it was not measured" in Page(html).text


def test_without_a_price_time_takes_the_place_of_cost() -> None:
    attempts = [one.model_copy(update={"price_usd_per_hour": None}) for one in rich_report().attempts]
    actual = rich_report().actual.model_copy(update={"cost_usd": "unknown"})
    html = write_page(rich_report(attempts=attempts, actual=actual, comparison=[]))
    assert "Running time" in html and "price unknown" in html and "set GPU_HOURLY_RATE" in html
    alone = rich_report(attempts=attempts[:1], settings={})
    assert "cost" not in charts_of(write_page(alone)) and "cost: the price is unknown" in write_page(alone)
    spent = spending(rich_report(attempts=attempts))
    assert spent is not None and not spent.is_usd and spent.points[-1][1] == pytest.approx(111.6 / 60)


def test_cost_grows_in_attempts_and_rests_between_them() -> None:
    spent = spending(rich_report())
    assert spent is not None and spent.is_usd and spent.limit == 1.25
    assert [round(start * 60) for start, _ in spent.attempts] == [0, 58, 131]
    assert spent.points[1][1] == spent.points[2][1] and spent.points[-1][1] == pytest.approx(0.9567, abs=1e-4)


def test_speed_is_not_measured_across_a_restart() -> None:
    rows: list[dict[str, float | None]] = [
        {"step": step, "num_tokens": 100 * step, "seconds": seconds}
        for step, seconds in ((1, 1.0), (2, 2.0), (3, 0.5), (4, 1.5), (5, 900.0), (6, 901.0))
    ]
    attempts = rich_report().attempts[:2]
    attempts[1] = attempts[1].model_copy(update={"first_step": 4})  # its clock was ahead when it continued
    assert speeds(rich_report(curve=rows, attempts=attempts)) == [(2, 100), (4, 100), (6, 100)]


def test_smoothing_keeps_the_number_of_points_and_swallows_one_outlier() -> None:
    points = [(float(step), 1.0 if step != 50 else 1000.0) for step in range(100)]
    assert {value for _, value in smoothed(points)} == {1.0} and len(smoothed(points)) == 100


def test_the_timeline_is_in_order_of_time() -> None:
    moments = timeline(rich_report())
    assert [one.at for one in moments] == sorted(one.at for one in moments) and len(moments) == 9
    assert "out of memory" in moments[1].text and moments[-1].after == "+2 h 44 min"


def test_only_settings_that_were_changed_are_shown() -> None:
    shown = {one.name: one.value for _, group in settings_shown(rich_report()) for one in group}
    assert shown["LORA_R"] == "32" and shown["LANGUAGE"] == "tr, en" and shown["NUM_TRAIN_EPOCHS"] == "2"
    assert "LEARNING_RATE" not in shown and "MAX_HOURS" not in shown
    assert {"MODEL_ID", "DATASETS"} <= set(shown)
    newer = {**rich_settings(), "later": {"new_setting": [1.0, {"a": None}]}, "odd": 3}
    assert ("later", ["NEW_SETTING"]) in [
        (title, [one.name for one in group]) for title, group in settings_shown(rich_report(settings=newer))
    ]


def test_samples_of_before_there_were_answers_are_shown() -> None:
    sample = Sample(prompt="p", before="b", after="a")
    assert [(name, one.text) for name, one in answers_shown(sample, rich_report())] == [("base model", "b"), ("adapter", "a")]


def test_with_many_checkpoints_the_chosen_one_is_among_those_shown() -> None:
    answers = [Answer(step=100 * step, text="t") for step in range(30)]
    shown = answers_shown(Sample(prompt="p", before="b", after="a", answers=answers), rich_report())
    steps = [one.step for _, one in shown]
    assert len(steps) == MAX_ANSWERS and steps == sorted(steps) and {0, 800, 2900} <= set(steps)


def test_a_long_run_with_many_samples_stays_below_a_megabyte() -> None:
    rich = rich_report()
    attempts = [
        rich.attempts[0].model_copy(update={"started": START + timedelta(hours=at), "ended": START + timedelta(hours=at + 0.6)})
        for at in range(50)
    ]
    rows = [{**row, "loss": math.sin(7 * at) + 3} for at, row in enumerate(rich.curve + rich.curve[:100])]
    samples = [one.model_copy(update={"prompt": f"{at} {one.prompt}"}) for at in range(250) for one in rich.samples]
    html = write_page(rich_report(attempts=attempts, curve=rows, samples=samples))
    assert len(html.encode()) < 1_000_000 and html.count('class="card sample"') == MAX_SAMPLES
    assert f"{1000 - MAX_SAMPLES} more are in report.json" in html


def contrast(one: str, other: str) -> float:
    """Of two colours, by WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_is_legible_in_both_themes(theme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", CSS.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", blocks[theme]))
    pairs = [(text, ground) for text in ("--ink", "--muted") for ground in ("--bg", "--surface", "--sunken")]
    pairs += [(f"--{tone}", f"--{tone}-soft") for tone in ("good", "warn", "bad", "accent")]
    pairs += [("--ink", "--learned"), ("--series-1", "--bg"), ("--ink", "--accent-soft"), ("--muted", "--good-soft")]
    pairs += [("--surface", "--muted"), ("--surface", "--good"), ("--warn", "--surface"), ("--muted", "--bad-soft")]
    assert {pair: ratio for pair in pairs if (ratio := contrast(colours[pair[0]], colours[pair[1]])) < 4.5} == {}
    lines = [(f"--{name}", "--surface") for name in ("series-1", "series-2", "series-3", "good", "bad", "accent", "quiet")]
    assert {pair: ratio for pair in lines if (ratio := contrast(colours[pair[0]], colours[pair[1]])) < 3} == {}
