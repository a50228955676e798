"""Files of other hands run no code, write nowhere else, and no command listens."""

import json
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import case
from case import Case, Workshop

CODE = "import pathlib; pathlib.Path({!r}).write_text('ran')"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return case.build(tmp_path_factory.mktemp("workshop"))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return exec, (CODE.format(str(self.mark)),)


def outcome(words: list[str]) -> case.Outcome:
    return case.run(Case(words, case.refused("")))


@pytest.mark.parametrize("name", ["drafter", "eagle3", "lm", "target"])
def test_pickled_weights_are_not_read(shop: Workshop, tmp_path: Path, name: str) -> None:
    folder, mark = tmp_path / name, tmp_path / "ran"
    shutil.copytree(shop / name, folder)
    (folder / "model.safetensors").unlink()
    for file in ("pytorch_model.bin", "model.bin", "training_args.bin", "model.pt", "mask_embedding.pt"):
        torch.save({"fc.weight": Evil(mark)}, folder / file)
    (folder / "model.pkl").write_bytes(pickle.dumps(Evil(mark)))
    words = ["generate", "hi", "--max-new-tokens", "4"]
    words += ["--target", str(folder)] if name == "target" else [*shop.named, "--drafter", str(folder)]
    found = outcome(words)
    assert not case.refused(str(folder))(found), found
    assert not mark.exists()


def test_a_checkpoint_that_is_resumed_runs_no_code(shop: Workshop, tmp_path: Path) -> None:
    out, mark = tmp_path / "run", tmp_path / "ran"
    words = shop.train(out, "max_steps=2", "save_strategy=steps", "save_steps=1")
    assert outcome(words).code == 0
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Evil(mark), out / "checkpoint-2" / file)
    found = outcome([*words, "--resume"])
    assert not mark.exists() and found.code == 1, found


@pytest.mark.parametrize("name", ["lm", "target", "eagle3"])
def test_code_beside_a_model_is_not_run(shop: Workshop, tmp_path: Path, name: str) -> None:
    folder, mark = tmp_path / name, tmp_path / "ran"
    shutil.copytree(shop / name, folder)
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
    (folder / "evil.py").write_text(CODE.format(str(mark)) + "\nclass Config: pass\nclass Model: pass\n")
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).exists():
            found = json.loads((folder / file).read_text())
            tokenizer = {"AutoTokenizer": ["evil.Config", "evil.Config"]}
            (folder / file).write_text(json.dumps({**found, "auto_map": {**classes, **tokenizer}}))
    words = ["generate", "hi", "--max-new-tokens", "4"]
    words += ["--target", str(folder), "--dtype", "float32"] if name == "target" else [*shop.named]
    outcome([*words, *([] if name == "target" else ["--drafter", str(folder)])])
    outcome(["export", "--format", "vllm", str(folder), str(tmp_path / "out"), *shop.named])
    assert not mark.exists()


def test_a_recipe_imports_and_makes_nothing(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are looked at by a library that can make objects of classes that are named."""
    mark = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(CODE.format(str(mark)) + "\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    value = "{class_path: evil_module.Evil, init_args: {}}"
    for setting in (f"drafter_options={value}", f"drafter_options={{a: {value}}}", f"objective_options={{a: {value}}}"):
        outcome(shop.train(tmp_path / "run", setting))
    assert not mark.exists()


def test_names_with_dots_stay_in_the_output_folder(shop: Workshop, tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    rows = [{"id": name, "prompt": "hi"} for name in ("../../x", "/tmp/vsd-evil/x", "..", "a/../../../y")]
    (inside / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = inside / "target"
    shutil.copytree(shop / "target", target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    template = (target / "chat_template.jinja").read_text() if (target / "chat_template.jinja").exists() else ""
    templates = [{"name": n, "template": template or config["chat_template"]} for n in ("default", "../../../evil")]
    (target / "chat_template.jinja").unlink(missing_ok=True)
    (target / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": templates}))
    named = ["--target", str(target), "--dtype", "float32", "--max-new-tokens", "4"]
    out = inside / "out.jsonl"
    found = outcome(["data", "regenerate", str(inside / "prompts.jsonl"), "--out", str(out), *named])
    assert found.code == 0, found
    assert {json.loads(line)["id"] for line in out.read_text().splitlines()} <= {f"{row['id']}/0" for row in rows}
    bench = ["bench", "--prompts", str(inside / "prompts.jsonl"), "--json", str(inside / "b.json"), *named]
    assert outcome(bench).code == 0
    outcome(["export", "--format", "vllm", str(shop / "lm"), str(inside / "exported"), *named[:4]])
    outside = [p for p in tmp_path.rglob("*") if inside not in p.parents and p not in inside.parents and p != inside]
    assert not [p for p in outside if p != tmp_path / "a"], outside


def test_no_command_listens(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, *_: object) -> None:
        raise AssertionError("a socket listens")

    for name in ("bind", "listen"):
        monkeypatch.setattr(socket.socket, name, refuse)
    few = ["--max-new-tokens", "4"]
    prompts = str(shop / "prompts.jsonl")
    for words in (
        shop.train(tmp_path / "run"),
        ["data", "regenerate", prompts, "--out", str(tmp_path / "a.jsonl"), *shop.named, *few],
        ["bench", "--prompts", prompts, "--drafter", str(shop / "drafter"), *shop.named, *few],
        ["generate", "hi", "--drafter", str(shop / "drafter"), *shop.named, *few],
    ):
        found = outcome(words)
        assert found.code == 0 and not listening(), found


def listening() -> list[str]:
    """Sockets of this process that listen, whoever opened them."""
    mine = {link for fd in Path("/proc/self/fd").iterdir() if (link := _link(fd)).startswith("socket:")}
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]


def _link(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:  # closed meanwhile
        return ""
