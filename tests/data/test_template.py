"""Drafted positions against masks worked out by hand, one template family each.

In the drawings one character or control token of the rendering stands above its mark: `^` drafted, `s` the
first token of an answer (the target's prefill yields it), `.` anything else. A control token is one letter.
"""

import json
from pathlib import Path

import pytest

from tiny import CHATML, tiny_tokenizer
from vsd.data import Conversation, encode, load_examples, prompt_inputs
from vsd.errors import VSDError

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + (m['content'] | trim) + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) }}"
    "{{ '\n' + (m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
# As in Phi-3: a token closes the whole conversation, so a shorter rendering is no prefix of a longer one.
CLOSED = CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ '<eos>' }}{% endif %}{% if add")
NO_END = "{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
REWRITES = (
    "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a<think>' }}{% endif %}"
)

TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo!"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
]
# control tokens as letters: each drawing has the rendering above the marks, newlines as ~
CONTROL = {
    "<|im_start|>": "S", "<|im_end|>": "E", "<|begin_of_text|>": "B", "<|start_header_id|>": "S",
    "<|end_header_id|>": "D", "<|eot_id|>": "E", "<bos>": "B", "<start_of_turn>": "S", "<end_of_turn>": "E",
    "<s>": "B", "</s>": "E", "[INST]": "S", "[/INST]": "D", "<eos>": "X", "\n": "~",
}  # fmt: skip
DRAWN = {
    "chatml": (
        CHATML,
        "Suser~HiE~Sassistant~Yo!E~Suser~1+1E~Sassistant~2E~",
        ".....................s^^^.......................s^.",
    ),
    "llama3": (
        LLAMA3,
        "BSuserD~~HiESassistantD~~Yo!ESuserD~~1+1ESassistantD~~2E",
        ".........................s^^^.........................s^",
    ),
    "gemma": (
        GEMMA,
        "BSuser~HiE~Smodel~Yo!E~Suser~1+1E~Smodel~2E~",
        "..................s^^^...................s^.",
    ),
    "mistral": (
        MISTRAL,
        "BS Hi D Yo!ES 1+1 D 2E",
        ".......s^^^^.......s^^",
    ),
    "closed": (
        CLOSED,
        "Suser~HiE~Sassistant~Yo!E~Suser~1+1E~Sassistant~2E~X",
        ".....................s^^^.......................s^..",
    ),
    "no end token": (
        NO_END,
        "u: Hi~a: Yo!~u: 1+1~a: 2~",
        "........s^^^..........s^.",
    ),
}


def draw(ids: list[int], tokenizer) -> str:
    return "".join(CONTROL.get(token, token) for token in tokenizer.convert_ids_to_tokens(ids))


def talk(messages, **ids) -> Conversation:
    return Conversation("c", "f.jsonl:1", messages, **ids)


@pytest.mark.parametrize("name", DRAWN)
def test_masks_worked_out_by_hand(name: str) -> None:
    template, text, marks = DRAWN[name]
    tokenizer = tiny_tokenizer(template)
    example = encode(tokenizer, talk(TWO_TURNS), 1000)
    assert draw(example.inputs.ids, tokenizer) == text
    assert "".join("^" if d else "." for d in example.drafted) == marks.replace("s", ".")


@pytest.mark.parametrize("name", DRAWN)
def test_an_answer_starts_where_the_served_prompt_ends(name: str) -> None:
    template, _, marks = DRAWN[name]
    tokenizer = tiny_tokenizer(template)
    whole = encode(tokenizer, talk(TWO_TURNS), 1000).inputs.ids
    for answer, start in zip((1, 3), [i for i, mark in enumerate(marks) if mark == "s"]):
        assert whole[:start] == prompt_inputs(tokenizer, TWO_TURNS[:answer]).ids


def test_system_message_and_repeated_words_do_not_confuse_the_spans() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": r, "content": "a"} for r in ("system", "user", "assistant", "user", "assistant")]
    example = encode(tokenizer, talk(messages), 1000)
    drafted = [draw([i], tokenizer) for i, d in zip(example.inputs.ids, example.drafted) if d]
    assert drafted == ["E", "E"]


def test_exact_ids_are_taken_as_they_are() -> None:
    example = encode(tiny_tokenizer(), talk([], prompt_ids=[40, 41], response_ids=[42, 43, 2]), 10)
    assert example.inputs.ids == [40, 41, 42, 43, 2]
    assert example.drafted == [False, False, False, True, True]


def test_ids_of_another_target_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(VSDError, match="vocabulary"):
        encode(tokenizer, talk([], prompt_ids=[40], response_ids=[4000, 2]), 10)
    with pytest.raises(VSDError, match="do not spell the answer"):
        encode(tokenizer, talk(TWO_TURNS, prompt_ids=[40], response_ids=[40, 41, 2]), 10)


def test_a_template_that_rewrites_history_is_refused() -> None:
    with pytest.raises(VSDError, match="rewrites earlier turns"):
        encode(tiny_tokenizer(REWRITES), talk(TWO_TURNS), 1000)


def test_what_a_template_refuses_is_a_bad_line() -> None:
    messages = [{"role": "system", "content": "s"}, *TWO_TURNS]
    with pytest.raises(VSDError, match="no system role"):
        encode(tiny_tokenizer(GEMMA), talk(messages), 1000)


def test_a_tokenizer_without_template_says_so() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(VSDError, match="no chat template"):
        prompt_inputs(tokenizer, TWO_TURNS[:1])


def test_load_examples_names_over_long_and_undraftable_lines(tmp_path: Path) -> None:
    lines = [
        {"messages": TWO_TURNS},
        {"messages": [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]},
        {"prompt_ids": [40], "response_ids": [2]},
    ]
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    said: list[str] = []
    examples = load_examples(file, tiny_tokenizer(), 60, "skip", said.append)
    assert len(examples) == 1
    assert [line.removeprefix(str(file)).split(" (")[0] for line in said] == [
        ":2: too long: 122 tokens, more than the 60 allowed",
        ":3: nothing to draft: the answer is a single token",
    ]
    with pytest.raises(VSDError, match=r"f\.jsonl:2: too long"):
        load_examples(file, tiny_tokenizer(), 60)
    with pytest.raises(VSDError, match="no usable conversation"):
        load_examples(file, tiny_tokenizer(), 3, "skip")
