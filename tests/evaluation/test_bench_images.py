"""Prompts with images are measured, and answered on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import overfit
import seeing
from vsd import cli
from vsd.data import prompt_inputs
from vsd.decoding import Engine, Sampling
from vsd.evaluation import Contender, bench, load_prompts
from vsd.paths import TreeShape


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_every_decoder_gives_the_same_answers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = seeing.target(family)
    (tmp_path / "a.png").write_bytes(seeing.picture(0, 24, 16).source)
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    turns = [[image, {"type": "text", "text": "what is it"}], "and why"]
    rows = [{"turns": turns}, {"prompt": "only text"}, {"prompt": "see", "image": "a.png"}]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs: list[Tensor] = []
    plain = target.model.generate

    def recorded(*args: Any, **options: Any) -> Tensor:
        outputs.append(plain(*args, **options))
        return outputs[-1]

    monkeypatch.setattr(target.model, "generate", recorded)
    drafter = Contender("random", overfit.random_drafter(target), TreeShape(3, 2, 6))
    prompts = load_prompts([tmp_path / "suite.jsonl"])
    report = bench(target, [drafter], prompts, max_new_tokens=6, progress=False)
    assert [run["identical"] for run in report["runs"]] == [1.0, 1.0]
    counts = {value: found["answers"] for value, found in report["runs"][1]["slices"]["images"].items()}
    assert counts == {"with": 3, "without": 1}
    asked = prompt_inputs(target.tokenizer, [{"role": "user", "content": prompts[-1].turns[0]}], target.images)
    assert asked.extras
    (ours,) = Engine(target).generate([asked], Sampling(6))
    assert outputs[-1][0].tolist() == asked.ids + ours.tokens


def test_generate_reads_an_image_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeing.write(seeing.target("llava"), tmp_path / "target")
    printed = []
    for number in (3, 4):
        (tmp_path / "a.png").write_bytes(seeing.picture(number).source)
        flags = ["--target", str(tmp_path / "target"), "--dtype", "float32", "--max-new-tokens", "12"]
        cli.main(["generate", *flags, "--image", str(tmp_path / "a.png"), "what"])
        printed.append(capsys.readouterr().out.splitlines()[0])
    assert printed[0] != printed[1]
    assert cli.main(["generate", *flags, "--image", str(tmp_path / "no.png"), "what"]) == 1
    assert "no.png' cannot be read" in capsys.readouterr().err
