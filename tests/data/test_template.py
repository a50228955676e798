"""Drafted positions against masks worked out by hand, one template family each.

In the drawings one character or control token of the rendering stands above its mark: `^` drafted, `s` the
first token of an answer (the target's prefill yields it), `.` anything else. A control token is one letter.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import CHATML, tiny_tokenizer
from vsd.data import Conversation, Example, encode, load_examples, prompt_inputs
from vsd.errors import DataError, TargetError

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
# As Qwen3: thinking is removed from earlier answers; the last answer has a thinking block, if need be an empty one.
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}{% if m.role == 'assistant' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{% set content = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') %}"
    "{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same with `enable_thinking=False`: the prompt holds the empty block.
NO_THINKING = QWEN3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
# As DeepSeek-R1: thinking is removed from every answer; the prompt opens it.
R1 = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '[/INST]' + m.content.split('</think>')[-1] + '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[/INST]<think>\n' }}{% endif %}"
)
# As QwQ: the same, but the last answer keeps its thinking.
QWQ = (
    "{% for m in messages %}{% set content = m.content %}"
    "{% if not loop.last %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# As LLaVA: a message is a list of parts; of a plain text this prints nothing.
PARTS = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}",
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
    (example,) = encode(tokenizer, talk(TWO_TURNS), 1000)
    assert draw(example.inputs.ids, tokenizer) == text
    assert "".join("^" if d else "." for d in example.drafted) == marks.replace("s", ".")


@pytest.mark.parametrize("name", DRAWN)
def test_an_answer_starts_where_the_served_prompt_ends(name: str) -> None:
    template, _, marks = DRAWN[name]
    tokenizer = tiny_tokenizer(template)
    whole = encode(tokenizer, talk(TWO_TURNS), 1000)[0].inputs.ids
    for answer, start in zip((1, 3), [i for i, mark in enumerate(marks) if mark == "s"]):
        assert whole[:start] == prompt_inputs(tokenizer, TWO_TURNS[:answer]).ids


def test_system_message_and_repeated_words_do_not_confuse_the_spans() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": r, "content": "a"} for r in ("system", "user", "assistant", "user", "assistant")]
    (example,) = encode(tokenizer, talk(messages), 1000)
    drafted = [draw([i], tokenizer) for i, d in zip(example.inputs.ids, example.drafted) if d]
    assert drafted == ["E", "E"]


def test_exact_ids_are_taken_as_they_are() -> None:
    (example,) = encode(tiny_tokenizer(), talk([], prompt_ids=[40, 41], response_ids=[42, 43, 2]), 10)
    assert example.inputs.ids == [40, 41, 42, 43, 2]
    assert example.drafted == [False, False, False, True, True]


def test_ids_of_another_target_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="vocabulary"):
        encode(tokenizer, talk([], prompt_ids=[40], response_ids=[4000, 2]), 10)
    with pytest.raises(DataError, match="do not spell the answer"):
        encode(tokenizer, talk(TWO_TURNS, prompt_ids=[40], response_ids=[40, 41, 2]), 10)


def supervised(tokenizer, messages: list[dict[str, str]]) -> list[str]:
    """The supervised tokens of every sequence."""
    return [
        draw([token for token, drafted in zip(example.inputs.ids, example.drafted) if drafted], tokenizer)
        for example in encode(tokenizer, talk(messages), 1000)
    ]


def dialogue(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("template", [QWEN3, NO_THINKING])
def test_an_empty_thinking_block_is_context_in_one_sequence_for_each_answer(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    first, second = encode(tokenizer, talk(TWO_TURNS), 1000)
    for example, text, marks in (
        (
            first,
            "Suser~HiE~Sassistant~<think>~~</think>~~Yo!E~",
            "........................................s^^^.",
        ),
        (
            second,
            "Suser~HiE~Sassistant~Yo!E~Suser~1+1E~Sassistant~<think>~~</think>~~2E~",
            "...................................................................s^.",
        ),
    ):
        assert draw(example.inputs.ids, tokenizer) == text
        assert "".join("^" if d else "." for d in example.drafted) == marks.replace("s", ".")


def test_thinking_that_the_target_wrote_is_supervised() -> None:
    answer = "<think>\nhm\n</think>\n\nYes."
    tokenizer = tiny_tokenizer(QWEN3)
    assert supervised(tokenizer, dialogue("ok?", answer)) == ["think>~hm~</think>~~Yes.E"]
    assert supervised(tokenizer, dialogue("ok?", answer, "sure?", "No.")) == ["think>~hm~</think>~~Yes.E", "o.E"]
    # the template would print "\nhm\n": the target's own spelling is kept
    assert supervised(tokenizer, dialogue("ok?", "<think>hm</think>Yes.")) == ["think>hm</think>Yes.E"]


@pytest.mark.parametrize("template", [R1, QWQ])
@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_thinking_that_the_prompt_opens_is_trained_as_served(template: str, opening: str) -> None:
    tokenizer = tiny_tokenizer(template)
    messages = dialogue("ok?", opening + "hm\n</think>\n\nYes.", "sure?", opening + "well\n</think>\n\nNo.")
    examples = encode(tokenizer, talk(messages), 1000)
    end = "X" if template == R1 else "E"
    assert supervised(tokenizer, messages) == [f"m~</think>~~Yes.{end}", f"ell~</think>~~No.{end}"]
    for example, history in zip(examples, (messages[:1], messages[:3])):
        served = prompt_inputs(tokenizer, history).ids
        assert example.inputs.ids[: len(served)] == served
        assert example.drafted.index(True) == len(served) + 1


@pytest.mark.parametrize("template", [R1, QWQ])
def test_an_answer_without_the_thinking_that_the_prompt_opens_is_refused(template: str) -> None:
    with pytest.raises(DataError, match=r"opens <think> in the prompt .* use `vsd data regenerate`"):
        encode(tiny_tokenizer(template), talk(dialogue("ok?", "Yes.")), 1000)


def test_templates_that_read_parts_get_parts() -> None:
    tokenizer = tiny_tokenizer(PARTS)
    assert draw(prompt_inputs(tokenizer, dialogue("Hi")).ids, tokenizer) == "Suser~HiE~Sassistant~"
    assert encode(tokenizer, talk(TWO_TURNS), 1000) == encode(tiny_tokenizer(), talk(TWO_TURNS), 1000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("''", "does not print the text of the user's message"),
        ("m['content'] | lower", "does not print the text of an answer"),
        ("m['content'] + 1", r"can only concatenate str .* \(TypeError\)"),
        ("1 // 0", r"by zero.* \(ZeroDivisionError\)"),
        ("m['content'] if m['role'] == 'user' else ''", "does not print the text of an answer"),
    ],
)
def test_templates_that_fail_or_lose_text_are_bad_lines(content: str, reason: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace("m['content']", content))
    file = tmp_path / "f.jsonl"
    file.write_text(json.dumps({"messages": TWO_TURNS}) + "\n")
    with pytest.raises(DataError, match=r"f\.jsonl:1: the chat template .*" + reason) as error:
        load_examples(file, tokenizer, 100)
    assert "\n" not in str(error.value)


SERVED = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "closed": CLOSED,
    "parts": PARTS,
    "qwen3": QWEN3,
    "no thinking": NO_THINKING,
}


@pytest.mark.parametrize("name", SERVED)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=4))
def test_exactly_the_answers_are_supervised_in_the_context_that_is_served(
    name: str, turns: list[tuple[int, int]]
) -> None:
    """Also if answers repeat each other, and users repeat answers or quote them with their markup."""
    tokenizer = tiny_tokenizer(SERVED[name])
    markup = "<|im_end|>\n<|im_start|>assistant\n"
    questions = ["ok?", "Yes.", f"say{markup}Yes.<|im_end|>", f"{markup}<think>\n\n</think>\n\nYes.", "N"]
    answers = ["Yes.", "No, never.", "N"]
    messages = dialogue(*[text for q, a in turns for text in (questions[q], answers[a])])
    spans = [span for example in encode(tokenizer, talk(messages), 9999) for span in answers_of(example, tokenizer)]
    expected = [(i, message["content"]) for i, message in enumerate(messages) if message["role"] == "assistant"]
    for (before, answer), (i, content) in zip(spans, expected, strict=True):
        assert answer == content + "E"
        served = prompt_inputs(tokenizer, messages[:i]).ids
        assert before[: len(served)] == served
        assert draw(before[len(served) :], tokenizer) in ("", "<think>~~</think>~~")


def answers_of(example: Example, tokenizer) -> list[tuple[list[int], str]]:
    """(tokens before it, drawing) of every answer: the token before a run of drafted ones is its first."""
    ids, drafted = example.inputs.ids, [*example.drafted, False]
    starts = [j for j in range(1, len(ids)) if drafted[j] and not drafted[j - 1]]
    ends = [drafted.index(False, j) for j in starts]
    return [(ids[: j - 1], draw(ids[j - 1 : end], tokenizer)) for j, end in zip(starts, ends)]


def test_what_a_template_refuses_is_a_bad_line() -> None:
    messages = [{"role": "system", "content": "s"}, *TWO_TURNS]
    with pytest.raises(DataError, match="no system role"):
        encode(tiny_tokenizer(GEMMA), talk(messages), 1000)


def test_a_tokenizer_without_template_says_so() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TargetError, match="no chat template"):
        prompt_inputs(tokenizer, TWO_TURNS[:1])


def test_load_examples_names_over_long_and_undraftable_lines(tmp_path: Path) -> None:
    lines = [
        {"messages": TWO_TURNS},
        {"messages": [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]},
        {"prompt_ids": [40], "response_ids": [2]},
    ]
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    reports: list[str] = []
    examples = load_examples(file, tiny_tokenizer(), 60, "skip", reports.append)
    assert len(examples) == 1
    assert [line.removeprefix(str(file)).split(" (")[0] for line in reports] == [
        ":2: too long: 122 tokens, more than the 60 allowed",
        ":3: nothing to draft: the answer is a single token",
    ]
    with pytest.raises(DataError, match=r"f\.jsonl:2: too long"):
        load_examples(file, tiny_tokenizer(), 60)
    with pytest.raises(DataError, match="no usable conversation"):
        load_examples(file, tiny_tokenizer(), 3, "skip")
