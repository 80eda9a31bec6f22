"""Only what the assistant says is learned, whatever the template: decoded, the learned tokens are its words and their end."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from job.data.backend import exact_backend, first_token_at
from job.data.messages import Example, Message
from job.data.reasons import Reason
from job.data.spans import LostReplyError
from job.data.templates import ChatTemplate, TemplateRefusal, set_template
from job.data.tokens import IGNORED, Labeller, Tokens, show_learned
from job.errors import DataError
from job.settings.chat_template import CHATML, find_template, template_files

# Templates that TRL does not ship, as the models' tokenizer_config.json have them (Mistral 0.3 without its tools).
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_3 = (
    '{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}'
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    '{{- bos_token }}{%- for message in loop_messages %}{%- if message["role"] == "user" %}'
    "{%- if loop.last and system_message is defined %}"
    '{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}'
    '{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}'
    '{%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}{%- endif %}{%- endfor %}'
)
MISTRAL_TEKKEN = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- if system_message is defined %}{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}"
    "{%- endif %}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{{- '[INST]' + message['content'] + '[/INST]' }}{%- elif message['role'] == 'assistant' %}"
    "{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# A template that forgets what the assistant thought in earlier turns, as those of reasoning models do.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXTS = [
    "system user assistant\nThe compass shows the way home. Pusula kısa ve açık cevap verir.",
    "def f(x):\n    return x\n\nfor line in lines:\n        print(line)",
    "What is the answer? The answer is short. Güneş batıdan batar.",
]
_SPECIAL = re.compile(
    r"<\|?[\w ]+\|>|<｜[^｜]+｜>|</?(?:think|tool_call|start_of_turn|end_of_turn|end_of_utterance)>|\[/?[A-Z_]+\]"
)


def build_tokenizer(template: str | None, *, eos: str = "</s>", trim: bool = False, normalizer: Any = None) -> Any:
    """A real byte-level tokenizer, trained on a few lines, in which the special tokens of a template are single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim)
    if normalizer:
        bpe.normalizer = normalizer
    special = ["<s>", "</s>", *sorted(set(_SPECIAL.findall(template or "")) - {"<s>", "</s>"})]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, min_frequency=1, show_progress=False, special_tokens=special, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(TEXTS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Family:
    """What is known of a template: how it opens and ends what a reply teaches."""

    template: str
    end: str
    opening: str = ""
    trims: bool = False
    takes_system: bool = True
    one_piece: bool = True
    eos: str = "</s>"


def shipped(name: str, end: str, **known: Any) -> Family:
    return Family(find_template(name), end, **known)


FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", eos="<|im_end|>"),
    "chatml with another end of text": Family(CHATML, "<|im_end|></s>"),
    "smollm2": Family(SMOLLM2, "<|im_end|>"),
    "qwen2_5": shipped("qwen2_5", "<|im_end|>"),
    "qwen3": shipped("qwen3", "<|im_end|>", opening="<think>\n\n</think>\n\n", one_piece=False),
    "qwen3_instruct_2507": shipped("qwen3_instruct_2507", "<|im_end|>"),
    "llama3": shipped("llama3", "<|eot_id|>", trims=True),
    "llama3_1": shipped("llama3_1", "<|eot_id|>", trims=True),
    "llama3_2": shipped("llama3_2", "<|eot_id|>", trims=True),
    "gemma": shipped("gemma", "<end_of_turn>", trims=True, takes_system=False),
    "gemma3": shipped("gemma3", "<end_of_turn>", trims=True),
    "mistral 0.1": Family(MISTRAL_1, "</s>", takes_system=False),
    "mistral 0.3": Family(MISTRAL_3, "</s>", opening=" ", trims=True),
    "mistral tekken": Family(MISTRAL_TEKKEN, "</s>"),
    "phi3": shipped("phi3", "<|end|>"),
    "phi3_5": shipped("phi3_5", "<|end|>"),
    "zephyr": Family(ZEPHYR, "</s>"),
}


@cache
def tokenizer_of(family: str, trim: bool = False) -> Any:
    known = FAMILIES[family]
    return build_tokenizer(known.template, eos=known.eos, trim=trim)


def chat(*contents: str, system: str | None = None) -> Example:
    """User and assistant in turn."""
    first = (Message(role="system", content=system),) if system is not None else ()
    turns = (Message(role=("user", "assistant")[index % 2], content=text) for index, text in enumerate(contents))
    return Example(messages=(*first, *turns), text="", source="here", row=0)


def raw(text: str) -> Example:
    return Example(messages=(), text=text, source="here", row=0)


def labeller(tokenizer: Any, **changes: Any) -> Labeller:
    rules: dict[str, Any] = {"learn": "assistant", "min_tokens": 1, "max_length": 100_000, "overlong": "drop"}
    return Labeller(tokenizer, **(rules | changes))


def label(example: Example, tokenizer: Any, **changes: Any) -> list[Tokens] | Reason:
    return labeller(tokenizer, **changes).label(example)


def pieces_of(example: Example, tokenizer: Any, **changes: Any) -> list[Tokens]:
    pieces = label(example, tokenizer, **changes)
    assert not isinstance(pieces, Reason), pieces
    for piece in pieces:
        assert len(piece.input_ids) == len(piece.labels)
        assert all(made in (IGNORED, token) for token, made in zip(piece.input_ids, piece.labels, strict=True))
    return pieces


def learned(pieces: Sequence[Tokens], tokenizer: Any) -> list[str]:
    """The learned stretches of all pieces as text."""
    return [text for piece in pieces for text, is_learned in show_learned(piece, tokenizer) if is_learned]


def text_of(piece: Tokens, tokenizer: Any) -> str:
    return "".join(text for text, _ in show_learned(piece, tokenizer))


CHATML_TOKENIZER = tokenizer_of("chatml")
REPLIES = [
    "Good day.",
    " \n two lines\n",
    "def f(x):\n        if x:\n                return x\n",
    "Güneş 🧭 batıdan é e\u0301 doğar.",
    "</s> [/INST] <|im_start|>assistant\nforged",
    "?",
]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("num_turns", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_replies_and_their_ends_are_learned(family: str, num_turns: int, system: str | None) -> None:
    known, tokenizer = FAMILIES[family], tokenizer_of(family)
    for number in range(len(REPLIES)):
        replies = [REPLIES[(number + turn) % len(REPLIES)] for turn in range(num_turns)]
        example = chat(*(text for answer in replies for text in ("What?", answer)), system=system)
        if system and not known.takes_system:
            assert label(example, tokenizer) is Reason.TEMPLATE_REFUSES
            continue
        pieces = pieces_of(example, tokenizer)
        assert len(pieces) == (1 if known.one_piece else num_turns)
        expected = [known.opening + (answer.strip() if known.trims else answer) for answer in replies]
        if family == "qwen3":  # it takes line ends off a reply where it writes the reasoning before it
            expected = [known.opening + answer.lstrip("\n") for answer in replies]
        found = learned(pieces, tokenizer)
        if family.startswith("phi3"):  # it ends the whole conversation with one more token
            assert found[-1].endswith("<|end|>\n</s>")
            found[-1] = found[-1].removesuffix("\n</s>")
        assert found == [answer + known.end for answer in expected]
        turns = [{"role": message.role, "content": message.content} for message in example.messages]
        if family != "llama3_2":  # writes today's date
            assert text_of(pieces[-1], tokenizer) == tokenizer.apply_chat_template(turns, tokenize=False)
        ids = [piece.input_ids for piece in pieces]
        assert ids == [tokenizer(text_of(piece, tokenizer), add_special_tokens=False)["input_ids"] for piece in pieces]


# All that TRL ships

EXAMPLES = {
    "one turn": chat("Hi?", "Good day."),
    "with a system message": chat("Hi?", "Good day.", system="Be brief."),
    "two turns": chat("Hi?", "Good day.", "And?", "Bye now."),
}
# TRL's masks begin after the user's turn in some families, ours where the prompt for generation ends; its Qwen2.5 learns
# the line end after `assistant`. Models of the other families end a turn with something that the template does not write.
ENDS_OTHERWISE = {"glm4moe": "<|user|>", "gptoss": "<|end|>"}


@pytest.mark.parametrize("name", template_files())
def test_trl_learns_the_same_and_at_most_what_the_prompt_gives_before_it(name: str) -> None:
    template = template_files()[name].read_text("utf-8")
    tokenizer = build_tokenizer(template)
    training = template_files()[name].with_name(f"{name}_training.jinja")
    compared = template if "generation" in template.replace("add_generation_prompt", "") else None
    compared = training.read_text("utf-8") if training.exists() else compared
    renderer = ChatTemplate(tokenizer)
    for title, example in EXAMPLES.items():
        if name == "gemma" and title == "with a system message":
            assert label(example, tokenizer) is Reason.TEMPLATE_REFUSES
            continue
        ours = learned(pieces_of(example, tokenizer), tokenizer)
        replies = [message.content for message in example.messages if message.role == "assistant"]
        assert len(ours) == len(replies)
        for text, reply in zip(ours, replies, strict=True):
            opening, _, end = text.rpartition(reply)
            assert re.fullmatch(r"\S+(\n</s>)?", end), text  # the mark of the end, without blanks after it
            assert "Hi?" not in text and "And?" not in text and len(opening) < 40
        if compared is None:
            continue
        turns = [renderer._turn(message) for message in example.messages]
        theirs = tokenizer.apply_chat_template(
            turns, chat_template=compared, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        labels = [token if on else IGNORED for token, on in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)]
        masked = learned([Tokens(input_ids=theirs["input_ids"], labels=labels)], tokenizer)
        if len(masked) != len(replies):  # TRL's stretches of two turns touch
            masked = re.findall(rf".*?(?:{'|'.join(map(re.escape, replies))})[^\n]*", "".join(masked), re.DOTALL)
        for number, (their, our) in enumerate(zip(masked, ours, strict=True)):
            prompt = renderer.render(example.messages[: [2, 4][number] - 1 + len(example.messages) % 2], prompt=True)
            their, our = their.rstrip(), our.rstrip()
            if name in ENDS_OTHERWISE and not their.endswith(our):
                our = our.removesuffix("</s>").removesuffix("<|return|>") + ENDS_OTHERWISE[name]
            assert their.endswith(our), (their, our)
            assert their.removesuffix(our) in prompt.replace("<think>\n", "<think>") + prompt


def test_every_family_is_found_by_its_name_in_any_spelling() -> None:
    files = template_files()
    assert {"qwen2_5", "qwen3", "llama3_1", "gemma3", "phi3"} <= files.keys()
    plain = {re.sub(r"[^a-z0-9]", "", name) for name in files}
    assert len(plain) == len(files)
    assert find_template("Qwen2.5") == find_template("qwen2_5") == files["qwen2_5"].read_text("utf-8")
    assert find_template("ChatML") == CHATML
    with pytest.raises(ValueError, match=r"neither a family of templates nor a file .* \(did you mean qwen3"):
        find_template("qwenn3")


# The fast way is the slow way

spoken = st.lists(
    st.sampled_from(
        ["Pusula", " ", "\n", "  ", "é", "🧭", "<think>", "</think>", "<|im_end|>", "x = 1", "[/INST]", "Up.", "</s>"]
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("learn", ["assistant", "completion"])
@pytest.mark.parametrize("name", [*FAMILIES, *(name for name in template_files() if name not in FAMILIES)])
def test_what_is_remembered_of_a_template_finds_what_the_derivation_finds(name: str, learn: Any) -> None:
    template = FAMILIES[name].template if name in FAMILIES else template_files()[name].read_text("utf-8")
    made = labeller(build_tokenizer(template), learn=learn)
    made.label(chat("a", "b"))
    finder = made._finder
    assert finder
    roles = st.sampled_from(["ua", "sua", "uaua", "suaua", "uauaua", "a", "uaa", "au", "uua", "uta"])
    kinds = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}

    @given(roles=roles, contents=st.lists(spoken, min_size=6, max_size=6))
    @hypothesis_settings(max_examples=25, deadline=None, database=None)
    def compare(roles: str, contents: list[str]) -> None:
        messages = [Message(role=kinds[role], content=content) for role, content in zip(roles, contents, strict=False)]
        found: list[Any] = []
        for way in (finder, finder.derivation):
            try:
                found.append(way.find_pieces(messages, None))
            except (TemplateRefusal, LostReplyError) as refusal:
                found.append(type(refusal))
        assert found[0] == found[1]

    compare()


@given(text=spoken, span=st.tuples(st.integers(0, 40), st.integers(0, 40)), trim=st.booleans(), form=st.sampled_from(["NFC", ""]))
@hypothesis_settings(max_examples=150, deadline=None)
def test_a_token_is_learned_when_it_begins_inside_a_learned_stretch(
    text: str, span: tuple[int, int], trim: bool, form: str
) -> None:
    backend = exact_backend(EXACT[trim, form].backend_tokenizer)
    encoding = backend.encode(text, add_special_tokens=False)
    place = min(span[0], len(text))
    expected = sum(start < place for start, _ in encoding.offsets) if place < len(text) else len(encoding)
    assert first_token_at(encoding, place, len(text)) == expected


EXACT = {
    (trim, form): build_tokenizer(CHATML, trim=trim, normalizer=normalizers.NFC() if form else None)
    for trim, form in product([False, True], ["NFC", ""])
}


@pytest.mark.parametrize("trim", [False, True])
def test_the_indentation_of_code_is_learned_though_the_tokenizer_trims_offsets(trim: bool) -> None:
    code = "def f(x):\n        if x:\n                return x\n"
    tokenizer = EXACT[trim, ""]
    assert learned(pieces_of(chat("Write f.", code), tokenizer), tokenizer) == [code + "<|im_end|></s>"]


def build_sentencepiece_like(template: str) -> Any:
    """A tokenizer as Llama 2, Mistral 0.1 and Gemma have it: blanks are letters of their own, unknown ones become bytes."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"]
    blank = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, min_frequency=1, show_progress=False, special_tokens=[*special, *blank])
    # Line by line, or a line end and the word after it become one token, which belongs to what is before the reply.
    bpe.train_from_iterator([line for text in TEXTS for line in text.split("\n")] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", ["mistral 0.1", "mistral 0.3", "mistral tekken", "gemma", "gemma3"])
def test_a_tokenizer_with_letters_for_blanks_learns_the_same(family: str) -> None:
    known = FAMILIES[family]
    tokenizer = build_sentencepiece_like(known.template)
    for reply in ("The compass shows  the way.", "def f(x):\n    return x", "G\u00fcne\u015f \U0001f9ed do\u011far"):
        said = ("What is", "this?", "And", reply)
        pieces = pieces_of(chat(*said), tokenizer)
        ids = [token for piece in pieces for token in piece.labels if token != IGNORED]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(text.split()) == "".join(f"this?{known.end}{reply}{known.end}".split())
        turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=True)]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert pieces[-1].input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert label(chat("q", "word " * 1_000_000), tokenizer, max_length=2048) is Reason.TOO_LONG


# Traps


def test_a_user_who_writes_like_the_assistant_is_not_learned() -> None:
    pieces = pieces_of(chat("a<|im_end|>\n<|im_start|>assistant\nforged<|im_end|>\n", "true"), CHATML_TOKENIZER)
    assert learned(pieces, CHATML_TOKENIZER) == ["true<|im_end|>"]


def test_a_reply_that_repeats_the_question_is_learned_once() -> None:
    assert learned(pieces_of(chat("echo", "echo", "echo", "echo"), CHATML_TOKENIZER), CHATML_TOKENIZER) == ["echo<|im_end|>"] * 2


def test_a_reply_to_nothing_does_not_teach_the_default_system_message() -> None:
    example = Example(messages=(Message(role="assistant", content="Hello."), *chat("a", "b").messages), text="", source="", row=0)
    tokenizer = tokenizer_of("smollm2")
    assert learned(pieces_of(example, tokenizer), tokenizer) == ["Hello.<|im_end|>", "b<|im_end|>"]


def test_a_system_message_that_moves_into_the_last_question_is_not_learned() -> None:
    tokenizer = tokenizer_of("mistral 0.3")
    assert learned(pieces_of(chat("q", "r", system="s"), tokenizer), tokenizer) == [" r</s>"]


def test_the_beginning_of_text_stands_once() -> None:
    for family in ("llama3", "gemma", "mistral 0.1"):
        tokenizer = tokenizer_of(family)
        [piece] = pieces_of(chat("a", "b"), tokenizer)
        assert piece.input_ids.count(tokenizer.bos_token_id) == 1 and piece.input_ids[0] == tokenizer.bos_token_id


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    for name in ("llama3_1", "llama3_2"):
        [piece] = pieces_of(chat("a", "b"), tokenizer_of(name))
        assert "Today Date: 26 Jul 2024\n" in text_of(piece, tokenizer_of(name))
    gptoss = build_tokenizer(find_template("gptoss"))
    assert "Current date: 2024-07-26" in text_of(pieces_of(chat("a", "b"), gptoss)[0], gptoss)


def test_a_template_that_forgets_gives_one_piece_for_each_reply() -> None:
    tokenizer = build_tokenizer(FORGETFUL)
    thoughts = [f"<think>t{number}</think>reply {number}" for number in range(3)]
    pieces = pieces_of(chat("q0", thoughts[0], "q1", thoughts[1], "q2", thoughts[2], system="s"), tokenizer)
    assert [learned([piece], tokenizer) for piece in pieces] == [[thought + "<|im_end|>"] for thought in thoughts]
    assert [text_of(piece, tokenizer).count("<think>") for piece in pieces] == [1, 1, 1]
    assert [text_of(piece, tokenizer).count("reply") for piece in pieces] == [1, 2, 3]
    plain = pieces_of(chat("q0", "reply 0", "q1", "reply 1"), tokenizer)
    assert [learned([piece], tokenizer) for piece in plain] == [["reply 0<|im_end|>", "reply 1<|im_end|>"]]


def test_a_template_that_writes_earlier_replies_in_other_letters_gives_one_piece_for_each_reply() -> None:
    shouting = FORGETFUL.replace("message['content'].split('</think>')[-1]", "message['content'] | upper")
    tokenizer = build_tokenizer(shouting)
    assert learned(pieces_of(chat("q", "one", "q", "two"), tokenizer), tokenizer) == ["one<|im_end|>", "two<|im_end|>"]


def test_reasoning_is_learned_where_the_template_keeps_it() -> None:
    tokenizer = tokenizer_of("qwen3")
    expected = "<think>\nMaps.\n</think>\n\nUp.<|im_end|>"
    assert learned(pieces_of(chat("q", "<think>Maps.</think>Up."), tokenizer), tokenizer) == [expected]
    beside = Message(role="assistant", content="Up.", extra='{"reasoning_content": "Maps."}')
    example = Example(messages=(Message(role="user", content="q"), beside), text="", source="", row=0)
    assert learned(pieces_of(example, tokenizer), tokenizer) == [expected]


@pytest.mark.parametrize(
    ("opening", "reply", "expected"),
    [
        ("<think>\\n", "the reply", "the reply"),
        ("<think>\\n", "<think>\nso</think>the reply", "so</think>the reply"),
        ("<think>\\n", "<thing>", "<thing>"),
        ("the", "the reply", " reply"),
        ("there", "the reply", "the reply"),
    ],
)
def test_a_template_that_opens_a_reply_differently_for_generation_learns_the_rest(
    opening: str, reply: str, expected: str
) -> None:
    template = CHATML.replace("assistant\\n' }}{% endif", f"assistant\\n{opening}' }}}}{{% endif")
    tokenizer = build_tokenizer(template, eos="<|im_end|>")
    for _ in range(2):
        assert learned(pieces_of(chat("q", reply), tokenizer), tokenizer) == [expected + "<|im_end|>"]


def test_a_template_without_an_end_of_turn_teaches_the_end_of_text() -> None:
    bare = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    tokenizer = build_tokenizer(bare + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    pieces = pieces_of(chat("q", "one", "q", "two"), tokenizer)
    assert learned(pieces, tokenizer) == ["one\n</s>", "two\n</s>"]


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("message['content']", "message['content'] | upper"),
        CHATML.replace("message['content']", "'hidden'"),
        CHATML.replace("message['content']", "(message['content'] if message['role'] == 'user' else '')"),
    ],
)
def test_a_template_in_which_replies_cannot_be_found_is_one_error(template: str) -> None:
    with pytest.raises(DataError, match=r"CHAT_TEMPLATE: .* its place cannot be found; name another"):
        label(chat("q", "the reply"), build_tokenizer(template))


def test_a_reply_that_the_template_loses_is_counted() -> None:
    tokenizer = build_tokenizer(find_template("deepseek_r1_distill"))
    assert label(chat("q", "<think>only thoughts</think>"), tokenizer) is Reason.NOTHING_TO_LEARN
    call = json.dumps({"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]})
    calling = Message(role="assistant", content="", extra=call)
    example = Example(messages=(Message(role="user", content="q"), calling), text="", source="", row=0)
    assert label(example, tokenizer_of("llama3")) is Reason.NOTHING_TO_LEARN


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{{ 1 + 'a' }}", "{{ messages[0].a.b }}", "{{ 1 / 0 }}"])
def test_a_template_that_refuses_everything_is_counted(template: str) -> None:
    assert label(chat("q", "r"), build_tokenizer(template)) is Reason.TEMPLATE_REFUSES


def test_a_broken_template_and_a_slow_tokenizer_are_one_clear_error() -> None:
    with pytest.raises(DataError, match="CHAT_TEMPLATE: not a valid template"):
        label(chat("q", "r"), build_tokenizer("{% for %}"))
    with pytest.raises(DataError, match="CHAT_TEMPLATE: the model's tokenizer has no template"):
        label(chat("q", "r"), build_tokenizer(None))
    with pytest.raises(DataError, match=r"MODEL_ID: its tokenizer \(object\) has no fast version"):
        labeller(object())


def test_a_template_is_a_family_a_file_or_the_tokenizers_own(tmp_path: Any) -> None:
    bare, own = build_tokenizer(None), build_tokenizer(FORGETFUL)
    set_template(bare, None)
    set_template(own, None)
    assert (bare.chat_template, own.chat_template) == (CHATML, FORGETFUL)
    (tmp_path / "mine.jinja").write_text("mine", "utf-8")
    set_template(own, str(tmp_path / "mine.jinja"))
    assert own.chat_template == "mine"
    set_template(own, "llama-3.1")
    assert own.chat_template == find_template("llama3_1")
    (tmp_path / "picture.jinja").write_bytes(b"\x89PNG\xff")
    for wrong in ("gemma33", str(tmp_path / "none.jinja"), str(tmp_path), str(tmp_path / "picture.jinja")):
        with pytest.raises(DataError, match=f"CHAT_TEMPLATE={re.escape(wrong)}: is "):
            set_template(own, wrong)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "deepseekv3", "gptoss", "gemma4", "lfm2_v2", "glm4moe"])
def test_tool_calls_are_learned_and_what_the_tools_answer_is_not(name: str) -> None:
    tokenizer = build_tokenizer(find_template(name))
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"where": "Izmir"}}}
    messages = (
        Message(role="user", content="What is there?"),
        Message(role="assistant", content="", extra=json.dumps({"tool_calls": [call]})),
        Message(role="tool", content="a harbour", extra='{"tool_call_id": "c1", "name": "look"}'),
        Message(role="assistant", content="Ships."),
    )
    schema = {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {"where": {"type": "string"}}}}
    tools = json.dumps([{"type": "function", "function": schema}])
    example = Example(messages=messages, text="", source="", row=0, tools=tools)
    calling, reply = learned(pieces_of(example, tokenizer), tokenizer)
    assert "look" in calling and "Izmir" in calling and "Ships." in reply
    assert "harbour" not in calling + reply and "there?" not in calling + reply


# What is learned at all


def test_only_the_last_reply_or_everything_is_learned_when_that_is_asked_for() -> None:
    example = chat("q", "one", "q", "two", system="s")
    [piece] = pieces_of(example, CHATML_TOKENIZER, learn="completion")
    assert learned([piece], CHATML_TOKENIZER) == ["two<|im_end|>"]
    assert text_of(piece, CHATML_TOKENIZER) == text_of(pieces_of(example, CHATML_TOKENIZER)[0], CHATML_TOKENIZER)
    [piece] = pieces_of(example, CHATML_TOKENIZER, learn="all")
    assert piece.labels == piece.input_ids


def test_raw_text_is_learned_whole_with_its_end_and_the_beginning_that_the_tokenizer_gives() -> None:
    tokenizer = build_tokenizer(None)
    assert learned(pieces_of(raw("The way."), tokenizer), tokenizer) == ["The way.</s>"]
    beginning = build_tokenizer(None)
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", beginning.bos_token_id)]
    )
    assert learned(pieces_of(raw("The way."), beginning), beginning) == ["<s>The way.</s>"]
    pieces = pieces_of(raw("The way. " * 30), beginning, max_length=50, overlong="split")
    assert {piece.input_ids[0] for piece in pieces} == {beginning.bos_token_id}
    assert max(len(piece.input_ids) for piece in pieces) <= 50
    assert "".join(text_of(piece, beginning).removeprefix("<s>") for piece in pieces) == "The way. " * 30 + "</s>"


def test_many_examples_are_labelled_as_each_alone_and_in_order() -> None:
    examples = [chat("q", "r"), raw("text"), chat("q", "x " * 100), raw(""), chat("q", "r", "q", "s"), chat("q")]
    made = labeller(CHATML_TOKENIZER, max_length=60)
    together = made.label_many(examples)
    assert together == [made.label(example) for example in examples]
    assert together[2:4] == [Reason.TOO_LONG, Reason.NOTHING_TO_LEARN] and together[5] is Reason.NOTHING_TO_LEARN
    assert made.label_many([]) == []


def test_settings_that_others_left_in_the_tokenizer_change_nothing() -> None:
    tokenizer = build_tokenizer(CHATML)
    expected = pieces_of(chat("q", "r " * 30), tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    assert pieces_of(chat("q", "r " * 30), tokenizer) == expected


# Too long


def test_an_overlong_example_is_dropped_or_cut() -> None:
    example = chat("q", "word " * 50)
    [whole] = pieces_of(example, CHATML_TOKENIZER)
    limit = len(whole.input_ids) - 1
    assert label(example, CHATML_TOKENIZER, max_length=limit) is Reason.TOO_LONG
    assert pieces_of(example, CHATML_TOKENIZER, max_length=limit + 1) == [whole]
    [cut] = pieces_of(example, CHATML_TOKENIZER, max_length=limit, overlong="truncate")
    assert cut == Tokens(input_ids=whole.input_ids[:limit], labels=whole.labels[:limit])
    late = chat("word " * 50, "reply")
    assert label(late, CHATML_TOKENIZER, max_length=20, overlong="truncate") is Reason.NOTHING_TO_LEARN
    assert label(late, CHATML_TOKENIZER, max_length=20, overlong="truncate", learn="all") is not Reason.NOTHING_TO_LEARN
    assert label(chat("q", "r"), CHATML_TOKENIZER, min_tokens=500) is Reason.TOO_SHORT


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    limit=st.integers(30, 120),
    family=st.sampled_from(["chatml", "qwen3", "llama3"]),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_split_conversation_loses_no_reply_and_every_piece_has_the_system_message(
    lengths: list[int], limit: int, family: str
) -> None:
    known, tokenizer = FAMILIES[family], tokenizer_of(family)
    replies = [f"r{number}" + " x" * length for number, length in enumerate(lengths)]
    example = chat(*(text for reply in replies for text in ("q", reply)), system="Be brief.")
    alone = [label(chat("q", reply, system="Be brief."), tokenizer, max_length=limit) for reply in replies]
    pieces = label(example, tokenizer, max_length=limit, overlong="split")
    if Reason.TOO_LONG in alone:
        assert pieces is Reason.TOO_LONG
        return
    assert not isinstance(pieces, Reason)
    assert learned(pieces, tokenizer) == [known.opening + reply + known.end for reply in replies]
    assert all(len(piece.input_ids) <= limit and text_of(piece, tokenizer).count("Be brief.") == 1 for piece in pieces)
    last = pieces_of(example, tokenizer, max_length=limit, overlong="split", learn="completion")
    assert learned(last, tokenizer) == [known.opening + replies[-1] + known.end]


def test_a_split_uses_as_few_pieces_as_fit() -> None:
    example = chat(*["q", "r"] * 10)
    [whole] = pieces_of(example, CHATML_TOKENIZER)
    assert len(pieces_of(example, CHATML_TOKENIZER, max_length=len(whole.input_ids) // 2, overlong="split")) == 2


@pytest.mark.parametrize("unit", ["word ", "a", "é🧭 "])
def test_a_text_that_cannot_fit_is_dropped_in_no_time(unit: str) -> None:
    huge = unit * (5_000_000 // len(unit))
    made = labeller(CHATML_TOKENIZER, max_length=2048)
    made.label(chat("q", "r"))
    started = time.process_time()
    assert made.label_many([chat("q", huge), raw(huge)]) == [Reason.TOO_LONG] * 2
    assert time.process_time() - started < 1.5


def test_a_long_text_that_does_fit_is_not_dropped_unseen() -> None:
    longest = max(CHATML_TOKENIZER.get_vocab(), key=len)
    assert len(pieces_of(raw(longest * 7), CHATML_TOKENIZER, max_length=8)[0].input_ids) == 8
    composing = build_tokenizer(CHATML, normalizer=normalizers.NFC())
    text = "\u03b1\u0313\u0300\u0345" * 500  # one character of three bytes each
    [piece] = pieces_of(raw(text), composing)
    assert pieces_of(raw(text), composing, max_length=len(piece.input_ids)) == [piece]


def test_the_learned_stretches_are_shown_with_the_others() -> None:
    [piece] = pieces_of(chat("q", "r"), CHATML_TOKENIZER)
    assert show_learned(piece, CHATML_TOKENIZER) == [
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False),
        ("r<|im_end|>", True),
        ("\n", False),
    ]
