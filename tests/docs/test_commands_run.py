"""Every whole command of README and docs, run on a tiny target named T with files of the names that the pages use.

Only sizes are made smaller. Commands that need a server, a GGUF file or an image have tests of their own; those of
results.md that train for hours are left out.
"""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from test_documentation import FOUND, ROOT, words

import tiny
import tiny_run
from vsd import cli
from vsd.drafters.load import new_drafter
from vsd.evaluation.tune import SHAPES, tune
from vsd.export import export_drafter
from vsd.targets import Target
from vsd.training import DraftDataset

ELSEWHERE = re.compile(
    r"https?://|URL|\.gguf|--image|runs/pictures|data server|vsd demo|runs/demo|smollm2_greedy|START|RUN"
)
COMMANDS = [command for command, whole in FOUND if whole and not ELSEWHERE.search(command)]
CONVERSATIONS = 72  # more than any command holds out
SMALLER = {  # options by command: added, or in place of what the page says
    "train": {"--max-minutes": "0.01"},
    "data regenerate": {"--max-new-tokens": "8"},
    "data synthesize": {"--max-new-tokens": "8", "--tokens": "100"},
    "bench": {"--max-new-tokens": "8", "--limit": "2"},
    "tune": {"--limit": "2"},
    "generate": {"--max-new-tokens": "8"},
}
TARGETLESS = ("objectives", "report")
QUIET = ["save_strategy=no", "report_to=none", "disable_tqdm=true", "use_cpu=true", "eval_max_new_tokens=4"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the commands name."""
    desk = tmp_path_factory.mktemp("made") / "desk"
    target = tiny.tiny_target()
    for name in ("T", "NEW_TARGET"):
        tiny_run.write_target(target, desk / name)
    tiny_run.write_text(target, desk / "text.jsonl", CONVERSATIONS)
    rows = "".join(json.dumps({"prompt": f"who is {i}"}) + "\n" for i in range(CONVERSATIONS))
    for name in ("prompts", "held-out", "traffic", "mt"):
        (desk / f"{name}.jsonl").write_text(rows)
    (desk / "folder").mkdir()
    shutil.copy(desk / "text.jsonl", desk / "folder")
    (desk / "recipe.yaml").write_text("data: [text.jsonl]\nobjective: vsd\noutput_dir: runs/recipe\n")
    (desk / "recipes").symlink_to(ROOT / "recipes")
    write_drafters(target, desk)
    return desk


def write_drafters(target: Target, desk: Path) -> None:
    """Released checkpoints, and runs with what `vsd train` and `vsd bench` leave there."""
    dataset = DraftDataset(tiny_run.tiny_examples(target, CONVERSATIONS))
    vocabulary = dataset.draft_vocabulary(target.vocab_size, 64)
    drafter = new_drafter(target, vocabulary, aux_layers=[1, 2, 3])
    for name in ("released-checkpoint", "released", "exported"):
        export_drafter(drafter, target, desk / name, "sglang")
    with pytest.MonkeyPatch.context() as at:
        at.chdir(desk)
        assert cli.main(smaller("vsd train --drafter released --data text.jsonl --output-dir runs/mine")) == 0
        bench = "vsd bench --drafter runs/mine/drafter --prompts held-out.jsonl --tree 3 --json runs/mine/bench.json"
        assert cli.main(smaller(bench)) == 0
    shutil.rmtree(desk / "runs" / "mine" / "features")
    for name in ("a", "b", "better", "released", "sampled", "old", "eagle3", "dflash"):
        shutil.copytree(desk / "runs" / "mine", desk / "runs" / name)
    shutil.copy(desk / "runs" / "mine" / "bench.json", desk / "runs")
    shutil.rmtree(desk / "runs" / "dflash" / "drafter")
    block = new_drafter(target, vocabulary, "dflash", aux_layers=[1, 2, 3])
    block.save_pretrained(desk / "runs" / "dflash" / "drafter")


@pytest.fixture(autouse=True)
def copied(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command starts in a copy of the folder; it tries three trees, and reads a question."""
    if "command" in request.fixturenames:
        shutil.copytree(request.getfixturevalue("desk"), tmp_path / "desk", symlinks=True)
        monkeypatch.chdir(tmp_path / "desk")
    monkeypatch.setattr(tune, "__defaults__", (SHAPES[:3], *(tune.__defaults__ or ())[1:]))
    monkeypatch.setattr("sys.stdin", io.StringIO("what is 2\n"))


def smaller(command: str) -> list[str]:
    """Arguments of a command, with smaller sizes and on the tiny target."""
    given = words(command)
    name = next((n for n in SMALLER if f"{' '.join(given)} ".startswith(f"{n} ")), given[0])
    options = SMALLER.get(name, {}) | ({"--answer-tokens": "8"} if "--online" in given else {})
    if "--max-steps" in given:
        del options["--max-minutes"]
    for flag, value in options.items():
        if flag in given:
            given[given.index(flag) + 1] = value
        else:
            given += [flag, value]
    if name not in TARGETLESS and "--target" not in given:
        given += ["--target", "T"]
    return [*given, "--set", *QUIET] if name == "train" else given


def delete_outputs(given: list[str]) -> None:
    """Delete what other commands of the page would have left in place of the command's own output."""
    name = given[given.index("--out") + 1] if "--out" in given else "exported" if given[0] == "export" else given[-1]
    for path in Path().glob(f"{name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documentation_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = smaller(command)
    if given[:2] in (["data", "regenerate"], ["data", "synthesize"]) or given[0] in ("export", "import"):
        delete_outputs(given)
    if given[0] == "train":  # runs that other commands of the page would have left are taken for unfinished ones
        for state in Path("runs").glob("*/trainer_state.json"):
            state.unlink()
    assert cli.main(given) == 0, capsys.readouterr().err


def test_most_commands_are_run() -> None:
    assert len(COMMANDS) > 50
