"""Files as people have them: every row arrives once and in order, or is named."""

import gzip
import io
import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsd.data import read_conversations
from vsd.data.sources import _split
from vsd.errors import DataError

ROWS = [
    {"id": str(i), "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
    for i in range(3)
]
LINES = [json.dumps(row).encode() for row in ROWS]
MESSAGES = [row["messages"] for row in ROWS]
quiet = pytest.mark.filterwarnings("ignore")  # of datasets


def read(path: Path, **options: Any) -> list[Any]:
    return [conversation.messages for conversation in read_conversations(path, **options)]


def fake_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's interface, over gzip."""
    maker = SimpleNamespace(decompressobj=lambda: zlib.decompressobj(31))
    monkeypatch.setitem(sys.modules, "zstandard", SimpleNamespace(ZstdDecompressor=lambda: maker))  # type: ignore[arg-type]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_files_with_marks_and_line_ends(
    end: bytes, mark: bytes, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_zstandard(monkeypatch)
    pack = gzip.compress if suffix else bytes
    lines, items = tmp_path / f"f.jsonl{suffix}", tmp_path / f"g.json{suffix}"
    lines.write_bytes(pack(mark + end.join(LINES[:1]) + end) + pack(end.join(LINES[1:])))  # two parts, as if appended
    items.write_bytes(pack(mark + b"[" + (b"," + end).join(LINES) + b"]"))
    assert read(lines) == read(items) == MESSAGES
    assert [c.where for c in read_conversations(items)] == [f"{items}:item {n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_is_an_error(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_zstandard(monkeypatch)
    file = tmp_path / f"f.jsonl{suffix}"
    file.write_bytes(gzip.compress(b"\n".join(LINES) + b"\n")[:-3])
    with pytest.raises(DataError, match="cannot be read after line"):
        read(file, on_bad_line="skip")


def test_zst_without_its_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)  # type: ignore[arg-type]
    (tmp_path / "f.jsonl.zst").touch()
    with pytest.raises(DataError, match="pip install zstandard"):
        read(tmp_path / "f.jsonl.zst")


@given(st.lists(st.binary(max_size=5).map(lambda piece: piece.replace(b"\x00", b"\n"))))
def test_lines_of_pieces_are_those_of_the_whole(pieces: list[bytes]) -> None:
    assert list(_split(pieces)) == list(io.BytesIO(b"".join(pieces)))


def test_half_a_line_at_the_end_is_named(tmp_path: Path) -> None:
    file, reports = tmp_path / "f.jsonl", list[str]()
    file.write_bytes(LINES[0] + b"\n" + LINES[1] + b"\n" + LINES[2][:-9])
    assert read(file, on_bad_line="skip", report=reports.append) == MESSAGES[:2]
    (report,) = reports
    assert report.startswith(f"{file}:3: not JSON") and report.endswith("the file ends within this line")


@pytest.mark.parametrize(
    ("text", "reason"), [('{"messages": []}', "expected a JSON list"), ("[1", "not JSON"), ('[{"a": 1}]', "item 1: no")]
)
def test_a_json_file_that_is_no_list_of_conversations(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        read(tmp_path / "f.json")


@quiet
def test_tables_and_a_saved_data_set(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    calling = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    rows = [{"id": "3", "messages": [ROWS[0]["messages"][0], calling], "tools": [{"name": "add", "b": None}]}, *ROWS]
    table = Dataset.from_list(rows)
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "saved")
    DatasetDict(train=table).save_to_disk(tmp_path / "splits")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    expected = [[ROWS[0]["messages"][0], {**calling, "content": ""}], *MESSAGES]
    for path in (tmp_path / "t.parquet", tmp_path / "saved", arrow, tmp_path / "splits" / "train"):
        found = list(read_conversations(path))
        assert [c.messages for c in found] == expected  # without the keys of other rows' messages
        assert [c.where for c in found] == [f"{path}:{n}" for n in (1, 2, 3, 4)]
        assert [c.arguments for c in found] == [{"tools": [{"name": "add"}]}, {}, {}, {}]
    with pytest.raises(DataError, match=r"several splits: give the folder of one"):
        read(tmp_path / "splits")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    for name, reason in (("bad.parquet", "bad.parquet: "), ("none.arrow", "no file at")):
        with pytest.raises(DataError, match=reason) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


@quiet
def test_a_folder_is_its_files_in_order_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    from datasets import Dataset

    reports: list[str] = []
    (tmp_path / "b.jsonl").write_bytes(LINES[1])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES[0]))
    Dataset.from_list([ROWS[2]]).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "b.jsonl.meta.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "README.md").write_text("text")
    assert read(tmp_path, report=reports.append) == MESSAGES
    assert [line.split(" file")[0] for line in reports] == [
        f"{tmp_path}/README.md: not a .jsonl, .json, .txt, .parquet or .arrow",
        f"{tmp_path}/more: a folder in a folder",
    ]
    (tmp_path / "b.jsonl").write_bytes(b"{}")
    with pytest.raises(DataError, match=r"b\.jsonl:1: no messages"):
        read(tmp_path, report=reports.append)
    with pytest.raises(DataError, match=r"p\.txt holds prompts without answers"):
        (tmp_path / "p.txt").write_text("Hi")
        read(tmp_path, on_bad_line="skip", report=reports.append)
