"""Lines of training text and of prompts that cannot be used, and files that cannot be read."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from case import Case, Outcome, Rule, Workshop, refused

Damage = Callable[[Workshop, Random], Any]  # a row, or the bytes of a line
Change = Callable[[list[int], Random], Any]

WORDS = ["why", "is the sky", "so blue", "a b", "tell me", "nothing", "well"]
ANSWER = [{"role": "assistant", "content": "fine, thanks"}]
CALLS = [7, [7], [{}], [{"function": {"name": "f", "arguments": "{"}}], [{"name": ""}]]
OTHERS: list[Any] = [{}, "hi", 3, [], [[]], [None], [7], True]
OWN = ["tokenize", "conversation", "chat_template", "return_dict", "return_tensors", "padding", "truncation"]
OWN += ["continue_final_message", "return_assistant_tokens_mask", "add_generation_prompt", "tokenizer_kwargs", "tools"]


def text(random: Random) -> str:
    """A few words."""
    return " ".join(random.choices(WORDS, k=random.randint(1, 4)))


def chat(random: Random, *roles: str) -> dict[str, Any]:
    """A conversation with the keys of OpenAI or of ShareGPT."""
    roles = roles or random.choice([("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2])
    if random.random() < 0.5:
        return {"messages": [{"role": role, "content": text(random)} for role in roles]}
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names.get(role, role), "value": text(random)} for role in roles]}


def exact(shop: Workshop, random: Random) -> dict[str, Any]:
    """A row with the target's own tokens."""
    row: dict[str, Any] = json.loads(random.choice((shop / "text.jsonl").read_text().splitlines()))
    return row


def one_of(*values: Any) -> Damage:
    """One of these rows or lines."""
    return lambda shop, random: random.choice(values)


def with_(part: str, *values: Any) -> Damage:
    """A conversation with one of these values as the "role" or "content" of a message."""

    def damage(shop: Workshop, random: Random) -> Any:
        row = chat(random)
        ((key, messages),) = row.items()
        name = part if key == "messages" else {"role": "from", "content": "value"}[part]
        random.choice(messages)[name] = random.choice(values)
        return row

    return damage


def with_ids(key: str, change: Change) -> Damage:
    """A row of tokens with changed ones."""

    def damage(shop: Workshop, random: Random) -> Any:
        row = exact(shop, random)
        return {**row, key: change(list(row[key]), random)}

    return damage


def among(*values: Any) -> Change:
    """Token ids with one of these among them."""

    def change(ids: list[int], random: Random) -> list[Any]:
        ids[random.randrange(len(ids))] = random.choice(values)
        return ids

    return change


def beside(**values: list[Any]) -> Damage:
    """A conversation with another key beside it."""

    def damage(shop: Workshop, random: Random) -> Any:
        key = random.choice(list(values))
        return {**chat(random), key: random.choice(values[key])}

    return damage


def cut(shop: Workshop, random: Random) -> bytes:
    """The beginning of a line."""
    line = json.dumps(chat(random)).encode()
    return line[: random.randrange(1, len(line))]


def garbled(shop: Workshop, random: Random) -> bytes:
    """Not UTF-8."""
    line = json.dumps(chat(random)).encode()
    place = random.randrange(len(line))
    return line[:place] + random.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80"]) + line[place:]


def without(shop: Workshop, random: Random) -> Any:
    """A key is missing, or has another name."""
    row = chat(random)
    ((key, messages),) = row.items()
    if random.random() < 0.5:
        return {key + "s": messages}
    message = random.choice(messages)
    message.pop(random.choice(list(message)))
    return row


LINES: dict[str, Damage] = {
    "cut": cut,
    "not UTF-8": garbled,
    "empty line": one_of(b"", b"  "),
    "another kind": one_of([], ["a"], 7, "text", None, True, 1.5, {}),
    "not JSON": one_of(b"{'a': 1}", b"{} {}", b"user: hi", b"\x00\x01", b"<html>"),
    "too deep": one_of(b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a number of 5000 digits": one_of(b'{"prompt": ' + b"1" * 5000 + b"}"),
    "a key is missing": without,
    "messages of another kind": one_of(*({key: value} for key in ("messages", "turns") for value in OTHERS)),
    "content of another kind": with_("content", 7, {"text": "a"}, True, 1.5),
    "parts": with_("content", [{"type": "image"}], [{"type": "text", "text": "a"}] * 2, [{}], ["a"], [None]),
    "parts of another kind": with_("content", [{"type": "text", "text": 7}], [{"type": "text"}]),
    "empty content": with_("content", "", "  \n", None, []),
    "half a surrogate pair": with_("content", "a\ud800b", "\udfff"),
    "unknown role": with_("role", "narrator", "", None, 3, ["user"], {"a": 1}),
    "wrong order": lambda shop, random: chat(random, *random.choice([("assistant", "user"), ("assistant",)])),
    "negative token": with_ids("prompt_ids", among(-1, -(2**40))),
    "token of another kind": with_ids("prompt_ids", among(1.5, True, None, "7", [1])),
    "no tokens": with_ids("prompt_ids", lambda ids, random: random.choice([[], "abc", 7, {"a": 1}])),
}
OF_ANSWERS: dict[str, Damage] = {  # wrong in training text alone
    "no answer": one_of({"prompt": "hi"}, {"turns": ["a", "b"]}, {"messages": [{"role": "user", "content": "a"}]}),
    "no answer at the end": lambda shop, random: chat(random, "user", "assistant", "user"),
    "two answers": lambda shop, random: chat(random, "user", "assistant", "assistant"),
    "too long": one_of({"messages": [{"role": "user", "content": "x" * 600}, *ANSWER]}),
    "a token of another target": with_ids("prompt_ids", among(128, 5000, 2**70)),
    "an answer of no tokens": with_ids("response_ids", lambda ids, random: random.choice([[], None])),
    "an answer of one token": with_ids("response_ids", lambda ids, random: ids[:1]),
    "an answer's token of another kind": with_ids("response_ids", among(1.5, True, None, "7", -3)),
    "an answer's token of another target": with_ids("response_ids", among(10**9, 2**70)),
    "ids that do not spell the answer": lambda shop, random: {
        **exact(shop, random),
        "messages": [{"role": "user", "content": "hi"}, *ANSWER],
    },
    "template arguments": beside(chat_template_kwargs=[7, "x", [1], True]),
    "the rendering's own arguments": beside(
        chat_template_kwargs=[{name: value} for name in OWN for value in (True, "x", 7, {"a": 1})]
    ),
    "tools": beside(tools=["{", 7, ["a"], {"a": 1}, [{"name": "f"}], "[" * 100_000]),
    "tool calls": one_of(
        *({"messages": [{"role": "user", "content": "hi"}, {**ANSWER[0], "tool_calls": calls}]} for calls in CALLS)
    ),
    "reasoning": one_of(
        *(
            {"messages": [{"role": "user", "content": "hi"}, {**ANSWER[0], "reasoning_content": value}]}
            for value in (7, ["a"], {"a": 1}, "not printed")
        )
    ),
}


def training(shop: Workshop, file: Path, folder: Path, random: Random) -> list[str]:
    """The command that reads training text."""
    return shop.train(folder / "run", "max_length=512", data=file)


def prompting(shop: Workshop, file: Path, folder: Path, random: Random) -> list[str]:
    """A command that reads prompts."""
    bench, tune = (
        ["bench", "--prompts", str(file)],
        ["tune", "--drafter", str(shop / "drafter"), "--prompts", str(file)],
    )
    words = random.choice([bench, tune, ["data", "regenerate", str(file), "--out", str(folder / "out.jsonl")]])
    return [*words, *shop.named, "--max-new-tokens", "4"]


def written(damage: Damage, shop: Workshop, folder: Path, random: Random) -> tuple[Path, int, int]:
    """A file with one bad line, the number of this line, and the number of good ones."""
    rows: list[Any] = [chat(random) for _ in range(random.randint(2, 6))]
    place = random.randint(0, len(rows))
    lines = [*rows[:place], damage(shop, random), *rows[place:]]
    ends, packed = random.choice([b"\n", b"\r\n"]), random.random() < 0.3
    whole = b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + ends for x in lines)
    file = folder / ("bad.jsonl.gz" if packed else "bad.jsonl")
    file.write_bytes(gzip.compress(whole) if packed else whole)
    return file, place + 1, len(rows)


def fatal(damage: Damage, command: Callable[[Workshop, Path, Path, Random], list[str]]) -> Rule:
    """The line is named by its number."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        file, line, _ = written(damage, shop, folder, random)
        return Case(command(shop, file, folder, random), refused(rf"{re.escape(str(file))}:{line}: \S"))

    return rule


def skipped(damage: Damage) -> Rule:
    """`vsd data check` reports the line by its number, and counts all others."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        file, line, good = written(damage, shop, folder, random)

        def wrong(found: Outcome) -> str:
            reports = found.err.splitlines()
            if found.code != 0 or len(reports) != 1 or not reports[0].startswith(f"vsd: skipped {file}:{line}: "):
                return f"status {found.code}, not skipped: {found.err}"
            counted = re.search(rf"^conversations +{good}, 1 skipped$", found.out, re.M)
            return "" if counted else f"{good} good lines: {found.out[:100]}"

        return Case(["data", "check", str(file), *shop.named, "--max-length", "512"], wrong)

    return rule


def prompts_skipped(damage: Damage) -> Rule:
    """`vsd data regenerate` with --on-bad-line skip reports the line, and answers all others."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        file, line, good = written(damage, shop, folder, random)
        out = folder / "out.jsonl"

        def wrong(found: Outcome) -> str:
            reports = [report for report in found.err.splitlines() if "' is empty" not in report]
            if found.code != 0 or len(reports) != 1 or not reports[0].startswith(f"vsd: skipped {file}:{line}: "):
                return f"status {found.code}, not skipped: {found.err}"
            answered = {json.loads(row)["id"].partition("/")[0] for row in out.read_text().splitlines()}
            empty = {report for report in found.err.splitlines() if "/0' is empty" in report}
            return "" if len(answered) + len(empty) == good else f"{good} good lines: {sorted(answered)}"

        words = ["data", "regenerate", str(file), "--out", str(out), *shop.named, "--max-new-tokens", "6"]
        return Case([*words, "--on-bad-line", "skip"], wrong)

    return rule


ROWS = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well then"}]}\n' * 40
FILES: dict[str, tuple[str, bytes]] = {
    "no suffix": ("text", ROWS),
    "an unknown suffix": ("text.csv", ROWS),
    "empty": ("text.jsonl", b""),
    "a mark alone": ("text.jsonl", b"\xef\xbb\xbf"),
    "not gzip": ("text.jsonl.gz", ROWS),
    "gzip of nothing": ("text.jsonl.gz", gzip.compress(b"")),
    "half of a gzip file": ("text.jsonl.gz", gzip.compress(ROWS)[:-12]),
    "a damaged gzip file": ("text.jsonl.gz", gzip.compress(ROWS)[:12] + b"xxxx" + gzip.compress(ROWS)[16:]),
    "not zstandard": ("text.jsonl.zst", ROWS),
    "not Parquet": ("text.parquet", ROWS),
    "empty Parquet": ("text.parquet", b""),
    "not Arrow": ("text.arrow", ROWS),
    "JSON lines in a .json file": ("text.json", ROWS),
    "an object in a .json file": ("text.json", b'{"messages": []}'),
    "an empty list": ("text.json", b"[]"),
    "half of a list": ("text.json", b"[" + ROWS),
    "UTF-16": ("text.jsonl", ROWS.decode().encode("utf-16")),
    "two\nlines": ("no\nfile.jsonl", b""),
}


def file_rule(name: str) -> Rule:
    """A file that is no text at all, in either kind of command; it is named."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        file = folder / FILES[name][0]
        file.write_bytes(FILES[name][1])
        words = random.choice([training, prompting])(shop, file, folder, random)
        return Case(words, refused(re.escape(" ".join(str(file).split()))))

    return rule


def folder_rule(name: str, *files: str) -> Rule:
    """A folder without text."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        source = folder / "texts"
        for file in files:
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_text("{}")
        words = random.choice([training, prompting])(shop, source, folder, random)
        return Case(words, refused(re.escape(str(source))))

    return rule


FOLDERS = {
    "not there": (),
    "of other files": ("a.csv", "notes.md"),
    "of folders": ("inner/a.jsonl",),
    "of splits": ("dataset_dict.json",),
    "of a set without tables": ("state.json", "dataset_info.json"),
}
RULES: dict[str, Rule] = {
    **{f"line: {name}": fatal(damage, training) for name, damage in {**LINES, **OF_ANSWERS}.items()},
    **{f"line skipped: {name}": skipped(damage) for name, damage in {**LINES, **OF_ANSWERS}.items()},
    **{f"prompt: {name}": fatal(damage, prompting) for name, damage in LINES.items()},
    **{f"prompt skipped: {name}": prompts_skipped(damage) for name, damage in LINES.items()},
    **{f"file: {name}": file_rule(name) for name in FILES},
    **{f"folder: {name}": folder_rule(name, *files) for name, files in FOLDERS.items()},
}
