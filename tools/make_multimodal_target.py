"""Train vision tower and projector of the embedded multimodal target, on one core, in resumable stages.

    python tools/make_multimodal_target.py tower --minutes 60    # facts of scenes, and captions as embeddings
    python tools/make_multimodal_target.py answers --minutes 10  # long answers of the language model to captions
    python tools/make_multimodal_target.py speak --minutes 60    # the frozen language model answers from the picture
    python tools/make_multimodal_target.py export                # write the package's asset

`tower` needs no language model. A patch names the kind, colour and size of the thing on it (linear heads, thrown away
later), and the projector's output at image position i is the embedding of token i of the scene's caption: the language
model then reads a picture nearly as it reads the caption.

`speak` trains tower and projector through the frozen language model: cross-entropy of short true answers, and KL of the
answers behind the picture from those behind the caption, on long answers of the language model's own. The loss of
`tower` continues beside it. Without a run of `tower`, it begins with the tower and projector in the package.

A third of the pictures are of other programs (tools/real_pictures.py), which have captions, but no facts of patches.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eye import Eye, Losses, Words, batch_of, pixels_of
from real_pictures import Picture, RealPictures
from speech import Said, Speech
from vsd.pictures import caption, questions, render, scene
from vsd.targets.load import resolve
from vsd.targets.vision import WEIGHTS, llava_config

TRAIN = 10_000_000  # first seed of the scenes trained on; smaller ones are held out
LONG = (
    "Describe the picture.",
    "What do you see? Answer in detail.",
    "Tell me a short story about this picture.",
    "Write a poem about the picture.",
)
_SAVE, _LOG = 90.0, 30.0  # seconds between checkpoints, and between lines of the log
_TOWER_RATE, _SPEAK_RATE = 8e-4, 3e-4
_TOWER_SIZE, _SPEAK_SIZE = 8, 4  # pictures of a step: plain scenes, as many crowded ones, and as many of other programs
_REAL = 1 / 3  # of the pictures that are spoken about: those of other programs
_ASKED = 4  # short questions of a step
_LONGEST = 64  # tokens of a long answer
_TOGETHER = 16  # long answers generated together
_EXPORTED = {"tower.": "vision_tower.vision_model.", "projector.": "multi_modal_projector."}  # names: ours, LLaVA's


class Clock:
    """Seconds trained, over all runs, of the seconds planned."""

    def __init__(self, minutes: float, before: float) -> None:
        self.planned, self.before, self.start = 60 * minutes, before, time.monotonic()

    @property
    def seconds(self) -> float:
        """Trained so far."""
        return self.before + time.monotonic() - self.start

    @property
    def rate(self) -> float:
        """Of the learning rate: rises over a fiftieth, falls to a fiftieth over the last two fifths."""
        done = min(1.0, self.seconds / self.planned)
        return min(1.0, 0.05 + 50 * done, max(0.02, (1 - done) / 0.4))


class Run:
    """A stage: a model, its optimizer, and a checkpoint from which it goes on."""

    def __init__(self, path: Path, eye: Eye, rate: float, minutes: float) -> None:
        self.path, self.eye, self.rate, self.steps = path, eye, rate, 0
        self.optimizer = torch.optim.AdamW(eye.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        before = 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            eye.load_state_dict(state["eye"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, before = state["steps"], state["seconds"]
        self.clock = Clock(minutes, before)

    def train(self, losses: Callable[[int], dict[str, Tensor]]) -> None:
        """Until the time is over; `losses` of a step, by name: the first one is minimised."""
        saved = logged = time.monotonic()
        while self.clock.seconds < self.clock.planned:
            found = losses(self.steps)
            next(iter(found.values())).backward()
            self._update()
            if time.monotonic() - logged > _LOG:
                logged = time.monotonic()
                report = " ".join(f"{name} {value.item():.4f}" for name, value in found.items())
                print(f"step {self.steps} seconds {self.clock.seconds:.0f} {report}", flush=True)
            if time.monotonic() - saved > _SAVE:
                saved = time.monotonic()
                self.save()
        self.save()

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.eye.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.clock.rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        half = self.path.with_suffix(".half")
        state = {"eye": self.eye.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"steps": self.steps, "seconds": self.clock.seconds}, half)
        half.replace(self.path)


def train_tower(folder: Path, minutes: float) -> None:
    """The stage `tower`; goes on from `folder`/tower.pt."""
    real = RealPictures()
    eye, words = new_eye(real)

    def losses(step: int) -> dict[str, Tensor]:
        found = seen_losses(eye, words, real, step, _TOWER_SIZE)
        return {"loss": total(found), **found._asdict()}

    Run(folder / "tower.pt", eye, _TOWER_RATE, minutes).train(losses)


def seen_losses(eye: Eye, words: Words, real: RealPictures, step: int, size: int) -> Losses:
    """Of `size` plain scenes, crowded scenes and pictures of other programs each; every step has its own."""
    seeds = range(TRAIN + step * size, TRAIN + (step + 1) * size)
    return eye.losses(batch_of(seeds, words, [real.picture(seed) for seed in seeds]))


def total(losses: Losses) -> Tensor:
    """The loss of `tower`."""
    return losses.facts + 4 * losses.words + losses.far


def train_speak(folder: Path, minutes: float) -> None:
    """The stage `speak`; begins with `folder`/tower.pt or the package's weights, goes on from `folder`/speak.pt."""
    real = RealPictures()
    eye, words = new_eye(real)
    if (folder / "tower.pt").exists():
        eye.load_state_dict(torch.load(folder / "tower.pt", weights_only=True)["eye"])
    else:
        load_exported(eye)
    speech = new_speech()
    long = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]

    def losses(step: int) -> dict[str, Tensor]:
        if step % 3 == 2:
            row = long[step // 3 % len(long)]
            picture, said = told(row, real), [Said(row["question"], row["answer"])]
            name, spoken = "long", speech.divergence(shown(eye, picture), speech.caption(picture.caption), said)
        else:
            picture = picture_of(TRAIN - 1 - step, real)
            name, spoken = "short", speech.cross_entropy(shown(eye, picture), short_answers(speech, picture, step))
        found = seen_losses(eye, words, real, step, _SPEAK_SIZE)
        return {"loss": spoken + 0.3 * total(found), name: spoken, **found._asdict()}

    Run(folder / "speak.pt", eye, _SPEAK_RATE, minutes).train(losses)


def picture_of(seed: int, real: RealPictures) -> Picture:
    """A scene or a picture of another program; the choice is independent of what the picture shows."""
    if random.Random(f"real {seed}").random() < _REAL:
        return real.picture(seed)
    one = scene(seed)
    return Picture(render(one), caption(one), questions(one))


def told(row: dict[str, Any], real: RealPictures) -> Picture:
    """The picture whose caption a long answer was given to."""
    picture = picture_of(row["seed"], real)
    if picture.caption != row["caption"]:
        raise SystemExit("answers.jsonl is of other pictures: delete it, and run the stage `answers` again.")
    return picture


def shown(eye: Eye, picture: Picture) -> Tensor:
    """A picture as the language model sees it, [P, h]."""
    embedded: Tensor = eye.projector(eye.features(pixels_of([picture.image])))[0]
    return embedded


def short_answers(speech: Speech, picture: Picture, seed: int) -> list[Said]:
    """Questions about a picture, drawn by `seed`, and their true answers."""
    asked = random.Random(seed).sample(picture.questions, min(_ASKED, len(picture.questions)))
    return [Said(one.text, speech.tokenizer.encode(f"{one.answer}<|im_end|>")) for one in asked]


def write_answers(folder: Path, minutes: float) -> None:
    """The stage `answers`: adds long greedy answers to captions to `folder`/answers.jsonl."""
    speech, real, path = new_speech(), RealPictures(), folder / "answers.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    clock = Clock(minutes, 0.0)
    while clock.seconds < clock.planned:
        rows = [question_about(TRAIN - 10**6 - n, real) for n in range(done, done + _TOGETHER)]
        with path.open("a") as file:
            for row, answer in zip(rows, generated(speech, rows)):
                file.write(json.dumps({**row, "answer": answer}) + "\n")
        done += _TOGETHER
        print(f"{done} answers, {clock.seconds:.0f} seconds", flush=True)


def question_about(seed: int, real: RealPictures) -> dict[str, Any]:
    """What is asked for a long answer: the caption of a picture, and a question drawn by its seed."""
    question = random.Random(f"long {seed}").choice(LONG)
    return {"seed": seed, "caption": picture_of(seed, real).caption, "question": question}


@torch.no_grad()
def generated(speech: Speech, rows: list[dict[str, Any]]) -> list[list[int]]:
    """The language model's greedy answers to questions about captions."""
    tokenizer = speech.tokenizer
    texts = [prompt(speech, row["caption"], row["question"]) for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    language: Any = speech.language
    found = language.generate(**batch, max_new_tokens=_LONGEST, do_sample=False)
    answers = found[:, batch.input_ids.shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]


def prompt(speech: Speech, caption: str, question: str) -> str:
    """A question about a picture that is described in words."""
    before, behind = (str(speech.tokenizer.decode(ids)) for ids in speech.prompt(question))
    return before + caption + behind


def new_eye(real: RealPictures) -> tuple[Eye, Words]:
    """A random tower and projector for the embedded language model, and the words of captions."""
    text = resolve("smollm2-135m")
    words = Words(AutoTokenizer.from_pretrained(text), more=real.captions())
    with safe_open(f"{text}/model.safetensors", "pt") as file:
        embeddings: Tensor = file.get_tensor("model.embed_tokens.weight")
    torch.manual_seed(0)
    return Eye(llava_config(AutoConfig.from_pretrained(text)), embeddings[words.ids].float()), words


def new_speech() -> Speech:
    """The embedded language model in float32."""
    text = resolve("smollm2-135m")
    language = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).eval()
    return Speech(language, AutoTokenizer.from_pretrained(text))


def export(folder: Path) -> None:
    """The stage `export`: tower and projector of the last stage, in bfloat16, with LLaVA's names, into the package."""
    last = next(path for path in (folder / "speak.pt", folder / "tower.pt") if path.exists())
    state = torch.load(last, weights_only=True)["eye"]
    tensors = {
        new + name.removeprefix(old): tensor.bfloat16().contiguous()
        for name, tensor in state.items()
        for old, new in _EXPORTED.items()
        if name.startswith(old)
    }
    save_file(tensors, WEIGHTS, {"format": "pt"})
    print(f"{last} → {WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB")


def load_exported(eye: Eye) -> None:
    """The package's tower and projector; the heads of the facts, which it lacks, stay random."""
    tensors = {
        old + name.removeprefix(new): tensor.float()
        for name, tensor in load_file(WEIGHTS).items()
        for old, new in _EXPORTED.items()
        if name.startswith(new)
    }
    lacking, unknown = eye.load_state_dict(tensors, strict=False)
    if unknown or any(not name.startswith("heads.") for name in lacking):
        raise SystemExit(f"{WEIGHTS} holds another tower: {[*unknown, *lacking]}; run the stage `tower` first.")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tower", "answers", "speak", "export"))
    parser.add_argument("--minutes", type=float, default=60, help="planned in all, earlier runs of the stage included")
    parser.add_argument("--folder", type=Path, default=Path("runs/multimodal-target"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.stage == "export":
        export(options.folder)
    else:
        stages = {"tower": train_tower, "answers": write_answers, "speak": train_speak}
        stages[options.stage](options.folder, options.minutes)


if __name__ == "__main__":
    main()
