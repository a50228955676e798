"""`vsd`: the command line. Every command is a thin layer over a Python function that does the work."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vsd import __version__
from vsd.allocator import keep_freed_memory
from vsd.errors import VSDError

_EXAMPLES = {
    "vsd": """\
examples:
  vsd demo                                                 train a drafter in ten minutes and see what it saves
  vsd data regenerate prompts.jsonl --target T --out text.jsonl
  vsd train --target T --data text.jsonl --output-dir runs/mine
  vsd bench --target T --drafter runs/mine/drafter --prompts prompts.jsonl
  vsd generate --target T --drafter runs/mine/drafter "Why is the sky blue?"

A target T is a hub id, a folder, a .gguf file, or smollm2-135m, which comes with a PyPI wheel and is the default.""",
    "regenerate": """\
examples:
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --max-new-tokens 512
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --server http://localhost:8000 --model NAME
With --server a running vLLM, SGLang or other OpenAI-compatible server answers (key: $OPENAI_API_KEY); of the target
only the tokenizer is loaded. Run it again after an interruption: nothing is lost, nothing is done twice.""",
    "synthesize": """\
example:
  vsd data synthesize --target T --out text.jsonl --tokens 1000000
Needs no data set: the target writes the questions too. Run it again to continue, or with more --tokens to extend.""",
    "train": """\
examples:
  vsd train --target T --data text.jsonl --output-dir runs/mine
  vsd train --config recipe.yaml --set learning_rate=5e-4 num_train_epochs=3
  vsd train --config recipe.yaml --resume
  torchrun --nproc-per-node 8 --no-python vsd train --config recipe.yaml
A recipe is YAML: the long options below with _ for -, and any field of transformers.TrainingArguments.
The trained drafter is OUTPUT_DIR/drafter; curves: tensorboard --logdir OUTPUT_DIR""",
    "generate": """\
examples:
  vsd generate --drafter runs/mine/drafter "Write a haiku about the sea."
  echo "Why is the sky blue?" | vsd generate --temperature 0.8 --top-p 0.95
Accepted draft tokens are shown in green, the target's own in the terminal's colour.""",
    "bench": """\
example:
  vsd bench --target T --drafter runs/a/drafter --drafter runs/b/drafter --prompts mt.jsonl --json out.json""",
    "tune": """\
example:
  vsd tune --target T --drafter runs/mine/drafter --prompts prompts.jsonl
Prints --depth, --top-k, --nodes, --p-min and --lookup for vsd generate and vsd bench.""",
    "export": """\
example:
  vsd export --target T --format sglang runs/mine/drafter exported --bench runs/mine/bench.json
Formats: sglang and vllm (LlamaForCausalLMEagle3), speculators (vLLM by way of that library).""",
    "import": """\
example:
  vsd import --target T released-checkpoint runs/released/drafter
Then measure it (vsd bench --drafter runs/released/drafter) or train it on your own traffic (vsd train --drafter …).""",
    "demo": """\
example:
  vsd demo --minutes 10 --out runs/demo
Trains on text that SmolLM2-135M wrote itself, then answers held-out questions with and without the drafter.""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 with one line on stderr for a mistake, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    keep_freed_memory()
    _quiet()
    try:
        arguments.run(arguments)
    except VSDError as error:
        print(f"vsd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vsd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _quiet() -> None:
    """No load reports and weight bars of transformers between our own output."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _command(argparse.ArgumentParser, "vsd", "Train, measure and run draft models for speculative decoding.")
    parser.add_argument("--version", action="version", version=f"vsd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = commands.add_parser("data", help="make training text with the target", description=_HELP["data"])
    data_commands = data.add_subparsers(required=True, metavar="COMMAND")
    _add(data_commands, "regenerate", _regenerate, _regenerate_options)
    _add(data_commands, "synthesize", _synthesize, _synthesize_options)
    _add(commands, "train", _train, _train_options)
    _add(commands, "generate", _generate, _generate_options)
    _add(commands, "bench", _bench, _bench_options)
    _add(commands, "tune", _tune, _tune_options)
    _add(commands, "export", _export, _export_options)
    _add(commands, "import", _import, _import_options)
    _add(commands, "demo", _demo, _demo_options)
    return parser


_HELP = {
    "data": "Make training text: a drafter learns to predict the target, so the target must have written it.",
    "regenerate": "Replace the answers of conversations with the target's own.",
    "synthesize": "Let the target write questions and answers.",
    "train": "Train an EAGLE-3 drafter.",
    "generate": "Answer a question, drafting.",
    "bench": "Measure acceptance and speed of drafters against plain decoding.",
    "tune": "Find the draft tree that is fastest on this machine.",
    "export": "Write a drafter as SGLang or vLLM serve it.",
    "import": "Take in a released EAGLE-3 drafter, to measure or to train on.",
    "demo": "The whole road on a small model: train, then measure.",
}


def _command(make: Callable[..., Any], name: str, description: str) -> argparse.ArgumentParser:
    return make(
        name,
        description=description,
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add(commands: Any, name: str, run: Callable[[Any], None], options: Callable[[Any], None]) -> None:
    parser = _command(
        lambda n, **kw: commands.add_parser(n, help=_HELP[n][0].lower() + _HELP[n][1:-1], **kw),
        name,
        _HELP[name],
    )
    options(parser)
    parser.set_defaults(run=run)


def _target_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("target")
    group.add_argument("--target", default="smollm2-135m", help="hub id, folder, .gguf file (default: smollm2-135m)")
    group.add_argument("--dtype", default="auto", help="auto (the fastest here), float32, bfloat16, float16")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the hub repository ships")


def _load_target(a: argparse.Namespace) -> Any:
    from vsd.targets import load_target

    return load_target(
        a.target,
        dtype=a.dtype,
        device=a.device,
        revision=a.revision,
        trust_remote_code=a.trust_remote_code,
        compiled=getattr(a, "compile", False),
    )


def _tree_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("draft tree")
    group.add_argument("--depth", type=int, default=5, help="tokens drafted ahead (default 5)")
    group.add_argument("--top-k", type=int, default=4, help="beam width; 1 drafts a chain (default 4)")
    group.add_argument("--nodes", type=int, help="nodes verified in a pass, root included (default 12; chain: all)")
    group.add_argument(
        "--p-min", type=float, default=0.0, help="leave out what the drafter finds less probable (default 0: nothing)"
    )
    group.add_argument(
        "--lookup", type=int, default=0, help="copy so many tokens from where the newest ones stood before (default 0)"
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the target's passes: takes a minute or two"
    )
    group.add_argument(
        "--verification",
        choices=["auto", "rejection"],
        default="auto",
        help="rejection: sampled chains (Leviathan et al.), for temperature > 0 and --top-k 1",
    )


def _shape(a: argparse.Namespace) -> Any:
    from vsd.paths import TreeShape

    nodes = a.nodes if a.nodes is not None else a.depth + 1 if a.top_k == 1 else 12
    return TreeShape(a.depth, a.top_k, nodes, a.p_min, a.lookup)


def _sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int, several: bool = False) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"default {max_new_tokens}")
    if several:
        parser.add_argument("--temperature", type=float, nargs="+", default=[0.0], help="one or more; 0 is greedy")
    else:
        parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0)


def _bad_line_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-bad-line",
        choices=["fatal", "skip"],
        default="fatal",
        help="stop at an unusable line, or report and skip",
    )


def _warn(line: str) -> None:
    print(f"vsd: skipped {line}", file=sys.stderr)


# ---- data


def _regenerate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="JSONL (messages, conversations, turns, prompt), .txt, or a hub dataset's name")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write; resumed if it exists")
    parser.add_argument("--limit", type=int, help="only the first so many conversations")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=2048, help="longest prompt and answer, in tokens")
    _sampling_options(parser, 256)
    _bad_line_option(parser)
    _target_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--server", metavar="URL", help="ask this server instead, e.g. http://localhost:8000")
    group.add_argument("--model", metavar="NAME", help="the name under which it serves the target")
    group.add_argument("--concurrency", type=int, default=32, help="questions asked at once (default 32)")
    group.add_argument("--requests-per-second", type=float, metavar="R", help="ask no more often")


def _regenerate(a: argparse.Namespace) -> None:
    from itertools import chain, islice

    from vsd.data import Server, ServerTeacher, TargetTeacher, Teacher, read_conversations, regenerate
    from vsd.targets import load_lexicon

    if (a.server is None) != (a.model is None):
        raise VSDError("a server and the name of its model go together: --server URL --model NAME")
    server = None if a.server is None else Server(a.server, a.model, a.requests_per_second)
    conversations = read_conversations(a.source, on_bad_line=a.on_bad_line, report=_warn, need_answer=False)
    first = next(conversations)  # a missing or unreadable source is known before the target is loaded
    given = islice(chain([first], conversations), a.limit)
    teacher: Teacher
    if server is None:
        teacher = TargetTeacher(_load_target(a), a.batch_size)
    else:
        info = load_lexicon(a.target, revision=a.revision, trust_remote_code=a.trust_remote_code)
        teacher = ServerTeacher(server, info, a.concurrency)
    summary = regenerate(
        teacher,
        given,
        a.out,
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        seed=a.seed,
        max_length=a.max_length,
        on_bad_line=a.on_bad_line,
        report=_warn,
    )
    print(f"{a.out}: {summary.written} answers, {summary.tokens} tokens, {summary.skipped} skipped")


def _synthesize_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write; resumed if it exists")
    parser.add_argument("--conversations", type=int, help="stop after so many conversations")
    parser.add_argument("--tokens", type=int, help="stop after so many answer tokens")
    parser.add_argument("--prompt-temperature", type=float, default=1.0, help="of the questions (default 1)")
    parser.add_argument("--batch-size", type=int, default=64)
    _sampling_options(parser, 256)
    _target_options(parser)


def _synthesize(a: argparse.Namespace) -> None:
    from vsd.data import synthesize

    if a.conversations is None and a.tokens is None:
        raise VSDError("say how much to write: --tokens N or --conversations N")
    summary = synthesize(
        _load_target(a),
        a.out,
        conversations=a.conversations,
        tokens=a.tokens,
        max_new_tokens=a.max_new_tokens,
        prompt_temperature=a.prompt_temperature,
        temperature=a.temperature,
        seed=a.seed,
        batch_size=a.batch_size,
    )
    print(f"{a.out}: {summary.written} conversations, {summary.tokens} answer tokens")


# ---- train


def _train_options(parser: argparse.ArgumentParser) -> None:
    from vsd.training.job import TrainJob

    parser.add_argument("--config", type=Path, help="recipe (YAML)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override any field of the recipe")
    for name, (kind, help_text) in TrainJob.options().items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=f"job_{name}", metavar="…", help=help_text, **kind)


def _train(a: argparse.Namespace) -> None:
    from vsd.training.job import end_processes, recipe, train

    flags = {name.removeprefix("job_"): value for name, value in vars(a).items() if name.startswith("job_")}
    job, config = recipe(a.config, a.set, {name: value for name, value in flags.items() if value is not None})
    folder = train(job, config, resume=a.resume, report=_warn)
    end_processes()
    print(f"drafter: {folder}")


# ---- generate


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="what to ask (default: read standard input)")
    parser.add_argument("--drafter", help="folder of a drafter; without one the target decodes alone")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--stop", action="append", default=[], help="string that ends the answer; may be repeated")
    _sampling_options(parser, 512)
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this probability")
    parser.add_argument("--sample-top-k", type=int, default=0, help="draw among so many tokens (default 0: all)")
    parser.add_argument("--min-p", type=float, default=0.0, help="draw among tokens so likely, relative to the best")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (default 1)")
    _tree_options(parser)
    _target_options(parser)


def _generate(a: argparse.Namespace) -> None:
    from vsd.decoding import Sampling
    from vsd.decoding.stream import answer
    from vsd.drafters import load_drafter

    sampling = Sampling(
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        stop=tuple(a.stop),
        seed=a.seed,
        top_p=a.top_p,
        top_k=a.sample_top_k,
        min_p=a.min_p,
        repetition_penalty=a.repetition_penalty,
    )
    prompt = a.prompt if a.prompt is not None else sys.stdin.read()
    if not prompt.strip():
        raise VSDError('the prompt is empty: vsd generate "your question"')
    target = _load_target(a)
    answer(
        target,
        load_drafter(a.drafter, target) if a.drafter else None,
        _shape(a),
        prompt,
        sampling,
        system=a.system,
        verification=a.verification,
    )


# ---- bench


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drafter", action="append", default=[], help="folder of a drafter; may be repeated")
    parser.add_argument("--prompts", nargs="+", required=True, help="prompt files (JSONL), multi-turn included")
    parser.add_argument("--limit", type=int, help="only so many prompts of each file, evenly spread")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    _sampling_options(parser, 128, several=True)
    _tree_options(parser)
    _target_options(parser)


def _bench(a: argparse.Namespace) -> None:
    from vsd.drafters import load_drafter
    from vsd.evaluation import Contender, bench, load_prompts, print_table, write_json

    prompts = load_prompts(a.prompts, a.limit)
    shape, target = _shape(a), _load_target(a)
    contenders = [Contender(path, load_drafter(path, target), shape, a.verification) for path in a.drafter]
    report = bench(
        target, contenders, prompts, temperatures=a.temperature, max_new_tokens=a.max_new_tokens, seed=a.seed
    )
    print_table(report)
    if a.json:
        write_json(report, a.json)


# ---- tune


def _tune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drafter", required=True, help="folder of the drafter")
    parser.add_argument("--prompts", nargs="+", required=True, help="prompt files (JSONL); their first turns are used")
    parser.add_argument("--limit", type=int, default=16, help="prompts of each file (default 16)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer (default 96)")
    _target_options(parser)


def _tune(a: argparse.Namespace) -> None:
    from vsd.data import prompt_inputs
    from vsd.decoding import Engine, Sampling
    from vsd.drafters import load_drafter
    from vsd.evaluation import load_prompts, print_trees, tune

    prompts = load_prompts(a.prompts, a.limit)
    target = _load_target(a)
    drafter = load_drafter(a.drafter, target)
    ids = [prompt_inputs(target.tokenizer, [{"role": "user", "content": p.turns[0]}]).ids for p in prompts]
    results = Engine(target).generate(ids, Sampling(a.max_new_tokens))
    print_trees(tune(target, drafter, [(result.prompt, result.tokens) for result in results]))


# ---- export, import


def _export_options(parser: argparse.ArgumentParser) -> None:
    from vsd.export import FORMATS

    parser.add_argument("drafter", type=Path, help="folder of the drafter")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--bench", type=Path, help="JSON of vsd bench, for the model card")
    _target_options(parser)


def _export(a: argparse.Namespace) -> None:
    from vsd.drafters import Eagle3Drafter
    from vsd.export import export_drafter, model_card, serve_line

    if a.bench is not None and not a.bench.exists():
        raise VSDError(f"no file at '{a.bench}'")
    target, drafter = _load_target(a), Eagle3Drafter.from_pretrained(a.drafter, dtype="auto")
    target.take_features(drafter.config.aux_layers)
    export_drafter(drafter, target, a.out, a.format)
    (a.out / "README.md").write_text(model_card(drafter, target, a.format, a.out, a.drafter, a.bench))
    print(f"{a.out}: to serve it,\n  {serve_line(a.format, target.name, a.out)}")


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of the released drafter")
    parser.add_argument("out", type=Path, help="folder to write")
    _target_options(parser)


def _import(a: argparse.Namespace) -> None:
    from vsd.export import check_new, import_drafter

    check_new(a.out)
    import_drafter(a.checkpoint, _load_target(a)).save_pretrained(a.out)
    print(f"drafter: {a.out}")


# ---- demo


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0, help="time to train (default 10)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for drafter/ and results.json")
    parser.add_argument("--seed", type=int, default=0)


def _demo(a: argparse.Namespace) -> None:
    from vsd.demo import demo

    demo(a.minutes, a.out, a.seed)


if __name__ == "__main__":
    sys.exit(main())
