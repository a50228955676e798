"""Train an EAGLE-3 drafter from Python: one to two minutes on two CPU cores.

    python examples/train.py [TEXT.jsonl]

TEXT holds conversations whose answers were written by the target (`vsd data regenerate`). Without TEXT the script
trains on a part of the text in the package. It prints the acceptance length τ on held-out prompts before and after.
"""

import sys
from importlib.resources import files
from pathlib import Path

from vsd.data import load_examples
from vsd.drafters import new_drafter
from vsd.features import FeatureStore
from vsd.targets import load_target
from vsd.training import DraftDataset, VSDConfig, VSDTrainer
from vsd.training.job import hold_out, prompt_of

OUT = Path("runs/example")
TEXT = Path(str(files("vsd"))) / "assets" / "smollm2-135m-text.jsonl.gz"


def main(text: str | Path = TEXT) -> None:
    target = load_target("smollm2-135m")  # or a hub id, a folder, a .gguf file
    examples = load_examples(text, target.tokenizer, max_length=512, on_bad_line="skip")[:72]
    examples, held_out = hold_out(examples, 8)
    dataset = DraftDataset(examples)
    vocabulary = dataset.draft_vocabulary(target.vocab_size, size=4096)
    drafter = new_drafter(target, vocabulary, "eagle3")  # random weights; or "lm", a small language model
    config = VSDConfig(
        output_dir=str(OUT),
        objective="eagle3",  # the README lists the others
        draft_steps=3,  # K
        ramp=0.7,  # K grows from 1 to 3 over 70 % of the time
        max_minutes=0.75,
        learning_rate=2e-3,
        per_device_train_batch_size=4,
        eval_max_new_tokens=32,
        save_strategy="no",
    )
    layers = drafter.needs.layers
    features = FeatureStore.build(OUT / "features", target, examples, layers)  # one target pass over the text
    prompts = [prompt_of(example) for example in held_out]
    trainer = VSDTrainer(target, drafter, config, dataset, features=features, eval_prompts=prompts)
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    after = trainer.evaluate()["eval_tau"]
    trainer.save_model(str(OUT / "drafter"))
    print(f"τ on {len(prompts)} held-out prompts: {before:.2f} before, {after:.2f} after; drafter: {OUT / 'drafter'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
