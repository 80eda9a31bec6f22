"""One example in, token ids with their labels out.

Only what the assistant says is learned (or everything, with LEARN=all). Which tokens those are is derived by rendering the
conversation up to each assistant turn, and is *checked*: where a template renders earlier turns differently in history
(models that drop their reasoning, say), the conversation becomes one piece per assistant turn. The end-of-turn token that
the template writes after a reply is learned too, or generation would never stop.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jinja2

from job.data.messages import Example, Message
from job.data.reasons import Reason
from job.errors import DataError

IGNORED = -100
"""The label of a token that is not learned (the ignore_index of PyTorch's cross entropy)."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For base models without a chat template (github.com/openai/openai-python, chatml.md)."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token: str | None

    def __call__(self, text: str, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Ids and labels of one training example, of equal length; a label is its id or IGNORED."""

    input_ids: list[int]
    labels: list[int]


class Labeller:
    """Turns examples into tokens with one tokenizer and one set of rules."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        learn: Literal["assistant", "all"],
        min_tokens: int,
        max_length: int,
        overlong: Literal["drop", "truncate"],
    ) -> None:
        self._tokenizer = tokenizer
        self._learn = learn
        self._min_tokens = min_tokens
        self._max_length = max_length
        self._truncate = overlong == "truncate"

    def label(self, example: Example) -> list[Tokens] | Reason:
        """The example's tokens: one piece, or one per assistant turn where the template demands it.

        An example is dropped whole: every one of its pieces must be within the limits.
        """
        try:
            rendered = list(self._render(example))
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"CHAT_TEMPLATE: not a valid template ({error}); correct it") from error
        except jinja2.TemplateError:
            return Reason.TEMPLATE_REFUSES
        pieces = []
        for text, learned in rendered:
            tokens = self._tokenize(text, learned)
            if len(tokens.input_ids) > self._max_length:
                if not self._truncate:
                    return Reason.TOO_LONG
                tokens = Tokens(input_ids=tokens.input_ids[: self._max_length], labels=tokens.labels[: self._max_length])
            if len(tokens.input_ids) < self._min_tokens:
                return Reason.TOO_SHORT
            if all(label == IGNORED for label in tokens.labels[1:]):  # nothing predicts the first token
                return Reason.NOTHING_TO_LEARN
            pieces.append(tokens)
        return pieces

    def _render(self, example: Example) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        """Yield (text, learned character spans) for each piece."""
        if not example.messages:
            text = example.text + (self._tokenizer.eos_token or "")
            yield text, [(0, len(text))]
            return
        whole = self._chat(example.messages)
        if self._learn == "all":
            yield whole, [(0, len(whole))]
            return
        turns = [
            self._assistant_span(example.messages[: index + 1])
            for index, message in enumerate(example.messages)
            if message.role == "assistant"
        ]
        if all(whole.startswith(text) for text, _ in turns):
            yield whole, [span for _, span in turns]
        else:
            yield from ((text, [span]) for text, span in turns)

    def _assistant_span(self, messages: Sequence[Message]) -> tuple[str, tuple[int, int]]:
        """The conversation up to and with its last reply, and where that reply stands in it."""
        prompt = self._chat(messages[:-1], add_generation_prompt=True)
        through = self._chat(messages)
        if not through.startswith(prompt):
            # Some templates open the reply differently in training than for generation (an empty reasoning block, say):
            # then the reply begins where the two part.
            prompt = through[: _common_prefix(prompt, through)]
            reply = messages[-1].content.strip()
            if reply not in through[len(prompt) :]:
                raise DataError(
                    "CHAT_TEMPLATE: the model's template renders a reply so that its place cannot be found; "
                    "name a template with CHAT_TEMPLATE, or set LEARN=all"
                )
        end = len(through.rstrip()) if through.rstrip() != prompt.rstrip() else len(through)
        return through, (len(prompt), end)

    def _chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
        return text

    def _tokenize(self, text: str, learned: Sequence[tuple[int, int]]) -> Tokens:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        labels = [
            # Some tokenizers trim blanks off the offsets: a token of blanks is (end, end), and the rule counts it in.
            token if any(first <= start and first < end <= last for first, last in learned) else IGNORED
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        return Tokens(input_ids=encoded["input_ids"], labels=labels)


def _common_prefix(left: str, right: str) -> int:
    return next((index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
