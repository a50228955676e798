"""The line about a drafter that further epochs no longer improve."""

import shlex
from pathlib import Path

import pytest

import tiny_run
from vsd import cli
from vsd.targets import Target
from vsd.training.advice import advice


@pytest.mark.parametrize(
    ("taus", "epochs", "adds", "given"),
    [
        ([1.5, 1.6, 1.7, 1.7, 1.7, 1.6], 20.0, False, True),
        ([1.5, 1.6, 1.7, 1.7, 1.7, 1.71], 20.0, False, False),  # still rising
        ([1.7, 1.6, 1.6, 1.6], 20.0, False, True),  # too few measurements: epochs decide
        ([1.7, 1.6, 1.6, 1.6], 3.0, False, False),
        ([], 8.0, False, True),
        ([], 7.9, False, False),
        ([1.7, 1.6, 1.6, 1.6, 1.5, 1.5], 20.0, True, False),  # the objective adds paths
        ([1.7, 1.6, 1.6, 1.6, 1.5, 1.5], 0.5, False, False),  # no epoch is over: not the text's fault
    ],
)
def test_text_is_exhausted_when_tau_does_not_rise(taus: list[float], epochs: float, adds: bool, given: bool) -> None:
    line = advice(taus, epochs, adds)
    assert (line is not None) == given
    assert line is None or f"{epochs:.0f} times" in line


def test_the_options_that_it_names_are_taken_and_end_it(
    tiny_target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run.write_target(tiny_target, tmp_path / "target")
    tiny_run.write_text(tiny_target, tmp_path / "text.jsonl", 8)
    words = [
        "train",
        "--target",
        str(tmp_path / "target"),
        "--dtype",
        "float32",
        "--data",
        str(tmp_path / "text.jsonl"),
    ]
    words += ["--held-out", "0", "--draft-vocab-size", "64", "--set", "num_train_epochs=9", "save_strategy=no"]
    words += ["report_to=none", "disable_tqdm=true", "use_cpu=true", "draft_steps=2"]
    assert cli.main([*words, "--output-dir", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "the text was read 9 times" in said
    options = shlex.split(said.strip().rpartition("with ")[2].partition("\n")[0])
    words += [option.replace("32", "2").replace("8", "2") for option in options]
    assert cli.main([*words, "--output-dir", str(tmp_path / "b")]) == 0
    assert "the text was read" not in capsys.readouterr().out
