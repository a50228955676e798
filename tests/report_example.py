"""Runs as `vsd train` and `vsd bench --json` leave them, made by rule."""

import json
from pathlib import Path
from typing import Any

ATTACK = "<script>alert('1')</script> & \"quoted\" </p><img src=http://evil.example/x onerror=alert(2)>"
RECIPE: dict[str, Any] = {"target": "smollm2-135m", "learning_rate": 0.001, "objective_options": {"decay": 0.8}}


def write_run(
    folder: Path, objective: str = "eagle3", steps: int = 60, minutes: bool = True, lift: float = 0.0
) -> Path:
    """A folder of `vsd train`: τ grows, the loss falls, accuracy falls with the draft step."""
    log: list[dict[str, Any]] = []
    for step in range(4, steps + 1, 4):
        share = step / steps
        accuracy = {f"accuracy_{k}": round((0.6 * share + lift) / k, 4) for k in (1, 2, 3)}
        log.append({"step": step, "epoch": share, "loss": 9.0 - 4 * share**0.5, **accuracy})
        if step % 12 == 0:
            log.append({"step": step, "epoch": share, "eval_tau": 1 + share**0.7 + lift})
            log[-1] |= {"minutes": share * 10} if minutes else {}
    folder.mkdir(parents=True)
    recipe = {**RECIPE, "objective": objective, "output_dir": str(folder)}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def measured(drafter: str | None, tau: float, speedup: float, **more: Any) -> dict[str, Any]:
    """An entry of `runs`, as `vsd bench` wrote it first."""
    tree = {"depth": 4, "top_k": 3, "nodes": 12, "p_min": 0.0, "lookup": 0}
    return {
        "drafter": drafter,
        "temperature": 0.0,
        "tree": tree if drafter else None,
        "verification": "auto",
        "tau": tau,
        "tau_ci": [tau - 0.11, tau + 0.13],
        "tokens_per_second": 30 * speedup,
        "speedup": speedup,
        "speedup_ci": [speedup - 0.05, speedup + 0.06],
        "acceptance_per_position": [0.62, 0.35, 0.18, 0.07] if drafter else [],
        "latency": {"draft": 6.5 if drafter else 0.0, "verify": 31.0, "commit": 1.2, "prefill": 150.0},
        "tau_by_suite": {"mt_bench": tau - 0.2, "gsm8k": tau + 0.3},
        "identical": 1.0,
        "new_tokens": 900,
    } | more


def explained(tau: float) -> dict[str, Any]:
    """What later files add."""

    def part(tau: float, answers: int) -> dict[str, Any]:
        return {"tau": tau, "tau_ci": [tau - 0.2, tau + 0.2], "answers": answers, "tokens": 60 * answers}

    categories = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", ATTACK]
    return {
        "acceptance_per_position_ci": [[0.58, 0.66], [0.31, 0.39], [0.15, 0.21], [0.05, 0.09]],
        "slices": {
            "file": {"mt_bench": part(tau - 0.2, 40), "gsm8k": part(tau + 0.3, 20)},
            "category": {name: part(tau + 0.07 * n - 0.3, 10) for n, name in enumerate(categories)},
            "thinking": {"off": part(tau, 60)},
        },
        "by_context": [
            {"from": start, "to": 2 * start, "tau": tau - 0.1 * n, "tau_ci": [tau - 0.1 * n - 0.1, tau - 0.1 * n + 0.1],
             "passes": 300 - 40 * n}
            for n, start in enumerate((128, 256, 512, 1024, 2048, 4096))
        ],
        "trained_length": 1024,
        "by_concurrency": together(tau, 0.7 * tau),
        "samples": [
            {"prompt": "Why is the sky blue?", "pieces": [["The", False], [" sky is", True], [" blue", False],
             [" because of the way", True], [" Rayleigh", False], [" scattering works in the atmosphere.\n\n", True],
             [ATTACK, False], [" <b>bold</b> & more", True]]},
            {"prompt": ATTACK, "pieces": [["No", False], [".", True]]},
        ],
    }  # fmt: skip


def together(tau: float, speedup: float) -> list[dict[str, Any]]:
    """`by_concurrency`: less speed-up for more prompts at a time."""
    return [
        {"concurrency": size, "tau": tau, "tokens_per_second": 30 * speedup * size**0.5,
         "ms_per_pass": 38.7 * size**0.5, "speedup": speedup * (1 - 0.02 * size),
         "speedup_ci": [speedup * (0.97 - 0.02 * size), speedup * (1.03 - 0.02 * size)]}
        for size in (1, 4, 16)
    ]  # fmt: skip


def write_bench(path: Path, drafters: dict[str, float], full: bool = True, **more: Any) -> Path:
    """A JSON file of `vsd bench`: τ by drafter."""
    runs = [measured(None, 1.0, 1.0, tau_ci=[1.0, 1.0], speedup_ci=[1.0, 1.0])]
    runs[0] |= {"by_concurrency": together(1.0, 1.0)} if full else {}
    runs += [measured(name, tau, 0.7 * tau, **(explained(tau) if full else {})) for name, tau in drafters.items()]
    report = {
        "runs": runs,
        "settings": {"max_new_tokens": 64, "seed": 0, "prompts": ["0", "1", "2"]},
        "versions": {"vsd": "0.2.0"},
        "machine": {"device": "x86_64", "dtype": "bfloat16", "threads": 2},
    }
    path.write_text(json.dumps(report | more))
    return path


def side(*shares: float) -> dict[str, Any]:
    """What one engine accepted."""
    return {
        "passes": 500,
        "length": 1 + sum(shares),
        "length_ci": [1 + sum(shares) - 0.1, 1 + sum(shares) + 0.1],
        "per_position": list(shares),
        "per_position_ci": [[share - 0.04, share + 0.04] for share in shares],
        "tokens_per_second": 40 * (1 + sum(shares)),
    }


def write_served(path: Path, here: dict[str, Any] | None, differing: int = 2, **more: Any) -> Path:
    """A JSON file of `vsd bench --server`, with a drafter whose acceptance differs at position 2, or without one."""
    where = {"prompt": ATTACK, "turn": 0, "position": 4, "here": 17, "there": None, "margin": 0.03125, "second": False}
    tie = {"prompt": "7", "turn": 1, "position": 0, "here": 5, "there": 99, "margin": 0.0, "second": True}
    server = {
        "engine": "vLLM",
        "depth": 3,
        "acceptance": side(0.6, 0.3, 0.1),
        "here": here,
        "difference": None if here is None else {"position": 2, "difference": -0.1, "ci": [-0.15, -0.05]},
        "enough": True,
        "answers": 60,
        "equal": 1 - differing / 60,
        "differences": [where if n % 2 == 0 else tie for n in range(differing)],
    }
    report = {
        "runs": [],
        "server": server | more,
        "settings": {"max_new_tokens": 64, "prompts": [str(n) for n in range(60)]},
        "machine": {"device": "x86_64", "dtype": "bfloat16", "threads": 2},
        "command": "vsd bench --server http://localhost:8000 --model m",
    }
    path.write_text(json.dumps(report))
    return path


def tried_trees() -> list[dict[str, Any]]:
    """`trees` of `vsd tune`: speed has a maximum at 4x3x12."""
    sizes = [
        (1, 1, 2, 1.5, 1.2),
        (2, 2, 5, 1.8, 1.35),
        (3, 3, 8, 2.1, 1.5),
        (4, 3, 12, 2.3, 1.56),
        (6, 6, 32, 2.6, 1.3),
    ]
    return [
        {"shape": {"depth": d, "top_k": k, "nodes": n}, "tau": tau, "seconds": tau / speedup / 30, "speedup": speedup}
        for d, k, n, tau, speedup in sizes
    ]
