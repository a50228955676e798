"""Generation, regeneration and synthesis: right tokens, and files that a killed run leaves usable."""

import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import warm
from tiny import tiny_target as build_target
from vsd.data import (
    Conversation,
    Summary,
    TargetTeacher,
    encode,
    generate_answers,
    generate_batch,
    load_examples,
    prompt_inputs,
    regenerate,
)
from vsd.data import synthesize as make
from vsd.data.records import RecordLog
from vsd.data.synthesize import user_opening
from vsd.errors import ConfigurationError, DataError, MismatchError, TargetError
from vsd.targets.inputs import Inputs
from vsd.targets.target import Target

REGENERATE = {"max_new_tokens": 12, "temperature": 1.0, "batch_size": 4, "progress": False}
SYNTHESIZE = {"max_new_tokens": 8, "temperature": 1.0, "batch_size": 8, "progress": False}


TURNS = sys.modules["vsd.data.synthesize"]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target that ends most turns within a few tokens, and others are cut: synthesis needs few passes."""
    monkeypatch.setattr(TURNS, "_MAX_TURN_TOKENS", 32)
    return brief_target()


def brief_target() -> Target:
    target = build_target()
    target.model.lm_head.weight.data[target.tokenizer.eos_token_id, 0] = 3.0
    return target


def answer(target: Target, given: list[Conversation], out: Path, batch_size: int = 64, **options) -> Summary:
    return regenerate(TargetTeacher(target, batch_size), given, out, **options)


def prompts_of(target: Target, count: int) -> list[Inputs]:
    words = ["hi", "what is this", "name a city", "why", "tell me a story"]
    texts = [f"{words[i % 5]} {i}" for i in range(count)]
    return [prompt_inputs(target.tokenizer, [{"role": "user", "content": t}]) for t in texts]


def chats(count: int) -> list[Conversation]:
    """Conversations of one, two and three user turns."""
    turns = [[f"question {i}.{t}" * (i % 3 + 1) for t in range(i % 3 + 1)] for i in range(count)]
    return [
        Conversation(f"c{i}", f"f.jsonl:{i + 1}", [{"role": "user", "content": t} for t in texts])
        for i, texts in enumerate(turns)
    ]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_greedy_batches_equal_transformers_generate(tiny_target: Target) -> None:
    prompts = prompts_of(tiny_target, 7)
    found = dict(p for b in generate_answers(tiny_target, prompts, max_new_tokens=30, batch_size=3) for p in b)
    greedy = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=2, pad_token_id=2)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        whole = tiny_target.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        assert found[i].ids == whole[0, len(prompt.ids) :].tolist()


def test_answers_end_at_the_first_stop_token(tiny_target: Target) -> None:
    answers = generate_batch(tiny_target, prompts_of(tiny_target, 40), max_new_tokens=40, temperature=1.0, seed=0)
    stopped = [a for a in answers if a.finish == "stop"]
    assert 0 < len(stopped) < 40
    assert all(a.ids[-1] == 2 and 2 not in a.ids[:-1] for a in stopped)
    assert all(len(a.ids) == 40 and 2 not in a.ids for a in answers if a.finish == "length")


def test_rows_that_leave_do_not_disturb_the_others(tiny_target: Target) -> None:
    """Sampled tokens have the likelihoods that the model gives them when it reads the whole answer again."""
    prompts = prompts_of(tiny_target, 24)
    answers = generate_batch(tiny_target, prompts, max_new_tokens=40, temperature=0.01, seed=0)
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt.ids + answer.ids])
        logits = tiny_target.model(ids).logits[0, len(prompt.ids) - 1 : -1]
        chosen = logits.gather(1, ids[0, len(prompt.ids) :, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 0.3  # at temperature 0.01 a gap of 0.3 has odds e^-30


def test_records_hold_what_training_needs(tiny_target: Target, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    summary = answer(tiny_target, chats(7), out, **REGENERATE)
    found = records(out)
    assert summary.written == len(found)
    assert summary.tokens == sum(len(r["response_ids"]) for r in found)
    assert len({r["id"] for r in found}) == len(found)
    assert summary.written + summary.skipped == sum(i % 3 + 1 for i in range(7))
    by_id = {r["id"]: r for r in found}
    for r in found:
        assert r["prompt_ids"] == prompt_inputs(tiny_target.tokenizer, r["messages"][:-1]).ids
        chat, turn = r["id"].split("/")
        if int(turn):
            assert r["messages"][:-2] == by_id[f"{chat}/{int(turn) - 1}"]["messages"]
    examples = load_examples(out, tiny_target.tokenizer, 1000)
    assert sum(sum(e.drafted) for e in examples) == summary.tokens - len(found)


def test_exact_prompts_are_answered_as_they_are(tiny_target: Target, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (prompt,) = prompts_of(tiny_target, 1)
    ids = prompt.ids
    answer(tiny_target, [Conversation("x", "f:1", [], ids, [5])], out, progress=False, max_new_tokens=8)
    (record,) = records(out)
    assert record["prompt_ids"] == ids
    assert "messages" not in record
    assert encode(tiny_target.tokenizer, Conversation("x", "f:1", [], ids, record["response_ids"]), 99)


def test_stopped_after_any_batch_and_resumed_equals_straight(
    tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, out = tmp_path / "straight.jsonl", tmp_path / "out.jsonl"
    expected = answer(tiny_target, chats(9), straight, **REGENERATE)
    append, calls = RecordLog.append, []

    def killed(self: RecordLog, batch: list) -> None:
        calls.append(1)
        append(self, batch if len(calls) % 2 else batch[:2])  # every other time, killed within the batch
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordLog, "append", killed)
        for _attempt in range(3):
            with pytest.raises(KeyboardInterrupt):
                answer(tiny_target, chats(9), out, **REGENERATE)
            with out.open("ab") as file:
                file.write(b'{"id": "c1/0", "mess')  # a torn line
    assert answer(tiny_target, chats(9), out, **REGENERATE) == expected
    assert out.read_bytes() == straight.read_bytes()
    assert answer(tiny_target, chats(9), out, **REGENERATE) == expected
    assert out.read_bytes() == straight.read_bytes()


def write_both(folder: Path) -> None:
    """In a process of its own."""
    vars(TURNS)["_MAX_TURN_TOKENS"] = 32
    target = brief_target()
    answer(target, chats(40), folder / "regenerated.jsonl", **REGENERATE)
    make(target, folder / "synthesized.jsonl", conversations=40, **SYNTHESIZE)


def test_sigkill_at_a_random_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    straight, killed, moments = tmp_path / "straight", tmp_path / "killed", random.Random(0)
    warm.start(write_both, straight, log=tmp_path / "log").join()
    for name in ("regenerated.jsonl", "synthesized.jsonl"):
        out = killed / name
        child = warm.start(write_both, killed, log=tmp_path / "log")
        while child.is_alive() and (not out.exists() or out.stat().st_size == 0):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL and out.stat().st_size > 0
    warm.start(write_both, killed, log=tmp_path / "log").join()
    for name in ("regenerated.jsonl", "synthesized.jsonl"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()


def test_other_settings_are_refused_by_name(tiny_target: Target, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answer(tiny_target, chats(3), out, **REGENERATE)
    before = out.read_bytes()
    for change, reason in (
        ({"temperature": 0.5}, "temperature was 1.0, is 0.5"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"max_new_tokens": 9}, "max_new_tokens was 12, is 9"),
    ):
        with pytest.raises(MismatchError, match=f"{reason}.*use another --out"):
            answer(tiny_target, chats(3), out, **{**REGENERATE, **change})
    with pytest.raises(MismatchError, match="prompts was"):
        answer(tiny_target, chats(4), out, **REGENERATE)
    with pytest.raises(MismatchError, match="target was"):
        answer(build_target(seed=1), chats(3), out, **REGENERATE)
    with pytest.raises(MismatchError, match="kind was regenerate, is synthesize"):
        make(tiny_target, out, conversations=1, **SYNTHESIZE)
    assert out.read_bytes() == before


def test_outputs_that_cannot_be_resumed(tiny_target: Target, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with RecordLog(out, {}), pytest.raises(ConfigurationError, match="another run is writing"):
        RecordLog(out, {})
    out.write_text("precious\n")
    (tmp_path / "out.jsonl.meta.json").unlink()
    with pytest.raises(MismatchError, match="cannot be resumed: use another --out"):
        RecordLog(out, {})
    (tmp_path / "out.jsonl.meta.json").write_text("{}")
    out.write_text('damaged\n{"id": "a"}\n')
    with pytest.raises(DataError, match=r"out\.jsonl:1: damaged line"):
        RecordLog(out, {})


def test_prompts_that_do_not_fit(tiny_target: Target, tmp_path: Path) -> None:
    long = Conversation("long", "f.jsonl:9", [{"role": "user", "content": "x" * 400}])
    reports: list[str] = []
    options = {**REGENERATE, "max_length": 100}
    with pytest.raises(DataError, match=r"f\.jsonl:9: too long"):
        answer(tiny_target, [long], tmp_path / "a.jsonl", **options)
    summary = answer(
        tiny_target,
        [*chats(3), long],
        tmp_path / "b.jsonl",
        on_bad_line="skip",
        report=reports.append,
        **options,
    )
    assert summary.skipped >= 2  # the long one, and the third chat's last turns
    assert any(line.startswith("f.jsonl:9: too long") for line in reports)
    assert any(line.startswith("f.jsonl:3: ends before 'c2/") for line in reports)
    assert all(len(r["prompt_ids"] + r["response_ids"]) <= 100 for r in records(tmp_path / "b.jsonl"))


def test_a_later_prompt_that_the_template_refuses_ends_its_chat(tmp_path: Path) -> None:
    target, reports = build_target(), list[str]()
    refusal = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
    target.tokenizer.chat_template = refusal + target.tokenizer.chat_template
    summary = answer(target, chats(3), tmp_path / "out.jsonl", report=reports.append, **REGENERATE)
    assert (summary.written, summary.skipped) == (3, 3)
    assert [line.split(" (")[0] for line in reports] == [
        "f.jsonl:2: ends before 'c1/1': the chat template refuses it: one turn only",
        "f.jsonl:3: ends before 'c2/1': the chat template refuses it: one turn only",
    ]


def test_a_batch_holds_something(tiny_target: Target, tmp_path: Path) -> None:
    for size in (0, -1):
        with pytest.raises(ConfigurationError, match=f"batch size must be at least 1, not {size}"):
            answer(tiny_target, chats(1), tmp_path / "out.jsonl", batch_size=size, progress=False)


def test_repeated_ids_are_told_apart(tiny_target: Target, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answer(tiny_target, [chats(1)[0], chats(1)[0]], out, **{**REGENERATE, "temperature": 0.0})
    assert [r["id"] for r in records(out)] == ["c0/0", "c0~2/0"]


def test_synthesis_is_determined_by_its_settings(brief: Target, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    summary = make(brief, a, conversations=12, **SYNTHESIZE)
    assert summary.written == len(records(a)) == 12
    make(brief, b, conversations=12, **SYNTHESIZE)
    assert a.read_bytes() == b.read_bytes()
    make(brief, c, conversations=12, seed=1, **SYNTHESIZE)
    assert a.read_bytes() != c.read_bytes()
    asked = [r["messages"][0]["content"] for r in records(a)]
    assert len(set(asked)) == 12
    assert not any(token in text for text in asked for token in brief.tokenizer.all_special_tokens)
    assert len(load_examples(a, brief.tokenizer, 1000)) == 12


def test_synthesis_goes_on_where_it_stopped(brief: Target, tmp_path: Path) -> None:
    short, out = tmp_path / "short.jsonl", tmp_path / "out.jsonl"
    greedy = {**SYNTHESIZE, "temperature": 0.0}
    make(brief, short, conversations=15, **greedy)
    for count in (3, 4, 15):
        make(brief, out, conversations=count, **greedy)
        assert len(records(out)) == count
    assert out.read_bytes() == short.read_bytes()
    enough = make(brief, out, tokens=200, **greedy)
    assert enough.tokens >= 200
    assert enough.written == len({r["id"] for r in records(out)}) == len(records(out))


def test_synthesis_needs_an_end_and_a_template_that_shows_the_user(tiny_target: Target, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs an end"):
        make(tiny_target, tmp_path / "a.jsonl")
    shouting = build_target()
    shouting.tokenizer.chat_template = "{{ messages[0]['content'] | lower }}"
    with pytest.raises(DataError, match="does not print"):
        make(shouting, tmp_path / "a.jsonl", conversations=1)


def test_the_opening_is_the_template_up_to_the_users_words(tiny_target: Target) -> None:
    opening = user_opening(tiny_target)
    assert tiny_target.tokenizer.decode(opening.ids) == "<|im_start|>user\n"
    assert opening.stop_ids == {2}
    mistral = build_target()
    mistral.tokenizer.chat_template = "{{ '<s>[INST] ' + messages[0]['content'] + ' [/INST]' }}"
    opening = user_opening(mistral)
    assert mistral.tokenizer.decode(opening.ids) == "<s>[INST]"
    assert opening.stop_ids == {2, mistral.tokenizer.convert_tokens_to_ids("[/INST]")}


def test_a_target_that_never_ends_a_turn(tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vsd.data.synthesize"], "_MAX_TURN_TOKENS", 4)
    with pytest.raises(TargetError, match="no usable user turn"):
        make(
            tiny_target,
            tmp_path / "a.jsonl",
            conversations=1,
            prompt_temperature=1e-4,
            batch_size=1,
            progress=False,
        )
