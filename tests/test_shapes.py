"""Every shape that data sets come in is found from its columns, and its rows become the same conversation."""

import json
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from job.data.messages import Example, Message, read_row
from job.data.reasons import Reason
from job.data.shapes import Layout, Shape, detect_layout
from job.errors import DataError
from job.settings import DatasetSpec

EXCHANGE = (("user", "What is north?"), ("assistant", "Up."))
TURNS = [{"role": role, "content": content} for role, content in EXCHANGE]
SHAREGPT = [{"from": "human", "value": "What is north?"}, {"from": "gpt", "value": "Up."}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"where": "up"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def spec(**columns: str) -> DatasetSpec:
    return DatasetSpec(where="owner/name", columns=columns)


def read(row: Mapping[str, Any], *, system_prompt: str | None = None, replace: bool = False, **columns: str) -> Example | Reason:
    layout = detect_layout(spec(**columns), list(row), [row])
    return read_row(row, layout, source="here", index=7, system_prompt=system_prompt, replace_system=replace)


def said(example: Example | Reason) -> list[tuple[str, str]]:
    assert isinstance(example, Example), example
    return [(message.role, message.content) for message in example.messages]


# One conversation in every shape

ALIKE: list[tuple[Shape, dict[str, Any]]] = [
    (Shape.MESSAGES, {"messages": TURNS}),
    (Shape.MESSAGES, {"messages": json.dumps(TURNS)}),
    (Shape.MESSAGES, {"messages": str(TURNS)}),
    (Shape.MESSAGES, {"messages": TURNS, "prompt": "misleading", "completion": "misleading", "text": "misleading"}),
    (Shape.MESSAGES, {"conversation": TURNS}),
    (Shape.MESSAGES, {"dialog": TURNS, "id": 3}),
    (Shape.MESSAGES, {"chat": TURNS}),
    (Shape.MESSAGES, {"conversations": TURNS}),
    (Shape.MESSAGES, {"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in EXCHANGE]}),
    (Shape.MESSAGES, {"messages": [{"role": r, "content": c, "tool_calls": None, "name": None} for r, c in EXCHANGE]}),
    (Shape.SHAREGPT, {"conversations": SHAREGPT}),
    (Shape.SHAREGPT, {"conversations": json.dumps(SHAREGPT)}),
    (Shape.SHAREGPT, {"conversation": SHAREGPT}),
    (Shape.ALPACA, {"instruction": "What is north?", "input": "", "output": "Up.", "text": "misleading"}),
    (Shape.ALPACA, {"instruction": "What is north?", "input": None, "output": "Up."}),
    (Shape.ALPACA, {"instruction": "What", "input": "is north?", "output": "Up."}),
    (Shape.ALPACA, {"instruction": "What", "context": "is north?", "response": "Up.", "category": "qa"}),
    (Shape.PROMPT_COMPLETION, {"prompt": "What is north?", "completion": "Up."}),
    (Shape.PROMPT_COMPLETION, {"prompt": TURNS[:1], "completion": TURNS[1:]}),
    (Shape.PROMPT_COMPLETION, {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])}),
    (Shape.PROMPT_COMPLETION, {"prompt": TURNS[:1], "completion": "Up."}),
    (Shape.PROMPT_COMPLETION, {"prompt": "What is north?", "response": "Up."}),
    (Shape.PROMPT_COMPLETION, {"prompt": "What is north?", "canonical_solution": "Up.", "test": "", "task_id": "1"}),
    (Shape.PROMPT_COMPLETION, {"question": "What is north?", "answer": "Up."}),
    (Shape.PROMPT_COMPLETION, {"query": "What is north?", "response": "Up."}),
    (Shape.PROMPT_COMPLETION, {"input": "What is north?", "solution": "Up.", "reasoning": "Maps.", "output": "misleading"}),
]


@pytest.mark.parametrize(("shape", "row"), ALIKE, ids=[f"{shape}-{'-'.join(row)}" for shape, row in ALIKE])
def test_every_shape_gives_the_same_conversation(shape: Shape, row: dict[str, Any]) -> None:
    assert detect_layout(spec(), list(row), [row]).shape is shape
    question = "What\n\nis north?" if row.get("instruction") == "What" else "What is north?"
    assert said(read(row)) == [("user", question), ("assistant", "Up.")]


@pytest.mark.parametrize("column", ["text", "content"])
def test_raw_text_is_read(column: str) -> None:
    assert read({column: "Once.", "meta": 1}) == Example(messages=(), text="Once.", source="here", row=7)


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        (["messages"], Shape.MESSAGES),
        (["conversations"], Shape.SHAREGPT),
        (["dialogue"], Shape.MESSAGES),
        (["instruction", "output"], Shape.ALPACA),
        (["text"], Shape.TEXT),
    ],
)
def test_a_shape_is_found_without_a_row(columns: list[str], shape: Shape) -> None:
    assert detect_layout(spec(), columns).shape is shape


def test_a_column_that_is_only_named_like_turns_is_passed_over() -> None:
    row = {"chat": "general", "question": "What is north?", "answer": "Up."}
    assert detect_layout(spec(), list(row), [row]).shape is Shape.PROMPT_COMPLETION


def test_a_layout_says_which_columns_it_uses_and_can_be_sent_to_another_process() -> None:
    layout = detect_layout(spec(prompt="q", completion="a"), ["q", "a", "tools", "text"])
    assert str(layout) == "prompt_completion (completion=a, prompt=q, tools)"
    assert pickle.loads(pickle.dumps(layout)) == layout


# Mapping


def test_what_the_user_mapped_decides() -> None:
    row = {"messages": "misleading", "q": "What is north?", "a": "Up.", "text": "misleading"}
    assert said(read(row, prompt="q", completion="a")) == list(EXCHANGE)
    assert read(row, text="a") == Example(messages=(), text="Up.", source="here", row=7)
    assert said(read({"a": TURNS, "messages": None}, messages="a")) == list(EXCHANGE)


def test_a_mapped_column_may_stand_beside_found_ones() -> None:
    row = {"question": "What is north?", "answer": "Up.", "persona": "Be brief."}
    assert said(read(row, system="persona")) == [("system", "Be brief."), *EXCHANGE]


def test_a_mapped_column_that_does_not_exist_is_an_error_that_lists_the_columns() -> None:
    with pytest.raises(DataError, match=r"completion=answer names a column .* the columns are question, reply$"):
        detect_layout(spec(prompt="question", completion="answer"), ["question", "reply"])


def test_no_known_shape_is_an_error_that_lists_some_columns_and_the_settings() -> None:
    with pytest.raises(DataError, match=r"no known shape in the columns left, right; name them, for example \?messages=COLUMN"):
        detect_layout(spec(), ["left", "right"])
    with pytest.raises(DataError, match=r"c0, .*, c19 and 99,980 more; name them") as error:
        detect_layout(spec(), [f"c{number}" for number in range(100_000)])
    assert len(str(error.value)) < 500


# Sides: system, history, tools


@pytest.mark.parametrize(
    ("row", "prompt", "replace", "expected"),
    [
        ({"messages": TURNS}, None, False, []),
        ({"messages": TURNS}, "Ours.", False, ["Ours."]),
        ({"messages": TURNS, "system": "Theirs."}, None, False, ["Theirs."]),
        ({"messages": TURNS, "system": "Theirs."}, "Ours.", False, ["Theirs."]),
        ({"messages": TURNS, "system": "Theirs."}, "Ours.", True, ["Ours."]),
        ({"messages": TURNS, "system": " "}, "Ours.", False, ["Ours."]),
        ({"messages": TURNS, "system": None}, None, True, []),
        ({"messages": [{"role": "system", "content": "Own."}, *TURNS]}, "Ours.", False, ["Own."]),
        ({"messages": [{"role": "system", "content": "Own."}, *TURNS]}, "Ours.", True, ["Ours."]),
        ({"messages": [{"role": "developer", "content": "Own."}, *TURNS], "system": "Column."}, None, False, ["Own."]),
    ],
)
def test_the_system_prompt_is_added_or_replaces(row: dict[str, Any], prompt: str, replace: bool, expected: list[str]) -> None:
    assert said(read(row, system_prompt=prompt, replace=replace)) == [*(("system", text) for text in expected), *EXCHANGE]


@pytest.mark.parametrize(
    "history",
    [[["Hi", "Ho"]], '[["Hi", "Ho"]]', [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]],
)
def test_a_history_comes_before_the_pair(history: Any) -> None:
    for row in ({"instruction": "What is north?", "output": "Up."}, {"question": "What is north?", "answer": "Up."}):
        assert said(read({**row, "history": history})) == [("user", "Hi"), ("assistant", "Ho"), *EXCHANGE]
        nothing: list[Any] = [[], None, ""]
        without = [{**row, "history": value} for value in nothing]
        assert [said(read(plain)) for plain in without] == [list(EXCHANGE)] * 3
        assert read({**row, "history": [["Hi"]]}) is Reason.MALFORMED
        assert read({**row, "history": "Hi"}) is Reason.MALFORMED


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], TOOL, [json.dumps(TOOL)]])
@pytest.mark.parametrize(
    "calling",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "look", "arguments": '{"where": "up"}'}}]},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"where": "up", "how": null}}'},
    ],
)
def test_tool_calls_and_their_answers_are_read(calling: dict[str, Any], tools: Any) -> None:
    answer = {"role": "tool", "content": "blue", "tool_call_id": "c1", "name": "look"}
    example = read({"messages": [TURNS[0], calling, answer, TURNS[1]], "tools": tools})
    assert said(example) == [EXCHANGE[0], ("assistant", ""), ("tool", "blue"), EXCHANGE[1]]
    assert isinstance(example, Example) and json.loads(example.tools or "") == [TOOL]
    _, call, result, reply = example.messages
    [made] = json.loads(call.extra or "")["tool_calls"]
    assert made["function"] == CALL["function"]
    assert json.loads(result.extra or "") == {"name": "look", "tool_call_id": "c1"}
    assert call.calls_tools and not result.calls_tools and reply.extra is None
    assert pickle.loads(pickle.dumps(example)) == example and hash(example) == hash(pickle.loads(pickle.dumps(example)))


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_are_no_tools(tools: Any) -> None:
    example = read({"messages": TURNS, "tools": tools})
    assert isinstance(example, Example) and example.tools is None


def test_reasoning_beside_a_reply_is_kept() -> None:
    example = read({"messages": [TURNS[0], {**TURNS[1], "thinking": "Maps."}]})
    assert isinstance(example, Example)
    assert json.loads(example.messages[-1].extra or "") == {"reasoning_content": "Maps."}


def test_all_common_names_of_speakers_are_known() -> None:
    names = ["System", "human", "gpt", " user", "ASSISTANT", "prompter", "bing", "function_call", "observation", "model"]
    example = read({"conversations": [{"from": name, "value": "x"} for name in names]})
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant", "assistant", "tool", "assistant"]
    assert [role for role, _ in said(example)] == roles


# Rubbish

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None},
        {"messages": []},
        {"messages": 3},
        {"messages": "no list"},
        {"messages": "[{'role': broken"},
        {"messages": DEEP},
        {"messages": ["no turn"]},
        {"messages": [{"role": "critic", "content": "x"}]},
        {"messages": [{"role": 3, "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "assistant", "content": {"a": 1}}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": "broken"}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": None}}]}]},
        {"messages": TURNS, "tools": "broken"},
        {"messages": TURNS, "tools": [3]},
        {"messages": TURNS, "system": 3},
        {"messages": [{"role": "user", "content": "bad \ud800"}]},
        {"prompt": None, "completion": "x"},
        {"prompt": 1, "completion": "x"},
        {"prompt": {"bytes": b"\x89PNG"}, "completion": "x"},
        {"instruction": "x", "output": None},
        {"instruction": "x", "input": 3, "output": "x"},
        {"text": None},
        {"text": b"bytes"},
        {"text": "bad \ud800"},
    ],
)
def test_rubbish_is_malformed(row: dict[str, Any]) -> None:
    assert read(row) is Reason.MALFORMED


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), inner),
    max_leaves=8,
)


@given(row=st.dictionaries(st.sampled_from(["messages", "conversations", "prompt", "completion", "tools", "history"]), anything))
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_row_becomes_an_example_or_a_reason(row: dict[str, Any]) -> None:
    layouts: Sequence[Layout] = [
        Layout(Shape.MESSAGES, {"messages": "messages", "tools": "tools"}),
        Layout(Shape.SHAREGPT, {"conversations": "conversations"}),
        Layout(Shape.PROMPT_COMPLETION, {"prompt": "prompt", "completion": "completion", "history": "history"}),
    ]
    for layout in layouts:
        example = read_row(row, layout, source="here", index=0, system_prompt="s", replace_system=True)
        assert example is Reason.MALFORMED or (isinstance(example, Example) and hash(example) is not None)


def test_texts_that_only_look_like_lists_of_turns_stay_texts() -> None:
    row = {"prompt": '[{"a": 1}]', "completion": "[{'b': 2}]"}
    assert said(read(row)) == [("user", row["prompt"]), ("assistant", row["completion"])]


def test_a_message_is_told_apart_by_what_it_carries() -> None:
    assert Message(role="assistant", content="") != Message(role="assistant", content="", extra='{"tool_calls": []}')
