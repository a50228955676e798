"""Full disks, folders that cannot be written, and two processes on one output."""

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import case
from case import Case, Workshop
from vsd.data.records import RecordLog
from vsd.errors import ConfigurationError, FileError
from vsd.files import alone, new_folder, write_text, writing


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return case.build(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 192 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this process may not mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def commands(shop: Workshop, folder: Path) -> dict[str, list[str]]:
    """Commands that write below a folder."""
    few = ["--max-new-tokens", "4"]
    prompts = str(shop / "prompts.jsonl")
    return {
        "train": shop.train(folder / "run"),
        "regenerate": ["data", "regenerate", prompts, "--out", str(folder / "out.jsonl"), *shop.named, *few],
        "synthesize": ["data", "synthesize", "--out", str(folder / "out.jsonl"), *shop.named, "--conversations", "2"],
        "bench": ["bench", "--prompts", prompts, *shop.named, *few, "--json", str(folder / "a" / "b.json")],
        "import": ["import", str(shop / "eagle3"), str(folder / "out"), *shop.named],
        "export": ["export", "--format", "vllm", str(shop / "eagle3"), str(folder / "out"), *shop.named],
    }


NAMES = ["train", "regenerate", "synthesize", "bench", "import", "export"]


@pytest.mark.parametrize("name", ["train", "regenerate", "import", "export"])
def test_a_full_disk_is_one_line_and_the_command_goes_on_when_there_is_room(
    shop: Workshop, disk: Path, name: str
) -> None:
    ballast = disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - (8192 if name == "train" else 0))  # its recipe, and no checkpoint
    words = commands(shop, disk)[name]
    outcome = case.run(Case(words, case.refused("")))
    assert not case.refused("disk|[Ss]pace")(outcome), outcome
    assert not (disk / "out").exists() and not list(disk.glob(".out*"))
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    outcome = case.run(Case([*words, "--resume"] if name == "train" else words, case.refused("")))
    assert outcome.code == 0, outcome


@pytest.mark.parametrize("name", NAMES)
def test_a_path_below_a_file_is_named(shop: Workshop, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    outcome = case.run(Case(commands(shop, tmp_path / "file")[name], case.refused("")))
    assert not case.refused(f"{tmp_path}/file.*: (it is|a part)")(outcome), outcome
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["train", "regenerate", "bench", "export"])
def test_a_read_only_folder_is_named(shop: Workshop, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "fixed"
    folder.mkdir(mode=0o555)
    root = os.geteuid() == 0  # may write everywhere, but not on a read-only disk
    if root and subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this process may write everywhere")
    try:
        outcome = case.run(Case(commands(shop, folder)[name], case.refused("")))
        assert not case.refused(f"{folder}.*: check its permissions, or give another path")(outcome), outcome
        assert not list(folder.iterdir())
    finally:
        if root:
            subprocess.run(["umount", "-l", folder], check=True)


def test_two_runs_on_one_output_are_refused(shop: Workshop, tmp_path: Path) -> None:
    with alone(tmp_path / "run"):
        outcome = case.run(Case(commands(shop, tmp_path)["train"], case.refused("")))
        assert not case.refused("another run is writing to .*/run'")(outcome), outcome
        assert not list((tmp_path / "run").iterdir())
    with RecordLog(tmp_path / "out.jsonl", {}):
        for name in ("regenerate", "synthesize"):
            outcome = case.run(Case(commands(shop, tmp_path)[name], case.refused("")))
            assert not case.refused("another run is writing to .*out.jsonl")(outcome), outcome
    with alone(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    script = "import sys, pathlib, vsd.files as f\nwith f.alone(pathlib.Path(sys.argv[1])): print(1, flush=1); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline()
    with pytest.raises(ConfigurationError, match="another run is writing"), alone(tmp_path):
        pass
    process.kill()
    process.communicate()
    with alone(tmp_path):
        pass


def test_runs_that_share_a_store_compute_each_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_target: object
) -> None:
    import torch

    from vsd.features import store

    computed: list[int] = []
    ready = threading.Barrier(2)

    def compute() -> dict[str, torch.Tensor]:
        computed.append(1)
        return {"aux": torch.ones(3)}

    def write() -> None:
        ready.wait()
        store._write_shard(tmp_path / "features-00000.safetensors", compute)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1 and [p.name for p in tmp_path.iterdir()] == ["features-00000.safetensors"]


def test_files_and_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "first")
    with pytest.raises(KeyError), new_folder(tmp_path / "made") as half:
        (half / "x").write_text("x")
        raise KeyError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    with new_folder(tmp_path / "made") as half:
        (half / "x").write_text("x")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "x").read_text() == "x" and (tmp_path / "a" / "b.txt").read_text() == "first"
    with pytest.raises(FileError, match="it is not empty"), new_folder(tmp_path / "made"):
        pass


def test_a_file_that_may_not_grow_keeps_its_old_text(tmp_path: Path) -> None:
    """The limit of file sizes stands for a full disk where none can be mounted."""
    write_text(tmp_path / "a.txt", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(FileError, match="ulimit -f"):
            write_text(tmp_path / "a.txt", "new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_other_errors_pass() -> None:
    for error in (RuntimeError("mine"), ValueError("mine")):
        with pytest.raises(type(error), match="mine"), writing("x"):
            raise error
    with pytest.raises(FileError, match="No space left on device: 'x': free space"), writing("x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
