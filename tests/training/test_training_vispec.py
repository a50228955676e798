"""ViSpec drafters in the trainer: objectives train them, runs resume, acceptance rises, commands take them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import seeing
import tiny_run
from architectures import llama
from vsd import cli
from vsd.data import Example, load_examples
from vsd.decoding import Engine, Sampling
from vsd.drafters import load_drafter
from vsd.errors import ConfigurationError
from vsd.features import FeatureStore, InProcess
from vsd.features.server import command
from vsd.targets import Target, load_target
from vsd.training import DraftDataset
from vsd.training.batch import Collator, texts_of

PICTURES = [seeing.picture(n, 8 + 4 * n, 16) for n in range(3)]
TEXTS = [("only text", 0), ("a # b", 1), ("# then # x", 2)]


@pytest.fixture(scope="module")
def target() -> Target:
    return seeing.target("llava")


@pytest.fixture(scope="module")
def examples(target: Target) -> list[Example]:
    """The target's own answers to text and images, which it finds likely enough to be continued."""
    prompts = [seeing.read(target, f"{words} {n}", *PICTURES[:count]) for n in range(3) for words, count in TEXTS]
    answers = Engine(target).generate(prompts, Sampling(16, eos_ids=()))
    return [
        Example(prompt.followed_by(answer.tokens), [False] * (len(prompt.ids) + 1) + [True] * 15)
        for prompt, answer in zip(prompts, answers)
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vispec", {}),
        ("eagle3", {}),
        ("griffin", {}),
        ("elbo", {"samples": 4}),
        ("vsd", {}),
        ("vsd", {"rule": "rejection", "arw": True, "e_step": "drafted", "samples": 4}),
        ("vsd", {"rule": "target", "e_step": "trees", "tree": "3x2x6"}),
        ("gto", {"tree": "3x2x6", "anchors": 4}),
    ],
)
def test_every_objective_trains_it(
    target: Target, examples: list[Example], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    choice = {"objective": name, "objective_options": options, "max_steps": 2, "learning_rate": 1e-2}
    trainer = tiny_run.tiny_trainer(target, examples, tmp_path, family="vispec", warmup_steps=0, **choice)
    start = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())
    assert not [name for name, weight in trainer.model.named_parameters() if torch.equal(weight, start[name])]


def test_training_raises_acceptance_in_the_real_decoder(
    target: Target, examples: list[Example], tmp_path: Path
) -> None:
    """On the prompts of the training text: whether training and decoding agree, not how well it generalises."""
    options = {"learning_rate": 5e-3, "num_train_epochs": 40, "eval_max_new_tokens": 14, "objective": "vispec"}
    prompts = [tiny_run.prompt_of(example) for example in examples]
    trainer = tiny_run.tiny_trainer(target, examples, tmp_path, family="vispec", eval_prompts=prompts, **options)
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    assert trainer.evaluate()["eval_tau"] > before + 0.8


@pytest.fixture(scope="module")
def workshop(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/, text_only/ (a target of text), images, and text.jsonl: text, an image, and images in two turns."""
    folder = tmp_path_factory.mktemp("workshop")
    seeing.write(target, folder / "target")
    tiny_run.write_target(llama(), folder / "text_only")
    rows = []
    for n in range(6):
        (folder / f"{n}.png").write_bytes(seeing.picture(n, 8 + 4 * n, 16).source)
        image: list[Any] = [{"type": "image", "image": f"{n}.png"}]
        asked = [*(image if n % 3 else []), {"type": "text", "text": f"what {n}"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"an answer {n}"}]
        if n % 3 == 2:
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": "and this?"}]})
            messages.append({"role": "assistant", "content": f"another {n}"})
        rows.append(json.dumps({"messages": messages}) + "\n")
    (folder / "text.jsonl").write_text("".join(rows))
    (folder / "plain.jsonl").write_text(json.dumps({"prompt_ids": [40, 41], "response_ids": [42, 43, 44]}) + "\n")
    return folder


def train(workshop: Path, out: Path, *more: str, target: str = "target", data: str = "text.jsonl") -> int | None:
    given = {"--target": workshop / target, "--data": workshop / data, "--output-dir": out, "--family": "vispec"}
    given |= {"--dtype": "float32", "--held-out": 0, "--draft-vocab-size": 64, "--objective": "vispec"}
    options = ["per_device_train_batch_size=3", "draft_steps=2", "report_to=none", "disable_tqdm=true", "bf16=no"]
    options += ["use_cpu=true", "save_steps=2", "learning_rate=1e-2"]
    flags = [str(word) for pair in given.items() for word in pair]
    return cli.main(["train", *flags, "--set", *options, *more])


def test_vsd_train_resumes_and_other_commands_decode(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(workshop, tmp_path / "stored", "max_steps=1", "--features", "store") in (None, 0)
    assert train(workshop, tmp_path / "straight", "max_steps=4", "--features", "online") in (None, 0)
    assert train(workshop, tmp_path / "torn", "max_steps=4", "--features", "online") in (None, 0)
    for path in (tmp_path / "torn").glob("checkpoint-4/trainer_state.json"):
        path.unlink()  # as if the run had ended while it was written
    assert train(workshop, tmp_path / "torn", "max_steps=4", "--features", "online", "--resume") in (None, 0)
    target = load_target(str(workshop / "target"), dtype="float32")
    straight, resumed = (
        load_drafter(tmp_path / run / "drafter", target, trainable=True) for run in ("straight", "torn")
    )
    for name, weight in resumed.state_dict().items():
        torch.testing.assert_close(weight, straight.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)
    capsys.readouterr()
    flags = ["--target", str(workshop / "target"), "--dtype", "float32"]
    ask = ["generate", *flags, "--image", str(workshop / "1.png"), "--max-new-tokens", "8", "what"]
    answers = []
    for more in ([], ["--drafter", str(tmp_path / "straight" / "drafter")]):
        cli.main([*ask, *more])
        answers.append(capsys.readouterr().out.splitlines()[0])
    assert answers[0] == answers[1]
    drafter = str(tmp_path / "straight" / "drafter")
    assert cli.main(["export", *flags[:2], "--format", "vllm", drafter, str(tmp_path / "out")]) == 1
    assert "no engine serves a ViSpec drafter" in capsys.readouterr().err


def test_a_target_of_text_is_refused(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(workshop, tmp_path / "run", "max_steps=1", target="text_only", data="plain.jsonl") == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].endswith("family vispec is for targets that read images: choose another family")


def test_stored_features_are_the_computed_ones(workshop: Path, tmp_path: Path) -> None:
    target = load_target(str(workshop / "target"), dtype="float32")
    examples = load_examples(workshop / "text.jsonl", target.tokenizer, 512, images=target.images)
    store, dataset = FeatureStore.build(tmp_path, target, examples, (0, 4)), DraftDataset(examples)
    texts = texts_of(Collator()([dataset[i] for i in (1, 0, 2)]))
    computed, stored = InProcess(target, (0, 4)).batch(texts), store.batch(texts)
    seen = torch.arange(texts.inputs.ids.shape[1]) < texts.inputs.lengths[:, None]
    torch.testing.assert_close(stored.aux[seen], computed.aux[seen], rtol=1e-2, atol=1e-2)
    before = (texts.drafted - 1)[..., None].expand(-1, -1, 32)  # the final states are among the features
    torch.testing.assert_close(computed.aux[..., 32:].gather(1, before)[texts.real], computed.hidden[texts.real])


def test_servers_give_no_final_states() -> None:
    with pytest.raises(ConfigurationError, match="--features online"):
        command("T", (0, 4), 4, "/tmp")
    assert "extract_hidden_states" in command("T", (0, 3), 4, "/tmp")
