"""What would be trained: counts of a text as training reads it, and one conversation with its supervised tokens."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import compress, groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from vsd.data.chat import Conversation
from vsd.data.sequences import Example

_CLOSED = re.compile(r"</think(ing)?>|\[/THINK\]")  # the end of a thinking block


class TextCount(NamedTuple):
    """Counts of a text.

    Attributes:
        conversations, answers, sequences, tokens: how many; a conversation has one sequence or several.
        supervised: of the tokens, by token id.
        thinking: answers by kind: "thinks" (the answer holds thinking), "empty block" (an empty thinking block stands
            before it) and "no thinking".
        cut: answers that ended at a limit of tokens.
        longest: tokens of the longest sequence, and its place.
        repeated: conversations whose tokens are those of an earlier one.
        repeated_ids: conversations whose id is that of an earlier one.
        dated: the chat template prints the current date.
        sample: the first conversation and its sequences.
    """

    conversations: int
    answers: int
    sequences: int
    tokens: int
    supervised: Counter[int]
    thinking: Counter[str]
    cut: int
    longest: tuple[int, str]
    repeated: int
    repeated_ids: int
    dated: bool
    sample: tuple[Conversation, list[Example]]


def count_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[tuple[Conversation, list[Example]]]) -> TextCount:
    """Count what `encoded` yields: one conversation or more."""
    counts, supervised, thinking = Counter[str](), Counter[int](), Counter[str]()
    texts_seen, ids_seen = set[int](), set[int]()  # hashes, as there may be a million
    longest, sample = (0, ""), None
    for conversation, examples in texts:
        sample = sample or (conversation, examples)
        texts_seen.add(hash(tuple((tuple(e.inputs.ids), e.inputs.digest) for e in examples)))
        ids_seen.add(hash(conversation.id))
        counts.update(conversations=1, sequences=len(examples), cut=conversation.cut)
        for example in examples:
            ids, spans = example.inputs.ids, list(answers_of(example))
            counts.update(tokens=len(ids), answers=len(spans))
            supervised.update(compress(ids, example.drafted))
            thinking.update(_thinking(tokenizer, ids, span) for span in spans)
            longest = max(longest, (len(ids), conversation.where))
    assert sample is not None  # `encoded` yields one or more
    return TextCount(
        **{name: counts[name] for name in ("conversations", "answers", "sequences", "tokens", "cut")},
        supervised=supervised,
        thinking=thinking,
        longest=longest,
        repeated=counts["conversations"] - len(texts_seen),
        repeated_ids=counts["conversations"] - len(ids_seen),
        dated="strftime_now" in str(tokenizer.chat_template),
        sample=sample,
    )


def answers_of(example: Example) -> Iterator[range]:
    """The tokens of every answer: its first one, which is not drafted, and the drafted ones behind it."""
    position = 0
    for drafted, run in groupby(example.drafted):
        end = position + len(list(run))
        if drafted:
            yield range(position - 1, end)
        position = end


def marked_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> Iterator[tuple[str, bool]]:
    """(text, supervised or not) of every run of tokens, with markup."""
    for drafted, run in groupby(zip(example.inputs.ids, example.drafted), key=lambda pair: pair[1]):
        yield _decoded(tokenizer, [token for token, _ in run]), drafted


def _thinking(tokenizer: PreTrainedTokenizerBase, ids: list[int], answer: range) -> str:
    if _CLOSED.search(_decoded(tokenizer, ids[answer.start : answer.stop])):
        return "thinks"
    before = _decoded(tokenizer, ids[max(0, answer.start - 16) : answer.start]).rstrip()
    block = [match for match in _CLOSED.finditer(before) if match.end() == len(before)]
    return "empty block" if block else "no thinking"


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
