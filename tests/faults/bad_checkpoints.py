"""Drafters, targets, exported results and feature stores that are damaged, or belong to something else."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from case import Case, Rule, Workshop, refused
from vsd.data import load_examples
from vsd.features import FeatureStore

Damage = Callable[[Path, Random], None]
FORMATS = ["drafter", "eagle3", "peagle", "dflash", "dspark", "lm"]
VALUES = [None, "x", "", -1, 0, 1.5, 2**70, True, [], [1], {}, {"a": 1}]
FIELDS = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"]
FIELDS += ["draft_vocab_size", "rms_norm_eps", "hidden_act", "architectures", "model_type", "max_position_embeddings"]
FIELDS += ["aux_layers", "eagle_aux_hidden_state_layer_ids", "rope_parameters", "num_hidden_layers", "dtype"]


def weights(folder: Path) -> Path:
    """The file of the weights."""
    return folder / "model.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(weights(folder))
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, weights(folder), metadata={"format": "pt"})


def matrix(tensors: dict[str, Tensor], random: Random) -> str:
    """The name of some weight."""
    return random.choice(sorted(name for name, x in tensors.items() if x.is_floating_point()))


def truncated(folder: Path, random: Random) -> None:
    whole = weights(folder).read_bytes()
    weights(folder).write_bytes(whole[: random.choice([0, 4, 8, 100, len(whole) // 2, len(whole) - 1])])


def garbage(folder: Path, random: Random) -> None:
    weights(folder).write_bytes(random.randbytes(random.choice([1, 100, 5000])))


def pickled(folder: Path, random: Random) -> None:
    weights(folder).rename(folder / "pytorch_model.bin")


def a_file(folder: Path, random: Random) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def no_config(folder: Path, random: Random) -> None:
    (folder / "config.json").unlink()


def torn_config(folder: Path, random: Random) -> None:
    whole = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(whole[: random.randrange(len(whole))])


def other_config(folder: Path, random: Random) -> None:
    (folder / "config.json").write_text(json.dumps(random.choice([[], 7, "text", None, {}, {"architectures": 7}])))


def lacking(folder: Path, random: Random) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[matrix(tensors, random)]

    rewrite(folder, change)


def surplus(folder: Path, random: Random) -> None:
    rewrite(folder, lambda tensors: tensors.update({"surplus.weight": torch.ones(3)}))


def misshapen(folder: Path, random: Random) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = matrix(tensors, random)
        x = tensors[name]
        tensors[name] = random.choice([x[:-1], torch.cat([x, x]), x[None], x.flatten()[:5]])

    rewrite(folder, change)


def unsound(folder: Path, random: Random) -> None:
    """NaN or infinity in one weight."""

    def change(tensors: dict[str, Tensor]) -> None:
        flat = tensors[matrix(tensors, random)].view(-1)
        flat[random.randrange(len(flat))] = random.choice([float("nan"), float("inf"), -float("inf")])

    rewrite(folder, change)


def mapped(change: Callable[[Tensor, Random], Tensor], keep_mask: bool = True) -> Damage:
    """A changed d2t."""

    def damage(folder: Path, random: Random) -> None:
        def edit(tensors: dict[str, Tensor]) -> None:
            tensors["d2t"] = change(tensors["d2t"], random)
            if not keep_mask:
                tensors.pop("t2d")

        rewrite(folder, edit)

    return damage


def absolute(d2t: Tensor, random: Random) -> Tensor:
    return d2t + torch.arange(len(d2t))


def shuffled(d2t: Tensor, random: Random) -> Tensor:
    return torch.tensor(random.sample(d2t.tolist(), len(d2t))) + torch.tensor([5] + [0] * (len(d2t) - 1))


def beyond(d2t: Tensor, random: Random) -> Tensor:
    return d2t + random.choice([10**6, -(10**6), 2**62])


COMMON: dict[str, Damage] = {
    "truncated weights": truncated,
    "weights that are none": garbage,
    "pickled weights": pickled,
    "no weights": lambda folder, random: weights(folder).unlink(),
    "no config.json": no_config,
    "half a config.json": torn_config,
    "another config.json": other_config,
    "a missing tensor": lacking,
    "a tensor of another shape": misshapen,
}
OF_DRAFTERS: dict[str, Damage] = {
    "NaN or infinity": unsound,
    "not a folder": a_file,
}
MAPS: dict[str, Damage] = {
    "a surplus tensor": surplus,
    "absolute d2t": mapped(absolute),
    "absolute d2t without t2d": mapped(absolute, keep_mask=False),
    "d2t in another order": mapped(shuffled),
    "d2t of another target": mapped(beyond),
    "d2t of another length": mapped(lambda d2t, random: d2t[:-1]),
}


def reading(shop: Workshop, drafter: Path, folder: Path, random: Random) -> list[str]:
    """A command that reads a drafter."""
    import_ = ["import", str(drafter), str(folder / "out"), *shop.named]
    export = ["export", "--format", random.choice(["vllm", "sglang"]), str(drafter), str(folder / "out"), *shop.named]
    generate = ["generate", "hi", "--drafter", str(drafter), *shop.named, "--max-new-tokens", "4"]
    bench = ["bench", "--prompts", str(shop / "prompts.jsonl"), "--drafter", str(drafter), *shop.named]
    return random.choice([import_, import_, export, generate, bench, shop.train(folder / "run", f"drafter={drafter}")])


def drafter_rule(damage: Damage, formats: list[str]) -> Rule:
    """A damaged drafter in one of the formats."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        name = random.choice(formats)
        shutil.copytree(shop / name, folder / name)
        damage(folder / name, random)
        return Case(
            reading(shop, folder / name, folder, random), refused(rf"{folder / name}|'\w+_proj|the config says")
        )

    return rule


def field_rule(shop: Workshop, folder: Path, random: Random) -> Case:
    """A released drafter whose config.json has a field of another kind: refused, or read if the field may be absent."""
    name = random.choice(FORMATS[1:])
    shutil.copytree(shop / name, folder / name)
    config = json.loads((folder / name / "config.json").read_text())
    field, value = random.choice([f for f in FIELDS if f in config]), random.choice(VALUES)
    (folder / name / "config.json").write_text(json.dumps({**config, field: value}))
    demand = refused("")
    words = ["import", str(folder / name), str(folder / "out"), *shop.named]
    return Case(words, lambda found: "" if found.code == 0 and not found.err else demand(found))


def target_rule(name: str) -> Rule:
    """A damaged target."""
    damage = {**COMMON, **TOKENIZERS}[name]

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        target = folder / "target"
        shutil.copytree(shop / "target", target)
        damage(target, random)
        generate = ["generate", "hi", "--max-new-tokens", "4"]
        export = ["export", "--format", "vllm", str(shop / "eagle3"), str(folder / "out")]
        check = ["data", "check", str(shop / "text.jsonl")]
        reads_all = name in ("a missing tensor", "a tensor of another shape")
        words = generate if reads_all else check if name in TOKENIZERS else random.choice([generate, export])
        return Case([*words, "--target", str(target), "--dtype", "float32"], refused(re.escape(str(target))))

    return rule


def without_tokenizer(folder: Path, random: Random) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def torn_tokenizer(folder: Path, random: Random) -> None:
    file = folder / random.choice(["tokenizer.json", "tokenizer_config.json"])
    whole = file.read_text()
    file.write_text(whole[: random.randrange(1, len(whole) - 2)])


def other_tokenizer(folder: Path, random: Random) -> None:
    (folder / "tokenizer.json").write_text(random.choice(["{}", "[]", '{"model": 7}', "7"]))


TOKENIZERS: dict[str, Damage] = {
    "no tokenizer": without_tokenizer,
    "half a tokenizer": torn_tokenizer,
    "another tokenizer": other_tokenizer,
}


def gguf(shop: Workshop, folder: Path, random: Random) -> Case:
    """A file that is no GGUF file."""
    file = folder / "model.gguf"
    file.write_bytes(random.choice([b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, random.randbytes(500)]))
    return Case(["generate", "hi", "--target", str(file)], refused(re.escape(str(file))))


def report(shop: Workshop, folder: Path, random: Random) -> Case:
    """A model card that is to quote something else than results."""
    file = folder / "bench.json"
    file.write_text(random.choice(["", "{", "[]", "7", "{}", '{"runs": 7}', '{"runs": [{"drafter": "a"}]}', "x"]))
    words = ["export", "--format", "vllm", str(shop / "eagle3"), str(folder / "out"), "--bench", str(file)]

    def wrong(found: Any) -> str:
        return refused(re.escape(str(file)))(found) or ("a folder is left" if (folder / "out").exists() else "")

    return Case([*words, *shop.named], wrong)


def shard(store: Path) -> Path:
    """The first shard of a feature store."""
    return store / "features-00000.safetensors"


def cut_shard(store: Path, random: Random) -> None:
    whole = shard(store).read_bytes()
    shard(store).write_bytes(whole[: random.choice([0, 7, 100, len(whole) // 2, len(whole) - 1])])


def shorter_shard(store: Path, random: Random) -> None:
    tensors = load_file(shard(store))
    name = random.choice(sorted(tensors))
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]]) if random.random() < 0.5 else tensors[name][:-1]
    save_file(tensors, shard(store))


def incomplete_shard(store: Path, random: Random) -> None:
    tensors = load_file(shard(store))
    tensors.pop(random.choice(sorted(tensors)))
    save_file(tensors, shard(store))


def other_manifest(store: Path, random: Random) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest[random.choice(sorted(manifest))] = random.choice(["other", 7, None, [], ""])
    (store / "manifest.json").write_text(json.dumps(manifest))


def torn_manifest(store: Path, random: Random) -> None:
    (store / "manifest.json").write_text(random.choice(["", "{", "[]", "7", "null", '{"target": ', "\x00"]))


STORES: dict[str, Damage] = {
    "a truncated shard": cut_shard,
    "a shard of another shape": shorter_shard,
    "an incomplete shard": incomplete_shard,
    "a manifest of another run": other_manifest,
    "a manifest that is none": torn_manifest,
}


def store_rule(damage: Damage) -> Rule:
    """A damaged feature store that a run is to use."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        store, kept = folder / "features", shop / "features"
        if not kept.exists():
            examples = load_examples(shop / "text.jsonl", shop.target.tokenizer, 2048)
            FeatureStore.build(kept, shop.target, examples, (0, 2, 3))
        shutil.copytree(kept, store)
        damage(store, random)
        held = random.choice([[], ["objective=vsd"]])  # with the target's ends alone, or with all of it
        return Case(shop.train(folder / "run", f"features={store}", *held), refused(re.escape(str(store))))

    return rule


RULES: dict[str, Rule] = {
    **{f"drafter: {name}": drafter_rule(damage, FORMATS) for name, damage in {**COMMON, **OF_DRAFTERS}.items()},
    **{f"drafter: {name}": drafter_rule(damage, FORMATS[:2]) for name, damage in MAPS.items()},
    **{f"drafter: field {n}": field_rule for n in range(10)},
    **{f"target: {name}": target_rule(name) for name in {**COMMON, **TOKENIZERS}},
    "target: GGUF": gguf,
    **{f"export: results {n}": report for n in range(2)},
    **{f"store: {name}": store_rule(damage) for name, damage in STORES.items()},
}
