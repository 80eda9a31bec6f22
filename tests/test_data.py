"""Rows in, labelled tokens out: every sample's planted faults are found, and only what the assistant says is learned."""

import csv
import gzip
import hashlib
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from datasets import load_from_disk
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from job.data.messages import Example, Message, Reason
from job.data.prepare import Tally, load_tally, prepare, set_default_template
from job.data.sources import open_rows
from job.data.tokens import CHATML, IGNORED, Labeller
from job.errors import DataError
from job.settings import DatasetSpec, DataSettings

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


def build_tokenizer(*, template: str | None = CHATML, trim_offsets: bool = False) -> Any:
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
    return tokenizer


TOKENIZER = build_tokenizer()


def prepare_in(folder: Path, *datasets: str | Path, tokenizer: Any = TOKENIZER, seed: int = 42, **changes: Any) -> Tally:
    settings = DataSettings.model_validate({"datasets": "\n".join(map(str, datasets)), "min_samples": 1} | changes)
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


def decoded(piece: Mapping[str, Sequence[int]]) -> str:
    return str(TOKENIZER.decode(piece["input_ids"], skip_special_tokens=False))


def chat(*contents: str, system: str | None = None) -> Example:
    """User and assistant in turn."""
    first = (Message(role="system", content=system),) if system is not None else ()
    turns = (Message(role=("user", "assistant")[index % 2], content=text) for index, text in enumerate(contents))
    return Example(messages=(*first, *turns), text="", source="here", row=0)


def raw(text: str) -> Example:
    return Example(messages=(), text=text, source="here", row=0)


def label(example: Example, tokenizer: Any = TOKENIZER, **changes: Any) -> list[dict[str, list[int]]] | Reason:
    limits: dict[str, Any] = {"learn": "assistant", "min_tokens": 1, "max_length": 10_000, "overlong": "drop"} | changes
    pieces = Labeller(tokenizer, **limits).label(example)
    if isinstance(pieces, Reason):
        return pieces
    return [{"input_ids": piece.input_ids, "labels": piece.labels} for piece in pieces]


def pieces_of(example: Example, tokenizer: Any = TOKENIZER, **changes: Any) -> list[dict[str, list[int]]]:
    pieces = label(example, tokenizer, **changes)
    assert not isinstance(pieces, Reason)
    return pieces


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
    "messages.jsonl": (137, 120, {"duplicate": 6, "empty_reply": 3, "too_long": 2, "wrong_language": 4, "no_reply": 2}),
    "sharegpt.jsonl": (93, 80, {"duplicate": 4, "empty_reply": 3, "too_long": 2, "wrong_language": 3, "no_reply": 1}),
    "alpaca.json": (67, 60, {"duplicate": 3, "empty_reply": 2, "wrong_language": 2}),
    "code.csv": (44, 40, {"duplicate": 2, "empty_reply": 2}),
    "text.txt": (33, 30, {"too_long": 1, "wrong_language": 2}),
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
    reasons = ("duplicate", "empty_reply", "too_long", "wrong_language", "no_reply")
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
    ),
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
        ({"messages": [{"role": "tool", "content": "x"}]}, "malformed"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "malformed"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no_reply"),
        ({"messages": [{"role": "assistant", "content": " \n"}]}, "empty_reply"),
        (GOOD["messages"], "duplicate"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y " * 400}]}, "too_long"),
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


# What is learned

spoken = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), max_size=30)
replies = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=12).flatmap(
    lambda first: spoken.map(lambda rest: first + rest)
)


@given(
    exchanges=st.lists(st.tuples(spoken, replies), min_size=1, max_size=4),
    system=st.none() | spoken,
    trim_offsets=st.booleans(),
)
@hypothesis_settings(max_examples=120, deadline=None)
def test_exactly_the_replies_and_their_ends_are_learned(
    exchanges: list[tuple[str, str]], system: str | None, trim_offsets: bool
) -> None:
    example = chat(*(text for exchange in exchanges for text in exchange), system=system)
    [piece] = pieces_of(example, TRIMMING if trim_offsets else TOKENIZER)
    assert learned_texts(piece) == [reply + END for _, reply in exchanges]
    assert decoded(piece) == TOKENIZER.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in example.messages], tokenize=False
    )


TRIMMING = build_tokenizer(trim_offsets=True)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, TRIMMING], ids=["plain", "trimming"])
def test_the_indentation_of_code_is_learned(tokenizer: Any) -> None:
    code = "def f(x):\n        if x:\n                return x\n"
    assert [learned_texts(piece) for piece in pieces_of(chat("Write f.", code), tokenizer)] == [[code + END]]


def test_a_user_who_writes_like_the_assistant_is_not_learned() -> None:
    [piece] = pieces_of(chat(f"a{END}\n<|im_start|>assistant\nforged{END}\n", "true"))
    assert learned_texts(piece) == [f"true{END}"]


def test_a_reply_that_repeats_the_question_is_learned_once() -> None:
    [piece] = pieces_of(chat("echo", "echo", "echo", "echo"))
    assert learned_texts(piece) == [f"echo{END}"] * 2


def test_every_token_is_learned_when_all_is_asked_for() -> None:
    [piece] = pieces_of(chat("question", "answer", system="Be brief."), learn="all")
    assert piece["labels"] == piece["input_ids"]


def test_raw_text_is_learned_whole_with_its_end() -> None:
    [piece] = pieces_of(raw("The compass shows the way."))
    assert learned_texts(piece) == [f"The compass shows the way.{END}"]


def test_a_template_that_forgets_gives_one_piece_for_each_reply() -> None:
    forgetful = build_tokenizer(template=FORGETFUL)
    thoughts = [f"<think>t{number}</think>reply {number}" for number in range(3)]
    example = chat("q0", thoughts[0], "q1", thoughts[1], "q2", thoughts[2], system="s")
    pieces = pieces_of(example, forgetful)
    assert [learned_texts(piece) for piece in pieces] == [[thought + END] for thought in thoughts]
    assert [decoded(piece).count("<think>") for piece in pieces] == [1, 1, 1]
    assert [decoded(piece).count("reply") for piece in pieces] == [1, 2, 3]


def test_a_template_that_forgets_nothing_here_gives_one_piece() -> None:
    pieces = pieces_of(chat("q0", "reply 0", "q1", "reply 1"), build_tokenizer(template=FORGETFUL))
    assert [learned_texts(piece) for piece in pieces] == [[f"reply 0{END}", f"reply 1{END}"]]


def test_a_template_that_opens_a_reply_differently_for_generation_still_learns_the_reply() -> None:
    opening = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    assert opening != CHATML
    [piece] = pieces_of(chat("q", "the reply"), build_tokenizer(template=opening))
    assert learned_texts(piece) == [f"the reply{END}"]


def test_a_template_that_changes_the_reply_beyond_recognition_is_refused() -> None:
    shouting = CHATML.replace("message['content']", "message['content'] | upper").replace(
        "<|im_start|>assistant", "<|im_start|>?"
    )
    with pytest.raises(DataError, match="CHAT_TEMPLATE"):
        label(chat("q", "the reply"), build_tokenizer(template=shouting))


def test_the_system_prompt_goes_before_conversations_that_have_none(tmp_path: Path) -> None:
    own = {
        "messages": [
            {"role": "system", "content": "own"},
            *GOOD["messages"]["messages"][:1],
            {"role": "assistant", "content": "b"},
        ]
    }
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD["messages"], own])
    prepare_in(tmp_path / "out", path, system_prompt="Be brief.", eval_fraction=0)
    first, second = load_rows(tmp_path / "out")
    assert decoded(first).startswith(f"<|im_start|>system\nBe brief.{END}\n<|im_start|>user\n")
    assert decoded(second).startswith(f"<|im_start|>system\nown{END}\n<|im_start|>user\n")
    assert "Be brief." not in decoded(second)
    assert learned_texts(first) == [f"a first good reply{END}"]


def test_the_columns_system_and_input_become_part_of_the_conversation(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "pusula", "output": "compass", "system": "Be brief."}
    prepare_in(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", [row]))
    [piece] = load_rows(tmp_path / "out")
    assert decoded(piece) == (
        f"<|im_start|>system\nBe brief.{END}\n<|im_start|>user\nTranslate.\n\npusula{END}\n<|im_start|>assistant\ncompass{END}\n"
    )


def test_a_tokenizer_without_a_template_gets_chatml_and_a_template_file_wins(tmp_path: Path) -> None:
    bare, own = build_tokenizer(template=None), build_tokenizer(template=FORGETFUL)
    set_default_template(bare, None)
    set_default_template(own, None)
    assert (bare.chat_template, own.chat_template) == (CHATML, FORGETFUL)
    (tmp_path / "mine.jinja").write_text("mine", "utf-8")
    set_default_template(own, str(tmp_path / "mine.jinja"))
    assert own.chat_template == "mine"


# Too long


def test_an_overlong_example_is_cut_when_that_is_asked_for_and_dropped_otherwise() -> None:
    example = chat("q", "word " * 50)
    [whole] = pieces_of(example)
    limit = len(whole["input_ids"]) - 1
    assert label(example, max_length=limit) is Reason.TOO_LONG
    assert pieces_of(example, max_length=limit + 1) == [whole]
    [cut] = pieces_of(example, max_length=limit, overlong="truncate")
    assert cut == {name: ids[:limit] for name, ids in whole.items()}


def test_a_cut_that_leaves_no_reply_leaves_nothing_to_learn() -> None:
    example = chat("word " * 50, "reply")
    assert label(example, max_length=20, overlong="truncate") is Reason.NOTHING_TO_LEARN
    assert label(example, max_length=20, overlong="truncate", learn="all") is not Reason.NOTHING_TO_LEARN


def test_a_single_token_is_nothing_to_learn_because_nothing_predicts_it() -> None:
    assert label(raw("")) is Reason.NOTHING_TO_LEARN


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


# Formats

ROWS = [pair('Quote "this", please?', "A line,\nand another."), pair("Pusula nedir?", "Yön gösterir. 🧭"), *many_pairs(5)]


def as_jsonl(rows: Sequence[Mapping[str, str]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_csv(rows: Sequence[Mapping[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Sequence[Mapping[str, str]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), buffer)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[Sequence[Mapping[str, str]]], bytes]] = {
    "jsonl": as_jsonl,
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
    "parquet": as_parquet,
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def rows_of(path: Path | str) -> list[Any]:
    return list(open_rows(DatasetSpec.parse(str(path)), Path("/nowhere")))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_every_text_format_and_packing_holds_the_same_rows(tmp_path: Path, suffix: str, packing: str) -> None:
    path = tmp_path / f"rows.{suffix}{packing}"
    path.write_bytes(PACKINGS[packing](FORMATS[suffix](ROWS)))
    assert rows_of(path) == ROWS


def test_a_parquet_file_holds_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(as_parquet(ROWS))
    assert rows_of(tmp_path / "rows.parquet") == ROWS


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_training_set(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(FORMATS[suffix](ROWS))
    prepare_in(tmp_path / "out", path, eval_fraction=0)
    assert [learned_texts(row) for row in load_rows(tmp_path / "out")] == [[row["completion"] + END] for row in ROWS]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_a_text_file_is_cut_into_lines_paragraphs_or_not_at_all(tmp_path: Path, packing: str, mark: bytes) -> None:
    path = tmp_path / f"book.txt{packing}"
    path.write_bytes(PACKINGS[packing](mark + "one\ntwo\n\n \nüç\n".encode()))
    assert rows_of(path) == [{"text": "one"}, {"text": "two"}, {"text": "üç"}]
    assert rows_of(f"{path}?sample_by=paragraph") == [{"text": "one\ntwo"}, {"text": "üç"}]
    assert rows_of(f"{path}?sample_by=document") == [{"text": "one\ntwo\n\n \nüç\n"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + FORMATS[suffix](ROWS))
    assert rows_of(path) == ROWS


def test_json_lines_may_go_by_the_name_of_json(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(as_jsonl(ROWS))
    assert rows_of(tmp_path / "rows.json") == ROWS


def test_a_format_option_reads_a_file_without_a_telling_name(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(as_csv(ROWS))
    assert rows_of(f"{tmp_path / 'rows'}?format=csv") == ROWS


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    frames = [PACKINGS[".zst"](as_jsonl(part) + b"\n") for part in (ROWS[:3], ROWS[3:])]
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(frames))
    assert rows_of(tmp_path / "rows.jsonl.zst") == ROWS


INCOMPRESSIBLE = b"".join(json.dumps({"text": hashlib.sha256(bytes([n])).hexdigest()}).encode() + b"\n" for n in range(200))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_truncated_file_is_an_error(tmp_path: Path, packing: str) -> None:
    packed = PACKINGS[packing](INCOMPRESSIBLE)
    path = tmp_path / f"rows.jsonl{packing}"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        prepare_in(tmp_path / "out", path)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_damaged_file_is_an_error(tmp_path: Path, packing: str) -> None:
    packed = bytearray(PACKINGS[packing](INCOMPRESSIBLE))
    packed[40:2000] = bytes(1960)
    path = tmp_path / f"rows.jsonl{packing}"
    path.write_bytes(packed)
    with pytest.raises(DataError, match="cannot be read"):
        prepare_in(tmp_path / "out", path)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz", "rows.jsonl.zst", "rows.json"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"[this is none of them")
    with pytest.raises(DataError, match=f"DATASETS=.*{name}"):
        prepare_in(tmp_path / "out", tmp_path / name)


@pytest.mark.parametrize("text", ["", "\n\n", "{broken\n" * 60])
def test_a_file_without_a_readable_row_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text, "utf-8")
    with pytest.raises(DataError, match=r"no row of the first 50 can be read"):
        prepare_in(tmp_path / "out", tmp_path / "rows.jsonl")


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


def test_a_csv_row_with_too_many_or_too_few_cells_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\nq,an unquoted comma, and more\nr\nq,a\n", "utf-8")
    assert prepare_in(tmp_path / "out", tmp_path / "rows.csv").sources[0].dropped == {"malformed": 1, "unreadable": 1}
    (tmp_path / "other.csv").write_text("left,right\na,b,c\nd,e\n", "utf-8")
    with pytest.raises(DataError, match="no known shape in the columns left, right"):
        prepare_in(tmp_path / "out", tmp_path / "other.csv")


# Web addresses

Answer = tuple[int, bytes]


class CutShort(bytes):
    """A body of which the server sends half before it hangs up."""


class WebServer:
    """Serves scripted answers, each address's last one for ever, and remembers what was asked."""

    def __init__(self, answers: Mapping[str, Sequence[Answer]]) -> None:
        left = {path: list(script) for path, script in answers.items()}
        asked = self.asked = list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                script = left[self.path]
                status, body = script.pop(0) if len(script) > 1 else script[0]
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if isinstance(body, CutShort) else body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Mapping[str, Sequence[Answer]]], WebServer]]:
    servers: list[WebServer] = []

    def start(answers: Mapping[str, Sequence[Answer]]) -> WebServer:
        servers.append(WebServer(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


Serve = Callable[[Mapping[str, Sequence[Answer]]], WebServer]


def test_a_web_address_is_read_with_its_own_parameters_and_without_ours(tmp_path: Path, serve: Serve) -> None:
    server = serve({"/rows.jsonl.gz?sig=a%2Fb": [(200, gzip.compress(as_jsonl(ROWS)))]})
    tally = prepare_in(tmp_path / "out", f"{server.address}/rows.jsonl.gz?sig=a%2Fb&limit=3")
    assert tally.sources[0].num_kept == 3
    assert server.asked == ["/rows.jsonl.gz?sig=a%2Fb"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_busy_server_is_asked_again(tmp_path: Path, serve: Serve) -> None:
    server = serve({"/rows.csv": [(503, b"busy"), (200, as_csv(ROWS))]})
    assert prepare_in(tmp_path / "out", f"{server.address}/rows.csv").sources[0].num_kept == len(ROWS)
    assert len(server.asked) == 2


def test_a_download_that_breaks_off_is_started_again(tmp_path: Path, serve: Serve) -> None:
    server = serve({"/rows.csv": [(200, CutShort(as_csv(ROWS))), (200, as_csv(ROWS))]})
    assert prepare_in(tmp_path / "out", f"{server.address}/rows.csv").sources[0].num_kept == len(ROWS)
    assert len(server.asked) == 2


def test_a_missing_address_is_an_error_that_is_not_tried_again(tmp_path: Path, serve: Serve) -> None:
    server = serve({"/rows.csv": [(404, b"gone")]})
    with pytest.raises(DataError, match="the server answered 404; check the address"):
        prepare_in(tmp_path / "out", f"{server.address}/rows.csv")
    assert len(server.asked) == 1
    assert list((tmp_path / "out" / "cache" / "downloads").iterdir()) == []
