"""Training sequences as arrays; text that is encoded once and mapped from the cache directory."""

import json
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_server import INFO
from vsd.data import Example, Examples, blocks, load_examples, tokenized, training_text
from vsd.errors import DataError
from vsd.targets import Inputs

TOKEN = st.tuples(st.integers(0, 99), st.booleans())
TEXTS = st.lists(st.lists(TOKEN, min_size=1, max_size=9), min_size=1, max_size=7)


def example(pairs: list[tuple[int, bool]]) -> Example:
    return Example(Inputs([token for token, _ in pairs]), [drafted for _, drafted in pairs])


@given(TEXTS, st.data())
def test_arrays_hold_what_lists_do(texts: list[list[tuple[int, bool]]], data: st.DataObject) -> None:
    wanted = [example(text) for text in texts]
    found = Examples.of(wanted)
    assert list(found) == wanted
    chosen = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=9))
    some, wanted = found.chosen(chosen), [wanted[i] for i in chosen]
    assert list(some) == wanted
    assert list(some[1:3]) == wanted[1:3]
    assert some.lengths.tolist() == [len(e.drafted) for e in wanted]
    assert some.drafted_lengths.tolist() == [sum(e.drafted) for e in wanted]
    drafted = [token for i in chosen for token, is_drafted in texts[i] if is_drafted]
    assert some.drafted_counts(100).tolist() == [drafted.count(token) for token in range(100)]


@given(TEXTS, TEXTS)
def test_the_digest_tells_texts_apart(a: list[list[tuple[int, bool]]], b: list[list[tuple[int, bool]]]) -> None:
    first, second = (Examples.of(map(example, texts)) for texts in (a, b))
    assert (first.digest == second.digest) == (a == b)


def row(number: int, answer: str = "so it is") -> str:
    messages = [{"role": "user", "content": f"why {number}"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of text; every text counts as large, and threads take the place of processes."""
    monkeypatch.setenv("VSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenized, "_SMALL", 0)
    monkeypatch.setattr(
        blocks, "ProcessPoolExecutor", lambda cores, context, *begin: ThreadPoolExecutor(cores, "", *begin)
    )
    return tmp_path / "cache" / "text"


def text(folder: Path, *rows: str) -> Path:
    file = folder / "text.jsonl"
    file.write_text("".join(rows))
    return file


def test_a_large_text_is_the_same_text(cache: Path, tmp_path: Path) -> None:
    """Several blocks and two sources, in order, as one process reads them."""
    file = text(tmp_path, *(row(i, f"because {'very ' * (i % 7)}true") for i in range(700)))
    wanted = [*load_examples(file, INFO.tokenizer, 512)] * 2
    assert list(training_text([file, file], INFO, 512)) == wanted


def test_a_text_is_encoded_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped lines are reported again; another file, another limit and another template are other texts."""
    file, lines = text(tmp_path, row(1), "{\n", row(2, "x" * 60), row(3)), list[str]()
    first = training_text([file], INFO, 60, "skip", lines.append)
    (folder,) = cache.iterdir()
    monkeypatch.setattr(tokenized, "blocks_of", lambda *args: pytest.fail("encoded again"))
    assert list(training_text([file], INFO, 60, "skip", lines.append)) == list(first)
    assert lines[2:] == lines[:2]
    assert [line.partition(": ")[2][:8] for line in lines[:2]] == ["not JSON", "too long"]
    for other in (lambda: training_text([file], INFO, 61, "skip"), lambda: training_text([file, file], INFO, 60)):
        with pytest.raises(pytest.fail.Exception):
            other()
    file.write_text(file.read_text() + row(4))
    with pytest.raises(pytest.fail.Exception):
        training_text([file], INFO, 60, "skip")
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_a_fatal_line_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text\.jsonl:2: not JSON"):
        training_text([text(tmp_path, row(1), "{\n")], INFO, 60)
    with pytest.raises(DataError, match="no usable conversation"):
        training_text([text(tmp_path, "{\n")], INFO, 60, "skip")
    assert [path.suffix for path in cache.iterdir()] == [".lock", ".lock"]


def test_the_rest_of_a_killed_process_is_replaced(cache: Path, tmp_path: Path) -> None:
    file = text(tmp_path, row(1), row(2))
    wanted = list(training_text([file], INFO, 60))
    (folder,) = cache.iterdir()
    rest = folder.rename(cache / f"{folder.name}.{platform.node()}.part")
    (rest / "ids").write_bytes(b"")
    (rest / tokenized._META).unlink()
    assert list(training_text([file], INFO, 60)) == wanted
    assert list(cache.iterdir()) == [folder]


def test_of_two_processes_one_encodes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write, written = text(tmp_path, *map(row, range(600))), tokenized._write, list[Path]()

    def counted(folder: Path, *args: object) -> None:
        written.append(folder)
        write(folder, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenized, "_write", counted)
    found: list[Examples] = []
    both = [Thread(target=lambda: found.append(training_text([file], INFO, 60))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(written) == 1 and [len(examples) for examples in found] == [600, 600]


def test_a_process_encodes_as_this_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "cores", lambda: 1)
    file = text(tmp_path, *map(row, range(300)), "{\n", *map(row, range(300)), "[\n")
    found = list(blocks.blocks_of(file, INFO.tokenizer, 60, "skip"))
    assert [e for block in found for e in block.examples] == list(load_examples(file, INFO.tokenizer, 60, "skip", str))
    assert [line.split(": ")[0].rpartition(":")[2] for block in found for line in block.skipped] == ["301", "602"]


def test_turns_of_a_conversation_draws_and_duplicates_have_one_opening(tmp_path: Path) -> None:
    """As `vsd data regenerate` writes them: one line for each turn and draw."""

    def line(*texts: str) -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return json.dumps({"messages": messages}) + "\n"

    lines = line("hi", "yo"), line("hi", "yo", "so", "it is"), line("hi", "you"), line("hi", "yo"), line("hi you", "yo")
    *same, other = training_text([text(tmp_path, *lines)], INFO, 512).openings.tolist()
    assert len(set(same)) == 1 and other != same[0]
    ids = [json.dumps({"prompt_ids": [1, n], "response_ids": [2, 3, 4]}) + "\n" for n in (5, 5, 6)]
    first, second, third = training_text([text(tmp_path, *ids)], INFO, 512).openings.tolist()
    assert first == second != third
