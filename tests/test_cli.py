"""The command line: help that helps, mistakes in one line, and the whole road on a tiny target."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_run
from fake_server import FakeServer
from vsd import __version__, cli
from vsd.drafters import new_drafter
from vsd.objective import OBJECTIVES
from vsd.paths import TreeShape
from vsd.targets import Target
from vsd.training import DraftDataset

COMMANDS = [
    [],
    ["data"],
    ["data", "regenerate"],
    ["data", "server"],
    ["data", "synthesize"],
    ["data", "check"],
    ["train"],
    ["objectives"],
    ["generate"],
    ["bench"],
    ["tune"],
    ["report"],
    ["export"],
    ["import"],
    ["demo"],
]


@pytest.fixture(scope="module")
def folder(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/, another target's folder, text.jsonl, prompts.jsonl and a drafter."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_run.write_target(tiny_target, folder / "target")
    tiny_run.write_text(tiny_target, folder / "text.jsonl", 24)
    examples = tiny_run.tiny_examples(tiny_target, 24)
    tiny_run.tiny_drafter(tiny_target, examples).save_pretrained(folder / "drafter")
    rows = [{"turns": ["hi there", "and then"]}, {"prompt": "why is that"}, {"prompt": "who"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder: Path, *words: object) -> int:
    """A command on the tiny target, in float32."""
    return cli.main([*map(str, words), "--target", str(folder / "target"), "--dtype", "float32"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text and " ".join(["vsd", *command]) in text.partition("example")[2]


def test_version_and_a_command_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2


def mistakes(folder: Path) -> dict[str, tuple[list[object], str]]:
    """Command lines that cannot work, and what the one line on stderr must say."""
    (folder / "bad.jsonl").write_text('{"prompt": "fine"}\n{"prompt": \n')
    (folder / "untruth.jsonl").write_text('{"prompt": "a question without an answer"}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "bert").mkdir(exist_ok=True)
    (folder / "bert" / "config.json").write_text('{"architectures": ["BertModel"]}')
    target, text, prompts = folder / "target", folder / "text.jsonl", folder / "prompts.jsonl"
    drafter = folder / "drafter"
    train = ["train", "--target", target, "--output-dir", folder / "never"]
    bench, out = ["bench", "--target", target], ["--out", folder / "never.jsonl"]
    generate = ["generate", "--target", target, "hi"]
    ask = ["data", "regenerate", prompts, "--target", target, *out]
    return {
        "no prompts": ([*bench, "--prompts", folder / "no.jsonl"], "no file at"),
        "bad line": ([*bench, "--prompts", folder / "bad.jsonl"], "bad.jsonl:2: not JSON"),
        "empty file": ([*bench, "--prompts", folder / "empty.jsonl"], "no usable conversation"),
        "no drafter": ([*bench, "--prompts", prompts, "--drafter", folder / "no"], str(folder / "no")),
        "not a drafter": ([*generate, "--drafter", folder / "bert"], "no drafter family reads it"),
        "no target": (["generate", "--target", folder / "no", "hi"], "no folder at"),
        "not a target": (["generate", "--target", drafter, "hi"], "cannot load target"),
        "no GGUF": (["generate", "--target", "no.gguf", "hi"], "no GGUF file at"),
        "device": ([*generate, "--device", "abacus"], "abacus"),
        "dtype": ([*generate, "--dtype", "float7"], "unknown dtype"),
        "tree": ([*generate, "--tree", "5x4"], "a tree is depth x top_k x nodes"),
        "top-k 0": ([*generate, "--tree", "5x0x12"], "top_k"),
        "top-k": ([*generate, "--drafter", drafter, "--tree", "5x999x8"], "999"),
        "nodes": ([*generate, "--tree", "2x2x99"], "nodes must be at most 7, not 99"),
        "nodes 0": ([*generate, "--tree", "5x4x0"], "nodes"),
        "tree of bench": ([*bench, "--prompts", prompts, "--tree", "3x3x3x2"], "p_min"),
        "tree rejection": ([*generate, "--verification", "rejection"], "top_k 1"),
        "empty prompt": (["generate", "--target", target, "  "], "prompt is empty"),
        "temperature": ([*generate, "--temperature", "-1"], "temperature"),
        "top-p": ([*generate, "--top-p", "1.5"], "top_p must be above 0 and at most 1, not 1.5"),
        "min-p": ([*generate, "--min-p", "-1"], "min_p"),
        "sample top-k": ([*generate, "--sample-top-k", "-1"], "top_k must be 0 (all tokens) or more"),
        "penalty": ([*generate, "--repetition-penalty", "0"], "repetition_penalty"),
        "no data": (train, "no training text"),
        "missing data": ([*train, "--data", folder / "no.jsonl"], "no file at"),
        "unanswered": ([*train, "--data", folder / "untruth.jsonl"], "untruth.jsonl:1"),
        "key": ([*train, "--data", text, "--set", "leaning_rate=1"], "leaning_rate"),
        "objective": ([*train, "--data", text, "--objective", "eagle4"], "unknown objective 'eagle4'"),
        "objective's option": (
            [*train, "--data", text, "--objective", "gto", "--set", "objective_options.anchors=2.5"],
            "objective gto: anchors must be an integer, not 2.5",
        ),
        "no such objective": (["objectives", "eagle4"], "unknown objective 'eagle4'"),
        "held out": ([*train, "--data", text, "--held-out", "24"], "24 of 24"),
        "recipe": (["train", "--config", folder / "no.yaml"], "no recipe at"),
        "regenerate": (["data", "regenerate", folder / "no.jsonl", "--target", target, *out], "no file at"),
        "regenerate bad": (["data", "regenerate", folder / "bad.jsonl", "--target", target, *out], "bad.jsonl:2"),
        "check": (["data", "check", folder / "empty.jsonl", "--target", target], "no usable conversation"),
        "no model": ([*ask, "--server", "http://127.0.0.1:9"], "--server URL --model NAME"),
        "no server": ([*ask, "--server", "localhost:8000", "--model", "m"], "no server's address"),
        "synthesize": (["data", "synthesize", "--target", target, *out], "--tokens N or --conversations N"),
        "tune": (["tune", "--target", target, "--prompts", prompts, "--drafter", folder / "no"], str(folder / "no")),
        "report": (["report", folder / "target"], "is no run of vsd train"),
        "export": (["export", "--target", target, "--format", "vllm", drafter, folder / "never"], "layer 0's input"),
        "import": (["import", "--target", target, folder / "bert", folder / "never"], "holds ['BertModel']"),
        "demo": (["demo", "--minutes", "0.5", "--out", folder / "never"], "a minute at least"),
    }


NAMES = """tree,tree of bench,objective,objective's option,no such objective,
no prompts,bad line,empty file,no drafter,not a drafter,no target,not a target,no GGUF,dtype,device,
top-k 0,top-k,nodes,nodes 0,tree rejection,empty prompt,temperature,top-p,min-p,sample top-k,penalty,no data,
missing data,unanswered,key,held out,recipe,regenerate,regenerate bad,check,no model,no server,synthesize,tune,
report,export,import,demo"""


@pytest.mark.parametrize("name", [name.strip() for name in NAMES.split(",")])
def test_a_mistake_is_one_line_and_exit_code_one(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, what = mistakes(folder)[name]
    assert cli.main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vsd: ") and error.count("\n") == 1, error
    assert what in error
    assert not (folder / "never").exists()


USAGE = {
    "no command": ([], "missing command: choose data, train"),
    "no data command": (["data"], "missing command: choose regenerate, server, synthesize"),
    "unknown command": (["trian"], "invalid choice: 'trian'"),
    "missing": (["data", "regenerate"], "missing source, --out (see vsd data regenerate --help)"),
    "missing list": (["bench"], "missing --prompts"),
    "a flag that is none": (
        ["export", "D", "--out", "E"],
        "there is no --out: give the value alone, as in vsd export DRAFTER OUT [OPTIONS]",
    ),
    "unknown flag": (
        ["train", "--lerning-rate", "1"],
        "unknown argument --lerning-rate 1: did you mean --learning-rate",
    ),
    "abbreviated": (["train", "--learning", "1"], "unknown argument --learning 1"),
    "too many": (["generate", "a", "b"], "unknown argument b"),
    "empty": (["generate", "a", ""], "unknown argument"),
    "two lines": (["generate", "a", "b\nc"], "unknown argument b c"),
    "newline": (["bench", "--max-new-tokens", "\n"], "--max-new-tokens must be an integer, not"),
    "integer": (["train", "--max-steps", "2.5"], "--max-steps must be an integer, not '2.5'"),
    "number": (["train", "--learning-rate", "fast"], "--learning-rate must be a number, not 'fast'"),
    "optional number": (["train", "--max-minutes", "soon"], "--max-minutes must be a number, not 'soon'"),
    "numbers": (["bench", "--temperature", "0", "hot"], "--temperature: invalid float value: 'hot'"),
    "no number": (["bench", "--temperature", "0", "nan"], "--temperature: invalid float value: 'nan'"),
    "truth": (["train", "--bf16", "maybe"], "--bf16 must be true or false, not 'maybe'"),
    "choice": (["train", "--on-bad-line", "explode"], "--on-bad-line must be fatal or skip, not 'explode'"),
    "mapping": (["train", "--objective-options", "8"], "--objective-options must be a mapping {name: value}, not '8'"),
    "no value": (["train", "--target"], "--target: expected one argument"),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_mistake_in_flags_is_one_line_and_exit_code_two(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, what = USAGE[name]
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vsd: ") and captured.err.count("\n") == 1 and not captured.out
    assert what in captured.err and "--help)" in captured.err


def test_help_and_version_do_not_import_torch() -> None:
    script = f"""
import sys
from vsd import cli

for command in {[*([*c, "--help"] for c in COMMANDS), ["--version"], ["train", "--max-steps", "x"], ["bench"]]}:
    try:
        cli.main(command)
    except SystemExit:
        continue
    raise AssertionError(command)
print(*sorted({{"torch", "transformers", "accelerate", "numpy"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "", done.stderr
    assert done.stdout.count("examples:") == len(COMMANDS)


def test_the_help_of_train_shows_the_central_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for name in (
        "objective",
        "objective-options",
        "draft-steps",
        "ramp",
        "temperature",
        "max-minutes",
        "learning-rate",
    ):
        assert re.search(rf"^  --{name} .*\S", text, re.M), name
    for group in ("target:", "data:", "drafter:", "objective:", "optimisation:", "measurement and checkpoints:"):
        assert f"\n{group}\n" in text
    assert "(default: 0.95)" in text and "(default: 5x4x12)" in text


def test_repeated_flags_of_train_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("vsd.training.job.train", lambda *words, **options: seen.append((*words, options)))
    (tmp_path / "recipe.json").write_text("{}")  # what a training leaves, for its report
    words = ["train", "--data", "a", "b", "--data", "c", "--set", "save_strategy=no", "adam_beta1=0.5"]
    words += ["--set", "objective_options.decay=0.5", "--revision", "v1", "--trust-remote-code"]
    assert cli.main([*words, "--objective-options", "{smoothing: 0.25}", "--output-dir", str(tmp_path)]) == 0
    (job, config, options) = seen[0]
    assert job.data == ["a", "b", "c"] and (job.revision, job.trust_remote_code) == ("v1", True)
    assert (config.save_strategy, config.adam_beta1) == ("no", 0.5)
    assert config.objective_options == {"decay": 0.5, "smoothing": 0.25}
    assert options["resume"] is False


def test_all_mistakes_are_tried(folder: Path) -> None:
    assert {name.strip() for name in NAMES.split(",")} == set(mistakes(folder))


def test_the_installed_command_shows_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vsd.cli", "generate", "--target", str(tmp_path / "no"), "hi"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert done.stderr == f"vsd: no folder at '{tmp_path / 'no'}': check the path, or give a hub id\n"


def test_regenerate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "text.jsonl"
    words = ["data", "regenerate", folder / "prompts.jsonl", "--out", out, "--max-new-tokens", 12]
    assert run(folder, *words) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 4  # one a user turn
    assert all(record["response_ids"] for record in records)
    cut = sum(record["finish"] == "length" for record in records)
    assert cut and f"{out}: 4 answers ({cut} cut at --max-new-tokens 12: for whole" in capsys.readouterr().out
    before = out.read_bytes()
    assert run(folder, *words) == 0  # again: nothing is done twice
    assert out.read_bytes() == before


def test_regenerate_reports_what_it_skips(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mixed.jsonl"
    source.write_text('{"prompt": "one"}\nnot json\n{"prompt": "two"}\n{"prompt": "three"}\n')
    words = ["data", "regenerate", source, "--out", tmp_path / "t.jsonl", "--max-new-tokens", 8]
    assert run(folder, *words, "--on-bad-line", "skip", "--limit", 2) == 0
    captured = capsys.readouterr()
    assert "vsd: skipped" in captured.err and "mixed.jsonl:2" in captured.err
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 2


def test_regenerate_by_a_server(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No target is loaded: its tokenizer and the server do."""
    server = FakeServer()
    out = tmp_path / "text.jsonl"
    words = ["data", "regenerate", folder / "prompts.jsonl", "--out", out, "--max-new-tokens", 30]
    assert run(folder, *words, "--server", server.url, "--model", "tiny", "--requests-per-second", 100) == 0
    assert f"{out}: 4 answers" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 4 == len(server.asked)
    server.shutdown()
    server.server_close()


def test_regenerate_by_two_servers(folder: Path, tmp_path: Path) -> None:
    servers, out = [FakeServer(delay=0.1), FakeServer(delay=0.1)], tmp_path / "text.jsonl"
    words = ["data", "regenerate", folder / "prompts.jsonl", "--out", out, "--max-new-tokens", 30, "--model", "tiny"]
    assert run(folder, *words, *(word for one in servers for word in ("--server", one.url))) == 0
    assert len(out.read_text().splitlines()) == 4 == sum(len(one.asked) for one in servers)
    assert all(one.asked for one in servers)
    for one in servers:
        one.shutdown()
        one.server_close()


def test_check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """No layers are loaded, and what is skipped is named."""
    monkeypatch.setattr("vsd.targets.load_target", None)
    text = tmp_path / "text.jsonl"
    text.write_bytes((folder / "text.jsonl").read_bytes() + b'{"prompt": "no answer"}\n')
    assert run(folder, "data", "check", text) == 0
    captured = capsys.readouterr()
    assert f"vsd: skipped {text}:25: there is no answer" in captured.err
    assert re.search(r"^conversations +24, 1 skipped$", captured.out, re.M)
    assert re.search(r"^draft vocabulary +128 of 128 tokens cover 100.0% of the supervised$", captured.out, re.M)
    assert re.search(r"^duplicates +\d+ conversations, 0 ids$", captured.out, re.M)
    assert f"{text}:1, supervised tokens in ⟦ ⟧:" in captured.out and "⟧" in captured.out.partition("⟦ ⟧")[2]


def test_synthesize(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "text.jsonl"
    words = ["data", "synthesize", "--out", out, "--conversations", 5, "--max-new-tokens", 10, "--batch-size", 8]
    assert run(folder, *words) == 0
    assert len(out.read_text().splitlines()) == 5
    assert f"{out}: 5 conversations" in capsys.readouterr().out


def test_train_then_bench_then_generate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, numbers = tmp_path / "run", tmp_path / "out.json"
    options = ["max_steps=12", "learning_rate=1e-2", "draft_steps=2", "eval_steps=6", "eval_max_new_tokens=6"]
    options += ["report_to=none", "disable_tqdm=true", "use_cpu=true", "logging_steps=4"]
    words = ["train", "--data", folder / "text.jsonl", "--output-dir", out, "--held-out", 4]
    assert run(folder, *words, "--draft-vocab-size", 64, "--set", *options) == 0
    said = capsys.readouterr().out
    assert f"drafter: {out / 'drafter'}" in said and f"report: {out / 'report.html'}" in said
    assert "Held-out τ" in (out / "report.html").read_text()
    state = json.loads((out / "checkpoint-12" / "trainer_state.json").read_text())
    assert any("eval_tau" in entry for entry in state["log_history"])

    tree = ["--tree", "3x2x5", "--max-new-tokens", 8]
    words = ["bench", "--prompts", folder / "prompts.jsonl", "--drafter", out / "drafter", "--json", numbers]
    assert run(folder, *words, *tree) == 0
    said = capsys.readouterr().out
    assert "tokens/s" in said and f"report: {tmp_path / 'out.html'}" in said
    page = (tmp_path / "out.html").read_text()
    assert f"--tree 3x2x5 --max-new-tokens 8 --target {folder / 'target'}" in page  # the command, and
    assert "Held-out τ" in page  # the training of the drafter
    plain, drafted = json.loads(numbers.read_text())["runs"]
    assert (plain["drafter"], drafted["drafter"]) == (None, str(out / "drafter"))
    assert drafted["identical"] == 1.0 and drafted["tree"] == {
        "depth": 3,
        "top_k": 2,
        "nodes": 5,
        "p_min": 0.0,
        "lookup": 0,
    }

    assert run(folder, "generate", "hi there", "--drafter", out / "drafter", *tree) == 0
    drafted_text = capsys.readouterr().out
    assert "τ = " in drafted_text
    assert run(folder, "generate", "hi there", "--max-new-tokens", 8) == 0
    plain_text = capsys.readouterr().out
    assert drafted_text.split("\n\n")[0] == plain_text.split("\n\n")[0]


def test_generate_reads_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hi there\n"))
    assert run(folder, "generate", "--max-new-tokens", 4, "--temperature", 0.8, "--system", "be brief") == 0
    assert "4 tokens" in capsys.readouterr().out


def test_a_sampled_chain_is_verified_by_rejection(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "hi", "--drafter", folder / "drafter", "--tree", 3, "--max-new-tokens", 8]
    assert run(folder, *words, "--verification", "rejection", "--temperature", 1.0) == 0
    assert "target passes" in capsys.readouterr().out


def test_repeated_flags_of_bench_add_up(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"prompt": "who are you"}\n')
    words = ["bench", "--prompts", folder / "prompts.jsonl", "--prompts", tmp_path / "more.jsonl"]
    words += ["--drafter", folder / "drafter", "--drafter", folder / "drafter", "--tree", 2]
    assert run(folder, *words, "--max-new-tokens", 4, "--json", tmp_path / "out.json") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["settings"]["prompts"]) == 4
    assert [run["drafter"] for run in report["runs"]] == [None, str(folder / "drafter"), str(folder / "drafter")]
    assert TreeShape(**report["runs"][1]["tree"]) == TreeShape.chain(2)


def test_lookup_needs_no_drafter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "hi hi hi hi", "--max-new-tokens", 24]
    assert run(folder, *words, "--tree", "5x4x12x0x8") == 0
    with_lookup = capsys.readouterr().out
    assert "τ = " in with_lookup
    assert run(folder, *words) == 0
    assert with_lookup.rpartition("\n\n")[0] == capsys.readouterr().out.rpartition("\n\n")[0]


def test_objectives_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["objectives"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in OBJECTIVES)
    assert "2503.01840" in table


def test_options_of_an_objective_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["objectives", "gto"]) == 0
    text = capsys.readouterr().out
    assert "arXiv:2509.22134" in text
    assert re.search(r"epsilon .* a number .* 0\.2 ", text) and re.search(r"tree .* a string .* 5x4x16 ", text)


def test_sampling_options_reach_the_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One token to draw from is the greedy answer; a penalty leads away from it; a stop string ends it."""

    def text(*options: object) -> str:
        assert run(folder, "generate", "hi there", "--max-new-tokens", 24, *options) == 0
        return capsys.readouterr().out.rpartition("\n\n")[0]

    greedy = text()
    for one in (["--sample-top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]):
        assert text("--temperature", 2, "--seed", 3, *one) == greedy
    assert text("--temperature", 2, "--seed", 3) != greedy
    assert text("--repetition-penalty", 5) != greedy
    assert text("--stop", greedy[2]) == greedy[: greedy.index(greedy[2]) + 1]


def test_tune_names_the_fastest_tree(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "--drafter", folder / "drafter", "--prompts", folder / "prompts.jsonl", "--max-new-tokens", 20]
    assert run(folder, *words, "--json", tmp_path / "trees.json") == 0
    text = capsys.readouterr().out
    found = re.search(r"--tree (\S+)", text)
    assert found, text
    assert found[1] in text[: found.start()]  # in the table, too
    assert str(TreeShape.parse(found[1])) == found[1]
    assert cli.main(["report", str(tmp_path / "trees.json"), "--out", str(tmp_path / "trees.html")]) == 0
    assert f"{found[1]} pays" in (tmp_path / "trees.html").read_text()


def test_export_and_import(
    tiny_target: Target, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There and back by way of the command line; the card quotes what was measured."""
    vocabulary = DraftDataset(tiny_run.tiny_examples(tiny_target, 4)).draft_vocabulary(tiny_target.vocab_size, 64)
    new_drafter(tiny_target, vocabulary, aux_layers=[1, 2, 3]).save_pretrained(tmp_path / "mine")
    weights = (tmp_path / "mine" / "model.safetensors").read_bytes()
    bench = [
        "bench",
        "--prompts",
        folder / "prompts.jsonl",
        "--drafter",
        tmp_path / "mine",
        "--json",
        tmp_path / "b.json",
    ]
    assert run(folder, *bench, "--max-new-tokens", 4) == 0
    capsys.readouterr()
    export = ["export", "--format", "vllm", tmp_path / "mine", tmp_path / "out", "--bench", tmp_path / "b.json"]
    assert run(folder, *export) == 0
    assert "vllm serve" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    tau = json.loads((tmp_path / "b.json").read_text())["runs"][1]["tau"]
    assert f"{tau:.2f} [" in card and "vllm serve" in card
    assert "[report.html](report.html)" in card and f"{tau:.2f}" in (tmp_path / "out" / "report.html").read_text()
    assert run(folder, "import", tmp_path / "out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert run(folder, *export) == 1  # not over something


def test_a_small_language_model_is_trained_measured_and_exported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole road for the family `lm`; its checkpoints are plain folders of transformers."""
    run_folder, out = tmp_path / "run", tmp_path / "out"
    words = ["train", "--data", folder / "text.jsonl", "--output-dir", run_folder, "--held-out", 4, "--family", "lm"]
    words += ["--drafter-options", "{num_hidden_layers: 1}", "--set", "max_steps=6", "eval_steps=3", "draft_steps=2"]
    words += ["eval_max_new_tokens=6", "report_to=none", "disable_tqdm=true", "use_cpu=true"]
    assert run(folder, *words) == 0
    drafter = run_folder / "drafter"
    assert AutoModelForCausalLM.from_pretrained(drafter).config.num_hidden_layers == 1
    bench = ["bench", "--prompts", folder / "prompts.jsonl", "--drafter", drafter, "--max-new-tokens", 6]
    assert run(folder, *bench, "--tree", "3x2x6", "--json", tmp_path / "b.json") == 0
    assert json.loads((tmp_path / "b.json").read_text())["runs"][1]["identical"] == 1.0
    capsys.readouterr()
    assert run(folder, "export", "--format", "vllm", drafter, out) == 0
    assert '"method": "draft_model"' in capsys.readouterr().out
    exported, trained = (AutoModelForCausalLM.from_pretrained(path) for path in (out, drafter))
    weights = trained.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in exported.state_dict().items())
    assert run(folder, "export", "--format", "speculators", drafter, tmp_path / "no") == 1
    assert "has no format" in capsys.readouterr().err
