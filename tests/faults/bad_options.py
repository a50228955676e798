"""Recipes that are no recipes, and options with values of a wrong type or without meaning."""

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal, Union, get_args, get_origin

from case import Case, Outcome, Rule, Workshop, refused
from vsd.cli import DATA, VSD
from vsd.cli.parser import Command, flag
from vsd.objective import OBJECTIVES
from vsd.options import MeasurementOptions, ObjectiveOptions, OptimisationOptions, TrainJob

COMMANDS = {name: c for name, c in {**VSD.commands, **DATA.commands}.items() if isinstance(c, Command)}
INTEGERS, NUMBERS = ["x", "1.5", "[1]", "{a: 1}", "''", "1e400"], ["x", "[1]", "{a: 1}", "''", "--"]
TYPES: dict[Any, list[str]] = {
    int: INTEGERS,
    float: NUMBERS,
    bool: ["maybe", "2", "[true]", "''"],
    str: ["[1]", "{a: 1}", "null"],
    list: ["7", "{a: 1}"],
    dict: ["7", "[1]", "text"],
}
COUNT, POSITIVE, SHARE = ["0", "-1"], ["0", "-1", "nan", "inf"], ["-0.5", "1.5", "nan"]
DECAY = ["1", "2", "-0.5", "nan"]
AMOUNT, SEED = ["-1", "nan", "inf"], ["-1", str(2**32), str(2**70)]
RANGES: dict[str, dict[str, list[str]]] = {
    "regenerate": {
        **dict.fromkeys(["limit", "batch_size", "max_length", "max_new_tokens", "concurrency"], COUNT),
        **{"temperature": AMOUNT, "seed": SEED, "requests_per_second": POSITIVE},
    },
    "synthesize": {
        **dict.fromkeys(["tokens", "conversations", "batch_size", "max_new_tokens"], COUNT),
        **{"temperature": AMOUNT, "prompt_temperature": AMOUNT, "seed": SEED},
    },
    "check": {"max_length": COUNT},
    "bench": {"limit": COUNT, "max_new_tokens": COUNT, "temperature": AMOUNT, "seed": SEED},
    "tune": {"limit": COUNT, "max_new_tokens": COUNT},
    "generate": {
        **{"max_new_tokens": COUNT, "temperature": AMOUNT, "seed": SEED, "sample_top_k": ["-1"]},
        **{"top_p": ["0", "-1", "1.5", "nan"], "min_p": SHARE, "repetition_penalty": POSITIVE},
    },
    "demo": {"minutes": [*POSITIVE, "0.5"], "seed": SEED},
}
TRAINING = {
    **dict.fromkeys(["max_length", "draft_vocab_size", "draft_steps", "eval_max_new_tokens", "eval_batch"], COUNT),
    **dict.fromkeys(["per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit"], COUNT),
    **dict.fromkeys(["eval_steps", "logging_steps", "save_steps", "num_train_epochs", "temperature"], POSITIVE),
    **dict.fromkeys(["learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"], AMOUNT),
    **{
        "max_minutes": POSITIVE,
        "ramp": SHARE,
        "seed": SEED,
        "held_out": ["-1", "24", "1000"],
        "max_steps": ["-2", "0"],
    },
    **dict.fromkeys(["adam_beta1", "adam_beta2"], DECAY),
    **{"dataloader_num_workers": ["-1"], "lr_scheduler_type": ["spiral"], "optim": ["bold"], "family": ["eagle4"]},
    **{"save_strategy": ["often"], "objective": ["eagle4", "''"], "features": ["nowhere", "''"]},
    **{
        "report_to": ["nobody", "codecarbon"],
        "tree": ["5", "5x", "0x1x2", "axbxc", "5x4x999", "5x4x12x2", "''"],
        "device": ["abacus"],
    },
    **{
        "drafter": ["nowhere", "''"],
        "target": ["./nowhere", "no.gguf", "''"],
        "dtype": ["float7"],
        "data": ["[]", "[7]", "''"],
    },
    **{"on_bad_line": ["explode"], "output_dir": ["''"]},
}
DRAFTER = {
    "num_attention_heads": ["0", "-4", "3", "x", "1.5", "null"],
    "num_key_value_heads": ["0", "3", "-1"],
    "hidden_size": ["0", "-8", "x", "null"],
    "intermediate_size": ["0", "-8", "x"],
    "head_dim": ["0", "-8", "7", "x"],
    "aux_layers": ["[]", "[99]", "[-1]", "x", "7", "[a]", "[0.5]", "[1, 1, 1, 99]"],
    "vocab_size": ["0", "1000000", "x"],
    "draft_vocab_size": ["0", "1000000", "x"],
    "hidden_act": ["nothing", "7"],
    "rms_norm_eps": ["x"],
    "rope_parameters": ["7", "{rope_type: spiral}"],
    "no_such_field": ["1"],
}
IMPOSSIBLE: dict[str, tuple[list[str], str]] = {
    "a draft vocabulary of lm": (["family=lm", "draft_vocab_size=64"], "draft_vocab_size: .* lm .*leave it out"),
    "a draft vocabulary of dflash2": (["family=dflash2", "draft_vocab_size=64"], "draft_vocab_size: .* dflash2 "),
    "a draft vocabulary of a given drafter": (["drafter={shop}/drafter", "draft_vocab_size=64"], "draft_vocab_size is"),
    "a draft vocabulary of a start": (
        ["drafter={shop}/drafter", "family=peagle", "draft_vocab_size=64"],
        "draft_vocab_size is",
    ),
    "options of a given drafter": (
        ["drafter={shop}/drafter", "drafter_options.hidden_act=relu"],
        "drafter_options are",
    ),
    "lm from eagle3": (["drafter={shop}/drafter", "family=lm"], "leave out family .*leave out drafter"),
    "eagle3 from lm": (["drafter={shop}/lm", "family=eagle3"], "Draft model.* eagle3 starts: leave out family"),
    "peagle from lm": (["drafter={shop}/lm", "family=peagle"], "starts from an EAGLE-3 drafter.*leave out family"),
    "layers of a start": (
        ["drafter={shop}/drafter", "family=peagle", "drafter_options.aux_layers=[0, 1, 2]"],
        "drafter_options: the given drafter decides aux_layers",
    ),
    "online with another family": (["online=true", "drafter={shop}/drafter", "family=peagle"], "leave out family"),
    "answer_tokens without online": (["answer_tokens=9"], "answer_tokens: .*--online"),
    "replay and buffer without online": (["replay=1", "buffer=9"], "replay, buffer: .*--online"),
    "locality of eagle3": (["locality=0.2"], "locality is for a new block drafter"),
    "locality of corrected blocks": (
        ["drafter={shop}/dflash", "family=dflash2", "locality=0"],
        "locality is for a new block drafter",
    ),
    "locality of a given drafter": (["drafter={shop}/drafter", "locality=0"], "locality is for a new block drafter"),
    "patience without τ": (["patience=2"], "patience .*--held-out"),
    "layers of lm": (["family=lm", "drafter_options.aux_layers=[1]"], "no field aux_layers: leave it out"),
    "heads of lm": (["family=lm", "drafter_options.num_attention_heads=3"], "num_attention_heads.*family lm"),
    "lm without layers": (["family=lm", "drafter_options.num_hidden_layers=0"], "num_hidden_layers must be at least 1"),
    "a block drafter without layers": (["family=peagle", "drafter_options.num_hidden_layers=0"], "num_hidden_layers "),
    "a mask that is no token": (["family=dspark", "drafter_options.mask_token_id=128"], "mask_token_id must be"),
    "a rank of another family": (["family=dspark", "drafter_options.selector_rank=4"], "no field selector_rank"),
    "an option of transformers": (["drafter_options.use_cache=false"], "no field use_cache"),
    "a tied draft head": (["drafter_options.tie_word_embeddings=true"], "no field tie_word_embeddings"),
    "a dtype of the drafter": (["drafter_options.dtype=float16"], "drafter_options: dtype is"),
    "another model type": (["family=lm", "drafter_options.model_type=x"], "drafter_options: model_type is"),
    "draft_vocab_size as a field": (
        ["drafter_options.draft_vocab_size=32"],
        "draft_vocab_size is an option of its own",
    ),
}
RECIPES: dict[str, bytes] = {
    "not YAML": b"data: [a.jsonl\nseed: 1\n",
    "no mapping": b"- data\n- seed\n",
    "text": b"train well\n",
    "empty": b"",
    "binary": b"\x00\x01\x02\xff\xfe",
    "not UTF-8": "data: f\xfcnf\n".encode("latin-1"),
    "a tab": b"data:\n\t- a.jsonl\n",
    "an unknown key": b"data: a.jsonl\nleaning_rate: 1\n",
    "a number as key": b"data: a.jsonl\n7: 1\n",
    "null as key": b"data: a.jsonl\n~: 1\n",
    "a list as key": b"data: a.jsonl\n? [1, 2]\n: 3\n",
    "code": b"data: !!python/object/apply:os.system ['touch ran']\n",
    "itself": b"data: a.jsonl\nobjective_options: &a\n  anchors: *a\n",
    "two documents": b"data: a.jsonl\n---\nseed: 1\n",
    "a torn record": b'{"data": ["a.jsonl"], "seed": 4',
    "too deep": b"data: " + b"[" * 1000 + b"]" * 1000,
    "a date": b"data: a.jsonl\nseed: 2020-01-01\n",
}


def kind_of(annotation: Any) -> Any:
    """The type of an option's values; null and lists of strings aside."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
        return kind_of(kinds[0]) if len(kinds) == 1 else None
    return get_origin(annotation) or annotation


def typed(words: Callable[[Workshop, Path, str, str], list[str]], fields: dict[str, Any]) -> Rule:
    """An option with a value of another type."""
    kinds = {name: kind for name, kind in ((n, kind_of(k)) for n, k in fields.items()) if kind in TYPES}

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        name = random.choice(list(kinds))
        value = random.choice([v for v in TYPES[kinds[name]] if not (v == "null" and "None" in str(fields[name]))])
        return Case(words(shop, folder, name, value), refused(name))

    return rule


def ranged(words: Callable[[Workshop, Path, str, str], list[str]], values: dict[str, list[str]]) -> Rule:
    """An option with a value that has no meaning."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        name = random.choice(list(values))
        value = random.choice(values[name])
        other = {"output_dir": "output", "data": "training text|no file|holds no", "held_out": "held out"}.get(
            name, name
        )
        said = f"|{value}" if value.isalpha() and len(value) > 4 else ""
        return Case(words(shop, folder, name, value), refused(f"{name}|{flag(name)}|{other}{said}"))

    return rule


def setting(shop: Workshop, folder: Path, name: str, value: str) -> list[str]:
    """`vsd train --set`, or the same line in a recipe."""
    return shop.train(folder / "run", f"{name}={value}")


def in_recipe(shop: Workshop, folder: Path, name: str, value: str) -> list[str]:
    """A recipe with this line."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"data: {shop / 'text.jsonl'}\ntarget: {shop / 'target'}\nmax_steps: 1\nuse_cpu: true\nheld_out: 0\n"
    )
    kept = [line for line in recipe.read_text().splitlines() if not line.startswith(f"{name}:")]
    recipe.write_text("\n".join([*kept, f"{name}: {value}", ""]))
    out = [] if name == "output_dir" else ["--output-dir", str(folder / "run")]
    return ["train", "--config", str(recipe), *out, "--set", "report_to=none"][: None if name != "report_to" else -2]


def of_drafter(shop: Workshop, folder: Path, name: str, value: str) -> list[str]:
    """A field of a new drafter's configuration."""
    return shop.train(folder / "run", f"drafter_options={{{name}: {value}}}")


def whole_recipe(name: str) -> Rule:
    """A file that is no recipe."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        recipe = folder / "recipe.yaml"
        recipe.write_bytes(RECIPES[name])
        out = str(folder / "run")
        return Case(
            ["train", "--config", str(recipe), "--output-dir", out], refused(r"recipe\.yaml|option|\w+ must be")
        )

    return rule


def objective_option(shop: Workshop, folder: Path, random: Random) -> Case:
    """An objective's option with a value of another type, or without meaning, or one that it does not have."""
    name = random.choice(list(OBJECTIVES))
    value = random.choice(["anchors: x", "anchors: 0", "no_such: 1", "smoothing: x", "tree: 0", "7: 1", "samples: nan"])
    words = shop.train(folder / "run", f"objective={name}", f"objective_options={{{value}}}")
    return Case(words, refused(f"objective {name}|{value.partition(':')[0]}"))


def impossible(name: str) -> Rule:
    """Options that a drafter, its family or the kind of training cannot take."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        options, names = IMPOSSIBLE[name]
        words = shop.train(folder / "run", *(option.format(shop=shop.root) for option in options))

        def wrong(found: Outcome) -> str:
            features = "features were computed" if (folder / "run").exists() else ""
            return refused(names)(found) or features

        return Case(words, wrong)

    return rule


def words_of(command: str) -> Callable[[Workshop, Path, str, str], list[str]]:
    """The command with one more flag."""
    group = ["data"] if command in DATA.commands else []

    def words(shop: Workshop, folder: Path, name: str, value: str) -> list[str]:
        prompts, out = str(shop / "prompts.jsonl"), ["--out", str(folder / "out.jsonl")]
        server = ["--server", "http://127.0.0.1:9", "--model", "m"] if name == "concurrency" else []
        needed: dict[str, list[str]] = {
            "regenerate": [prompts, *out, *server],
            "synthesize": [*out, *([] if name == "conversations" else ["--conversations", "2"])],
            "check": [str(shop / "text.jsonl")],
            "bench": ["--prompts", prompts],
            "tune": ["--drafter", str(shop / "drafter"), "--prompts", prompts],
            "generate": ["hi"],
        }
        target = [] if command == "demo" else shop.named
        return [*group, command, *needed.get(command, out), *target, flag(name) + "=" + value]

    return words


def usage(shop: Workshop, folder: Path, random: Random) -> Case:
    """A flag with a value of another type, or one that the command does not have: status 2."""
    name = random.choice([name for name in COMMANDS if name != "objectives"])
    fields = {f.name: kind_of(f.type) for o in COMMANDS[name].options for f in dataclasses.fields(o)}
    kinds = {f: k for f, k in fields.items() if k in (int, float) or get_origin(k) is Literal}
    group = ["data"] if name in DATA.commands else []
    if not kinds or random.random() < 0.3:
        return Case([*group, name, "--no-such-flag", "7"], refused("--no-such-flag", code=2))
    field = random.choice(list(kinds))
    value = random.choice(["x", "[1]", "{a: 1}", "1,5", "0x", "\n", ""])
    return Case([*group, name, flag(field), value], refused(flag(field), code=2))


def out_of_range(command: str) -> Rule:
    """A flag without meaning."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        name = random.choice(list(RANGES[command]))
        value = random.choice(RANGES[command][name])
        code = 2 if value in ("nan", "inf") else 1  # no number as flags write it: a mistake in the flag
        return Case(
            words_of(command)(shop, folder, name, value),
            refused(f"{name}|{name.removeprefix('sample_')}|{flag(name)}", code),
        )

    return rule


SETTINGS = {
    f.name: f.type
    for kind in (TrainJob, ObjectiveOptions, OptimisationOptions, MeasurementOptions)
    for f in dataclasses.fields(kind)
}
FLAGS = {"target", "dtype", "device", "data", "output_dir", "held_out", "draft_vocab_size"}  # of `Workshop.train`
NOT_FLAGS = {name: kind for name, kind in SETTINGS.items() if name not in FLAGS}  # a flag has precedence over --set
NOT_FLAG_RANGES = {name: values for name, values in TRAINING.items() if name not in FLAGS}
RULES: dict[str, Rule] = {
    **{f"recipe: {name}": whole_recipe(name) for name in RECIPES},
    **{f"recipe: type {n}": typed(in_recipe, SETTINGS) for n in range(3)},
    **{f"recipe: range {n}": ranged(in_recipe, TRAINING) for n in range(8)},
    **{f"--set: type {n}": typed(setting, NOT_FLAGS) for n in range(6)},
    **{f"--set: range {n}": ranged(setting, NOT_FLAG_RANGES) for n in range(16)},
    **{f"drafter option {n}": ranged(of_drafter, DRAFTER) for n in range(8)},
    **{f"objective option {n}": objective_option for n in range(4)},
    **{f"impossible: {name}": impossible(name) for name in IMPOSSIBLE},
    **{f"usage {n}": usage for n in range(6)},
    **{f"range: {command} {n}": out_of_range(command) for command in RANGES for n in range(3)},
}
