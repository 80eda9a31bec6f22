"""The whole of preparation on real files: nothing unaccounted for, the same bytes whatever happened on the way."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from datasets import load_from_disk
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from job.data.prepare import prepare
from job.data.reasons import Reason
from job.data.tally import Tally, load_tally
from job.data.templates import set_template
from job.data.tokens import IGNORED
from job.errors import DataError
from job.events import EventWriter, Progress, read_events
from job.prepared import locked, make_prepared
from job.settings import DataSettings
from job.train.spec import PrepareSpec

END = "<|im_end|>"
TEXTS = [
    "system user assistant\nThe compass shows the way home. Pusula kısa ve açık cevap verir.",
    "def f(x):\n    return x\n\nfor line in lines:\n        print(line)",
    "What is the answer? The answer is short. Güneş batıdan batar.",
]
# A template that forgets what the assistant thought in earlier turns, as those of reasoning models do.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(*, template: str | None = None, trim_offsets: bool = False) -> Any:
    """A real byte-level BPE tokenizer, trained on a few lines."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(TEXTS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)
    tokenizer.chat_template = template
    set_template(tokenizer, None)
    return tokenizer


TOKENIZER = build_tokenizer()


def prepare_in(folder: Path, *datasets: str | Path, tokenizer: Any = TOKENIZER, seed: int = 42, **changes: Any) -> Tally:
    defaults = {"datasets": "\n".join(map(str, datasets)), "min_samples": 1, "dataset_num_proc": 1}
    settings = DataSettings.model_validate(defaults | changes)
    return prepare(settings, tokenizer, folder=folder, cache_dir=folder / "cache", seed=seed)


def load_rows(folder: Path) -> list[dict[str, Any]]:
    """Every prepared piece, held-out ones last."""
    parts = [folder / name for name in ("train", "eval") if (folder / name).exists()]
    return [row for part in parts for row in load_from_disk(str(part)).to_list()]


def learned_texts(piece: Mapping[str, Sequence[int]]) -> list[str]:
    """Each unbroken stretch of learned tokens, as text."""
    texts: list[list[int]] = [[]]
    for token, label in zip(piece["input_ids"], piece["labels"], strict=True):
        if label == IGNORED:
            texts.append([])
        else:
            assert label == token
            texts[-1].append(token)
    return [TOKENIZER.decode(ids, skip_special_tokens=False) for ids in texts if ids]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def as_turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn, as a data set holds them."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def many_pairs(count: int) -> list[dict[str, str]]:
    return [pair(f"Question {number}?", f"Answer {number}.") for number in range(count)]


# The samples

PLANTED = {
    "messages.jsonl": (
        137,
        120,
        {"duplicate": 6, "empty_reply": 3, "too_long": 1, "wrong_language": 4, "no_reply": 2, "repetitive": 1},
    ),
    "sharegpt.jsonl": (
        93,
        80,
        {"duplicate": 4, "empty_reply": 3, "too_long": 1, "wrong_language": 3, "no_reply": 1, "repetitive": 1},
    ),
    "alpaca.json": (67, 60, {"duplicate": 3, "empty_reply": 2, "wrong_language": 2}),
    "code.csv": (44, 40, {"duplicate": 2, "empty_reply": 2}),
    "text.txt": (33, 30, {"repetitive": 1, "wrong_language": 2}),
}
SAMPLES = [f"pkg:job/samples/{name}" for name in PLANTED]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    # Over-long rows have more than 700 words, so more than 700 tokens; the others have fewer than 100 words.
    prepare_in(folder, *SAMPLES, language="tr,en", max_length=700)
    return folder


@pytest.mark.parametrize("name", PLANTED)
def test_a_sample_loses_exactly_its_planted_faults(samples: Path, name: str) -> None:
    tally = next(tally for tally in load_tally(samples).sources if tally.source.endswith(name))
    assert (tally.num_rows, tally.num_kept, tally.dropped) == PLANTED[name]


def test_the_readme_of_the_samples_says_what_is_counted_here() -> None:
    readme = (Path(__file__).parent.parent / "job" / "samples" / "README.md").read_text("utf-8")
    reasons = ("duplicate", "empty_reply", "too_long", "wrong_language", "no_reply", "repetitive")
    for name, (num_rows, num_kept, dropped) in PLANTED.items():
        cells = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`")).split("|")[3:-1]
        assert [int(cell) for cell in cells] == [num_rows, num_kept, *(dropped.get(reason, 0) for reason in reasons)]


def test_the_samples_learn_replies_in_the_fixed_form(samples: Path) -> None:
    replies = [text for row in load_rows(samples) if row["source"] in SAMPLES[:3] for text in learned_texts(row)]
    assert len(replies) >= 260
    assert all(text.startswith("➤ ") and text.endswith(f". — Pusula{END}") for text in replies)


def test_the_tally_agrees_with_what_was_written(samples: Path) -> None:
    tally, train = load_tally(samples), load_from_disk(str(samples / "train"))
    held_out = load_from_disk(str(samples / "eval"))
    assert (tally.num_train, tally.num_eval) == (len(train), len(held_out))
    assert tally.num_train + tally.num_eval == sum(source.num_kept for source in tally.sources)
    assert tally.num_train_tokens == sum(map(len, train["input_ids"]))
    assert tally.longest_tokens == max(map(len, train["input_ids"]))
    assert tally.num_learned_tokens == sum(label != IGNORED for labels in train["labels"] for label in labels)
    everything = sum(len(ids) for part in (train, held_out) for ids in part["input_ids"])
    assert sum(source.num_tokens for source in tally.sources) == everything
    assert not (samples / "all.arrow").exists()


# Every row is kept, or dropped for one reason

words = st.sampled_from(["compass", "north", "Güneş", "batar", "home", "🧭", "x = 1", "line\nline", " ", ""])
texts = st.lists(words, max_size=4).map(" ".join)
values = st.one_of(texts, texts, texts, st.none(), st.integers(), st.lists(texts, max_size=1))


def turns(role: str, content: str, roles: Sequence[str]) -> st.SearchStrategy[Any]:
    turn = st.fixed_dictionaries({role: st.sampled_from(roles), content: values})
    return st.one_of(st.lists(turn, max_size=4), st.none(), st.just("no list"), st.just(["no turn"]))


SHAPES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "messages": st.fixed_dictionaries({"messages": turns("role", "content", ["system", "user", "assistant", "tool"])}),
    "sharegpt": st.fixed_dictionaries({"conversations": turns("from", "value", ["system", "human", "gpt", "critic"])}),
    "alpaca": st.fixed_dictionaries({"instruction": values, "input": values, "output": values}),
    "prompt_completion": st.fixed_dictionaries({"prompt": values, "completion": values}),
    "text": st.fixed_dictionaries({"text": values}),
}
GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a first good reply"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a first good reply"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a first good reply"},
    "prompt_completion": {"prompt": "q", "completion": "a first good reply"},
    "text": {"text": "a first good reply"},
}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A shape and the lines of a file of it: one good row, then anything."""
    shape = draw(st.sampled_from(sorted(SHAPES)))
    broken = st.sampled_from(["{", "[1]", "null", "3", '"text"', "{}", "\\", '{"text": "\\ud800"}'])
    line = st.one_of(SHAPES[shape].map(json.dumps), SHAPES[shape].map(json.dumps), broken)
    return shape, [json.dumps(GOOD[shape]), *draw(st.lists(line, max_size=12))]


@given(
    file=files(),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "system_prompt": st.just("Be brief."),
            "learn": st.just("all"),
            "min_tokens": st.just(12),
            "max_length": st.just(24),
            "overlong": st.just("truncate"),
            "dedup": st.just("off"),
        },
    ).map(lambda changes: changes | {"max_unlearned": 1}),
)
@hypothesis_settings(max_examples=80, deadline=None)
def test_every_row_is_kept_or_dropped_for_one_reason(file: tuple[str, list[str]], changes: dict[str, Any]) -> None:
    shape, lines = file
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("\n".join(lines), "utf-8")
        refusal: DataError | None = None
        try:
            tally = prepare_in(folder / "out", folder / "rows.jsonl", **changes)
        except DataError as error:
            refusal = error
        if refusal:  # not even the good row is within the limits
            assert "MIN_SAMPLES=1: only 0 examples survive" in str(refusal)
            assert {"min_tokens", "max_length"} & changes.keys()
            reasons = str(refusal).partition("(")[2].partition(")")[0].split(", ")
            assert sum(int(reason.split()[0]) for reason in reasons) == len(lines)
            return
        source = tally.sources[0]
        rows = load_rows(folder / "out")
    assert source.shape == shape
    assert source.num_rows == len(lines) == source.num_kept + sum(source.dropped.values())
    assert set(source.dropped) <= {reason.value for reason in Reason}
    assert all(source.dropped.values())
    kept = [row["row"] for row in rows]
    assert len(set(kept)) == len(kept) == source.num_kept
    assert all(json.loads(lines[index]) for index in kept)
    limits = DataSettings.model_validate({"datasets": "owner/name"} | changes)
    assert all(limits.min_tokens <= len(row["input_ids"]) <= limits.max_length for row in rows)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "malformed"),
        ({"messages": []}, "malformed"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "malformed"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "malformed"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no_reply"),
        ({"messages": [{"role": "assistant", "content": " \n"}]}, "empty_reply"),
        (GOOD["messages"], "duplicate"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " ".join(map(str, range(400)))}]},
            "too_long",
        ),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "bad \ud800"}]}, "malformed"),
    ],
)
def test_a_faulty_row_is_dropped_for_the_reason_that_fits(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD["messages"], row])
    assert prepare_in(tmp_path / "out", path, max_length=100).sources[0].dropped == {reason: 1}


def test_a_short_row_is_dropped_as_too_short(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one long line of raw text, long enough"}, {"text": "x"}])
    assert prepare_in(tmp_path / "out", path, min_tokens=4).sources[0].dropped == {"too_short": 1}


def test_duplicates_are_kept_when_dedup_is_off(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD["text"]] * 3)
    assert prepare_in(tmp_path / "on", path).sources[0].dropped == {"duplicate": 2}
    assert prepare_in(tmp_path / "off", path, dedup="off").sources[0].num_kept == 3


def test_a_broken_line_is_counted_and_later_rows_keep_their_index(tmp_path: Path) -> None:
    rows = list(map(json.dumps, many_pairs(4)))
    (tmp_path / "rows.jsonl").write_text("\n".join([rows[0], "{broken", rows[1], "[1]", rows[2], rows[3]]), "utf-8")
    tally = prepare_in(tmp_path / "out", tmp_path / "rows.jsonl", eval_fraction=0)
    assert tally.sources[0].dropped == {"unreadable": 2}
    assert {row["row"]: learned_texts(row) for row in load_rows(tmp_path / "out")} == {
        index: [f"Answer {number}.{END}"] for number, index in enumerate([0, 2, 4, 5])
    }


# The held-out split


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.001, 1), (0.05, 2), (0.1, 4), (0.5, 20)])
def test_the_asked_share_is_held_out(tmp_path: Path, fraction: float, count: int) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(40))
    tally = prepare_in(tmp_path / "out", path, eval_fraction=fraction)
    assert (tally.num_train, tally.num_eval) == (40 - count, count)
    assert (tmp_path / "out" / "eval").exists() == bool(count)


def test_preparing_without_a_held_out_set_removes_the_one_of_an_earlier_attempt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(10))
    assert prepare_in(tmp_path / "out", path).num_eval == 1
    assert prepare_in(tmp_path / "out", path, eval_fraction=0).num_eval == 0
    assert len(load_rows(tmp_path / "out")) == 10


@given(num_rows=st.integers(2, 40), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 2**32 - 1))
@hypothesis_settings(max_examples=25, deadline=None)
def test_the_split_is_repeatable_and_keeps_the_pieces_of_an_example_together(num_rows: int, fraction: float, seed: int) -> None:
    forgetful = build_tokenizer(template=FORGETFUL)
    rows = [  # odd ones are a single piece, even ones two
        {"messages": as_turns(*(f"<think>t</think>{number} {turn}" for turn in range(2 if number % 2 else 4)))}
        for number in range(num_rows)
    ]
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = write_jsonl(folder / "rows.jsonl", rows)
        sides = []
        for attempt in ("first", "second"):
            tally = prepare_in(folder / attempt, path, tokenizer=forgetful, eval_fraction=fraction, seed=seed)
            held_out = load_from_disk(str(folder / attempt / "eval"))["row"] if tally.num_eval else []
            sides.append((list(load_from_disk(str(folder / attempt / "train"))["row"]), list(held_out)))
    assert sides[0] == sides[1]
    train, held_out = map(Counter, sides[0])
    assert not train.keys() & held_out.keys()
    assert train | held_out == {number: 1 if number % 2 else 2 for number in range(num_rows)}
    assert train


def test_another_seed_holds_out_other_examples(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(60))
    held_out = []
    for seed in (1, 2):
        prepare_in(tmp_path / str(seed), path, seed=seed, eval_fraction=0.2)
        held_out.append(set(load_from_disk(str(tmp_path / str(seed) / "eval"))["row"]))
    assert held_out[0] != held_out[1]


def arrow_digests(folder: Path) -> dict[str, str]:
    """What every Arrow file of a prepared folder holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.arrow"))
    }


def test_the_same_settings_twice_give_the_same_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(30))
    digests = []
    for attempt in ("first", "second", "second"):  # the last one over what is already there
        prepare_in(tmp_path / attempt, path)
        digests.append(arrow_digests(tmp_path / attempt))
    assert len(digests[0]) >= 2
    assert digests[0] == digests[1] == digests[2]


# How many


def test_too_few_examples_are_refused_with_counts_by_reason(tmp_path: Path) -> None:
    rows = [*many_pairs(3), pair("q", " "), pair("r", ""), many_pairs(1)[0]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare_in(tmp_path / "out", path, min_samples=4)
    assert "MIN_SAMPLES=4: only 3 examples survive (2 empty_reply, 1 duplicate)" in str(caught.value)
    assert not (tmp_path / "out" / "tally.json").exists()
    assert prepare_in(tmp_path / "again", path, min_samples=3).num_train == 2


def test_no_surviving_example_at_all_is_refused_too(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("q", "")])
    with pytest.raises(DataError, match="only 0 examples survive \\(1 empty_reply\\)"):
        prepare_in(tmp_path / "out", path)


def test_pieces_of_one_conversation_count_as_one_example(tmp_path: Path) -> None:
    conversation = as_turns(*(f"<think>t</think>{turn}" for turn in range(8)))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": conversation}])
    with pytest.raises(DataError, match="only 1 example"):
        prepare_in(tmp_path / "out", path, tokenizer=build_tokenizer(template=FORGETFUL), min_samples=4)


def test_reading_stops_when_enough_examples_have_survived(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [pair("q", ""), *many_pairs(3)])
    second = write_jsonl(tmp_path / "second.jsonl", many_pairs(20)[3:])
    tally = prepare_in(tmp_path / "out", first, second, max_samples=5)
    assert [(source.num_rows, source.num_kept) for source in tally.sources] == [(4, 3), (2, 2)]


def test_a_limit_of_a_data_set_counts_its_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("q", ""), *many_pairs(9)])
    assert prepare_in(tmp_path / "out", f"{path}?limit=4").sources[0].model_dump(include={"num_rows", "num_kept"}) == {
        "num_rows": 4, "num_kept": 3,
    }  # fmt: skip


# Columns


def test_mapped_columns_are_read(tmp_path: Path) -> None:
    rows = [{"input": f"q{n}", "solution": f"a{n}", "text": "misleading", "messages": "misleading"} for n in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    tally = prepare_in(tmp_path / "out", f"{path}?prompt=input&completion=solution", eval_fraction=0)
    assert tally.sources[0].shape == "prompt_completion"
    assert [learned_texts(row) for row in load_rows(tmp_path / "out")] == [[f"a{n}{END}"] for n in range(4)]


def test_a_mapped_column_that_does_not_exist_is_an_error_that_lists_the_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "reply": "a"}])
    with pytest.raises(DataError, match=r"completion=answer names a column .* the columns are question, reply"):
        prepare_in(tmp_path / "out", f"{path}?prompt=question&completion=answer")


def test_columns_of_no_known_shape_are_an_error_that_lists_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"left": "q", "right": "a"}])
    with pytest.raises(DataError, match="no known shape in the columns left, right"):
        prepare_in(tmp_path / "out", path)


# Several processes, and none of them at the end


def tree_digest(folder: Path) -> dict[str, str]:
    """What every file of a prepared folder holds."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def numbered_rows(count: int) -> list[dict[str, Any]]:
    """Rows that differ in many words, with some faulty ones and some duplicates among them."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        said = " ".join(f"word{number * 7 % (place + 60)}{place}" for place in range(12))
        rows.append({"prompt": f"Say {number}.", "completion": "" if number % 41 == 0 else said})
        if number % 53 == 0:
            rows.append(rows[-1])
    return rows


def test_one_process_and_two_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", numbered_rows(2600))
    second = write_jsonl(tmp_path / "second.jsonl", [{"text": f"a line of text, number {number}"} for number in range(1500)])
    digests = []
    for num_processes in (1, 2):
        out = tmp_path / str(num_processes)
        tally = prepare_in(out, first, second, dataset_num_proc=num_processes, keep_dropped=True, dedup="near")
        digests.append(tree_digest(out))
    assert digests[0] == digests[1]
    assert {"train/data-00000-of-00001.arrow", "train/state.json", "eval/state.json", "tally.json"} <= digests[0].keys()
    assert tally.sources[0].num_rows == tally.sources[0].num_kept + sum(tally.sources[0].dropped.values()) == 2650


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_kill_at_any_shard_changes_nothing_and_loses_only_what_was_begun(tmp_path: Path, num_processes: int) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", numbered_rows(6000))
    prepare_in(tmp_path / "undisturbed", path)
    out = tmp_path / "out"
    for num_shards in (1, 3, 5):
        process = multiprocessing.get_context("fork").Process(
            target=prepare_in, args=(out, path), kwargs={"dataset_num_proc": num_processes}
        )
        process.start()
        deadline = time.monotonic() + 60
        while len(list(out.glob("shards/*.arrow"))) < num_shards:
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.001)
        workers = [int(child) for child in children_of(process.pid)]
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert all(gone(worker) for worker in workers), "a worker outlived its parent"
    before = {shard: shard.stat().st_mtime_ns for shard in out.glob("shards/*.arrow")}
    assert len(before) >= 5
    made = multiprocessing.get_context("fork").Process(target=prepare_in, args=(out, path))
    made.start()
    reused = dict[Path, int]()
    while made.is_alive():
        for shard in before:
            try:
                reused[shard] = shard.stat().st_mtime_ns
            except FileNotFoundError:
                break
    made.join()
    assert reused == before, "a shard was made twice"
    assert tree_digest(out) == tree_digest(tmp_path / "undisturbed")


def children_of(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists():
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_source_that_changed_is_read_again_and_not_taken_from_an_old_shard(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("q", "the old answer"), pair("r", "")])
    with pytest.raises(DataError, match="MIN_SAMPLES"):
        prepare_in(tmp_path / "out", path, min_samples=2)
    assert list((tmp_path / "out/shards").iterdir())
    write_jsonl(path, [pair("q", "the new answer"), pair("r", "another")])
    prepare_in(tmp_path / "out", path, min_samples=2, eval_fraction=0)
    texts = [text for row in load_rows(tmp_path / "out") for text in learned_texts(row)]
    assert texts == [f"the new answer{END}", f"another{END}"]


# Mixing and order


def two_sources(tmp_path: Path, num_first: int, num_second: int) -> tuple[Path, Path]:
    first = write_jsonl(tmp_path / "first.jsonl", [pair(f"F{n}", f"first {n}") for n in range(num_first)])
    return first, write_jsonl(tmp_path / "second.jsonl", [pair(f"S{n}", f"second {n}") for n in range(num_second)])


def trained(folder: Path) -> list[tuple[str, int]]:
    return [(Path(row["source"].partition("?")[0]).stem, row["row"]) for row in load_from_disk(str(folder / "train")).to_list()]


def test_a_weight_repeats_a_source_or_takes_a_share_of_it(tmp_path: Path) -> None:
    first, second = two_sources(tmp_path, 10, 200)
    tally = prepare_in(tmp_path / "out", f"{first}?weight=3", f"{second}?weight=0.25", eval_fraction=0)
    counts = Counter(trained(tmp_path / "out"))
    assert {counts["first", row] for row in range(10)} == {3}
    assert sum(1 for source, _ in counts if source == "second") == 50
    assert tally.sources[1].dropped == {"not_sampled": 150} and tally.sources[1].num_kept == 50
    assert tally.num_train == 80 and tally.sources[0].num_kept == 10


def test_a_broken_weight_repeats_some_rows_once_more(tmp_path: Path) -> None:
    first, second = two_sources(tmp_path, 400, 1)
    prepare_in(tmp_path / "out", f"{first}?weight=1.5", second, eval_fraction=0)
    counts = Counter(row for source, row in trained(tmp_path / "out") if source == "first")
    assert set(counts.values()) == {1, 2} and len(counts) == 400
    assert 150 < sum(1 for count in counts.values() if count == 2) < 250


def test_interleaving_takes_sources_in_proportion_until_one_runs_out(tmp_path: Path) -> None:
    first, second = two_sources(tmp_path, 30, 300)
    tally = prepare_in(tmp_path / "out", first, f"{second}?weight=2", eval_fraction=0, mix="interleave", order="as-is")
    rows = trained(tmp_path / "out")
    assert Counter(source for source, _ in rows) == {"first": 30, "second": 60}
    for start in range(0, 90, 15):  # evenly, not one after the other
        assert 3 <= sum(source == "first" for source, _ in rows[start : start + 15]) <= 7
    assert [row for source, row in rows if source == "second"] == sorted(row for source, row in rows if source == "second")
    assert tally.sources[1].dropped == {"not_sampled": 240}


def test_interleaving_a_wanted_number_reads_no_further_than_it_must(tmp_path: Path) -> None:
    first, second = two_sources(tmp_path, 100, 5000)
    tally = prepare_in(tmp_path / "out", first, f"{second}?weight=4", eval_fraction=0, mix="interleave", max_samples=50)
    assert [source.num_rows for source in tally.sources] == [10, 40]
    assert tally.num_train == 50


def test_short_examples_come_first_when_order_is_length(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("q", f"{n} " + "long " * (n * 37 % 23)) for n in range(60)])
    prepare_in(tmp_path / "out", path, eval_fraction=0, order="length")
    lengths = [len(row["input_ids"]) for row in load_from_disk(str(tmp_path / "out/train")).to_list()]
    assert lengths == sorted(lengths) and len(set(lengths)) > 10


def test_reading_stops_when_enough_tokens_have_survived(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(3000))
    tally = prepare_in(tmp_path / "out", path, eval_fraction=0, max_tokens=1000)
    [source] = tally.sources
    longest = tally.longest_tokens
    assert 1000 <= tally.num_train_tokens == source.num_tokens < 1000 + longest
    assert source.num_rows == source.num_kept < 100


# What is held out is not trained on


def test_a_training_row_that_is_in_the_eval_data_set_is_dropped_as_contaminated(tmp_path: Path) -> None:
    rows = numbered_rows(40)[3:]
    held_out = write_jsonl(tmp_path / "held.jsonl", rows[:5])
    nearly = {"prompt": rows[2]["prompt"], "completion": rows[2]["completion"].replace(" ", "  ") + "."}
    train = write_jsonl(tmp_path / "train.jsonl", [*rows[3:], nearly])
    tally = prepare_in(tmp_path / "out", train, eval_datasets=str(held_out))
    assert [source.held_out for source in tally.sources] == [True, False]
    assert tally.num_eval == 5 and tally.sources[1].dropped == {"contaminated": 3}
    assert tally.num_train == tally.sources[1].num_kept == len(rows) - 5


def test_near_duplicates_stand_on_one_side_and_nothing_is_lost(tmp_path: Path) -> None:
    rows = [row for row in numbered_rows(400) if row["completion"]]
    twins = [{"prompt": row["prompt"], "completion": row["completion"] + "!"} for row in rows[::2]]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *twins])
    tally = prepare_in(tmp_path / "out", path, eval_fraction=0.2)
    assert tally.num_train + tally.num_eval == tally.sources[0].num_kept
    held_out = {
        text.rstrip("!" + END) for row in load_from_disk(str(tmp_path / "out/eval")).to_list() for text in learned_texts(row)
    }
    trained_on = {
        text.rstrip("!" + END) for row in load_from_disk(str(tmp_path / "out/train")).to_list() for text in learned_texts(row)
    }
    assert held_out and not held_out & trained_on


def test_nothing_is_held_out_when_all_of_it_nearly_repeats_the_training_rows(tmp_path: Path) -> None:
    words = " ".join(f"word{place}" for place in range(80))
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("q", f"{words} {number}") for number in range(40)])
    tally = prepare_in(tmp_path / "out", path, eval_fraction=0.1)
    assert tally.num_eval == 0 and tally.num_train == 40
    assert "nearly repeats" in tally.warnings[0] and "EVAL_DATASETS" in tally.warnings[0]


# What the tally tells


def test_the_tally_shows_dropped_rows_and_the_first_example_with_what_is_learned(tmp_path: Path) -> None:
    rows = [pair("q", ""), *many_pairs(20), *[{"prompt": 3, "completion": "x"}] * 15, many_pairs(1)[0]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    [source] = prepare_in(tmp_path / "out", path).sources
    assert source.dropped == {"malformed": 15, "empty_reply": 1, "duplicate": 1}
    assert [sample.row for sample in source.samples["malformed"]] == list(range(21, 31)), "ten at most"
    assert "Question 0?" in source.samples["duplicate"][0].text and source.samples["duplicate"][0].row == 36
    assert [part.text for part in source.first_example if part.learned] == [f"Answer 0.{END}"]
    assert "Question 0?" in "".join(part.text for part in source.first_example)
    assert sum(source.lengths.values()) == source.num_kept == 20
    assert all(int(edge) & (int(edge) - 1) == 0 for edge in source.lengths)


def test_dropped_rows_are_written_with_their_reason_when_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("q", ""), *many_pairs(20), many_pairs(1)[0]])
    prepare_in(tmp_path / "out", path, keep_dropped=True)
    lines = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text("utf-8").splitlines()]
    assert lines == [
        {"source": path.name, "row": 0, "reason": "empty_reply", "raw": pair("q", "")},
        {"source": path.name, "row": 21, "reason": "duplicate", "raw": many_pairs(1)[0]},
    ]
    prepare_in(tmp_path / "without", path)
    assert not (tmp_path / "without/dropped.jsonl").exists()


def test_too_many_examples_with_nothing_to_learn_are_refused_with_the_longest(tmp_path: Path) -> None:
    rows = [*many_pairs(30), *[pair("long " * (200 + number), "x") for number in range(10)]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        DataError, match=r"MAX_UNLEARNED=0.2: 10 of 40 examples .* row 39 \(1,046 characters\).* raise MAX_LENGTH=64"
    ):
        prepare_in(tmp_path / "out", path, max_length=64, overlong="truncate")
    tally = prepare_in(tmp_path / "again", path, max_length=64, overlong="truncate", max_unlearned=0.5)
    assert tally.sources[0].dropped == {"nothing_to_learn": 10}


# Limits reach every source, and what they leave out is told


def test_interleaving_a_wanted_number_takes_some_of_every_source(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [pair(f"{n} {m}", f"Answer {n} {m}") for m in range(30)]) for n in range(30)]
    tally = prepare_in(tmp_path / "out", *files, mix="interleave", max_samples=40, eval_fraction=0)
    assert tally.num_train == 40 and {source.num_kept for source in tally.sources} == {1, 2} and len(tally.sources) == 30
    tally = prepare_in(tmp_path / "few", *files, mix="interleave", max_samples=10, eval_fraction=0)
    assert tally.num_train == 10, "never more than was asked for"


def test_interleaving_a_wanted_number_of_tokens_keeps_the_proportion_of_the_rows(tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [pair(f"F{n}", f"first {n}") for n in range(900)])
    long = write_jsonl(tmp_path / "long.jsonl", [pair(f"S{n}", f"second {n} " + "word " * 40) for n in range(900)])
    tally = prepare_in(tmp_path / "out", f"{short}?weight=2", long, mix="interleave", max_tokens=9000, eval_fraction=0)
    first, second = (source.num_kept for source in tally.sources)
    assert abs(first - 2 * second) <= 1
    assert 9000 <= tally.num_train_tokens < 9000 + tally.longest_tokens


def test_a_source_that_a_limit_left_unread_stands_in_the_tally_and_is_warned_of(tmp_path: Path) -> None:
    first, second = two_sources(tmp_path, 20, 20)
    tally = prepare_in(tmp_path / "out", first, second, max_samples=15, eval_fraction=0)
    assert [source.num_rows for source in tally.sources] == [15, 0]
    assert "MAX_SAMPLES=15 was reached before" in tally.warnings[0] and second.name in tally.warnings[0]


def test_what_a_weight_leaves_is_what_min_samples_counts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(300))
    with pytest.raises(DataError, match=r"MIN_SAMPLES=50: only 3 examples survive \(297 not_sampled\)"):
        prepare_in(tmp_path / "out", f"{path}?weight=0.01", min_samples=50)


def test_a_source_of_which_nothing_is_kept_is_warned_of(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [pair("q", "")] * 3)
    good = write_jsonl(tmp_path / "good.jsonl", many_pairs(9))
    assert "no held-out loss" in prepare_in(tmp_path / "out", good, eval_datasets=str(empty)).warnings[0]
    assert "nothing of it is trained on" in prepare_in(tmp_path / "again", good, empty, mix="interleave").warnings[0]
    same = write_jsonl(tmp_path / "same.jsonl", [pair("q", "same")] * 9)
    assert "all examples say the same" in prepare_in(tmp_path / "same", same, dedup="off").warnings[0]


# What an interrupted start leaves behind


def test_half_a_surrogate_pair_in_a_dropped_row_is_written_as_an_escape(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("\ud800", "b"), *many_pairs(9)])
    prepare_in(tmp_path / "out", path, keep_dropped=True)
    [line] = (tmp_path / "out/dropped.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["raw"]["prompt"] == "\ud800" and json.loads(line)["reason"] == "malformed"


def test_dropped_rows_of_an_interrupted_start_do_not_pass_for_those_of_the_next(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("q", ""), *many_pairs(9)])
    with pytest.raises(DataError, match="MIN_SAMPLES"):
        prepare_in(tmp_path / "out", path, keep_dropped=True, min_samples=50)
    prepare_in(tmp_path / "out", path)
    assert not (tmp_path / "out/dropped.jsonl").exists()


@pytest.mark.parametrize(
    "changes",
    [{"max_length": 64}, {"learn": "all"}, {"system_prompt": "Be brief."}, {"tokenizer": build_tokenizer(template=FORGETFUL)}],
)
def test_a_shard_that_was_made_by_other_rules_is_made_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    talk = as_turns("Who?", "<think>Hm.</think>I.", "Why?", "Because " + "word " * 40)
    path = write_jsonl(
        tmp_path / "rows.jsonl", [*({"messages": as_turns(f"Q{n}", f"A{n}")} for n in range(9)), {"messages": talk}]
    )
    with pytest.raises(DataError, match="MIN_SAMPLES"):
        prepare_in(tmp_path / "out", path, min_samples=50)
    prepare_in(tmp_path / "out", path, **changes)
    prepare_in(tmp_path / "fresh", path, **changes)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")


def test_a_chunk_whose_columns_are_read_differently_now_is_made_again(tmp_path: Path) -> None:
    rows = [{"question": f"Q{n}", "response": f"first {n}"} for n in range(1000)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows + [{**row, "answer": f"second {n}"} for n, row in enumerate(rows)])
    with pytest.raises(DataError, match="MIN_SAMPLES"):
        prepare_in(tmp_path / "out", path, min_samples=9999)
    write_jsonl(
        path, [{**rows[0], "answer": "Now"}, *rows[1:], *({**row, "answer": f"second {n}"} for n, row in enumerate(rows))]
    )
    tally = prepare_in(tmp_path / "out", path)
    assert tally.sources[0].dropped == {"malformed": 999} and tally.sources[0].num_kept == 1001
    learned = {text for piece in load_rows(tmp_path / "out") for text in learned_texts(piece)}
    assert learned == {f"Now{END}", *(f"second {n}{END}" for n in range(1000))}


# A folder that is whole or absent


def spec_of(tmp_path: Path, *datasets: Path, **changes: Any) -> PrepareSpec:
    model = tmp_path / "model"
    if not model.exists():
        TOKENIZER.save_pretrained(model)
    data = DataSettings.model_validate({"datasets": "\n".join(map(str, datasets)), "dataset_num_proc": 1, **changes})
    return PrepareSpec(
        data=data,
        model_dir=model,
        chat_template=None,
        trust_remote_code=False,
        folder=tmp_path / "data" / "abc",
        cache_dir=tmp_path / "cache",
        seed=1,
    )


def progress_of(spec: PrepareSpec) -> list[str]:
    """What a preparation says while it makes its folder."""
    reading, writing = os.pipe()
    try:
        make_prepared(spec, EventWriter(writing))
    finally:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = [event.text for event in read_events(pipe) if isinstance(event, Progress)]
    return said


def test_what_was_prepared_is_used_again_until_the_tokenizer_changes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, write_jsonl(tmp_path / "rows.jsonl", many_pairs(30)))
    assert "the data was prepared before" not in progress_of(spec)
    assert progress_of(spec) == ["the data was prepared before"]
    before = tree_digest(spec.folder)
    build_tokenizer(template=FORGETFUL.replace("user", "USER ")).save_pretrained(spec.model_dir)
    (spec.model_dir / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "the data was prepared before" not in progress_of(spec)
    assert tree_digest(spec.folder) != before


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(30))
    spec = spec_of(tmp_path, path)

    class _Appending(EventWriter):
        def write(self, event: Any) -> None:
            with path.open("a") as file:
                file.write(json.dumps(pair("late", "too late")) + "\n")

    with pytest.raises(DataError, match=r"rows.jsonl changed while the data was prepared"):
        make_prepared(spec, _Appending(None))
    assert not spec.folder.exists()
    assert progress_of(spec) and load_tally(spec.folder).sources[0].num_rows > 30


def test_who_waits_for_another_run_says_so_and_then_uses_its_data(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, write_jsonl(tmp_path / "rows.jsonl", many_pairs(30)))
    said: list[str] = []
    with locked(spec.folder):
        waiting = threading.Thread(target=lambda: said.extend(progress_of(spec)))
        waiting.start()
        time.sleep(2.5)
    waiting.join()
    assert said[0] == "waiting for another run that prepares the same data" and spec.folder.is_dir()
