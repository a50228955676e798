"""The trainer: the same step however it is cut up, and a drafter that gets better at drafting."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import along
import tiny_run
from vsd.data import Example
from vsd.decoding import Engine, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.errors import VSDError
from vsd.features import Features, FeatureStore
from vsd.paths import TreeShape
from vsd.targets import Inputs, Target
from vsd.training import DraftDataset, VSDConfig, VSDTrainer, budget
from vsd.training.e_step.proposed import trees
from vsd.training.job import prompt_of

LAYERS = (0, 2, 3)
FEW = {"anchors": 3, "length": 4}  # of continuations
ONE_STEP = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-2, "max_grad_norm": 1e9}


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    return tiny_run.tiny_examples(tiny_target, 8)


def uneven(examples: list[Example]) -> list[Example]:
    """Answers of very different lengths: a mean of means would not be the mean."""
    return [
        Example(Inputs(inputs.ids[:ids_end]), drafted[:ids_end])
        for i, (inputs, drafted, _) in enumerate(examples)
        for ids_end in [drafted.index(True) + 1 + 3 * i]
    ]


def weights_after(target: Target, examples: list[Example], folder: Path, **options: object) -> dict[str, Tensor]:
    trainer = tiny_run.tiny_trainer(target, examples, folder, **{**ONE_STEP, **options})
    trainer.train()
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=tolerance, atol=tolerance, msg=name)


def test_accumulated_batches_are_one_batch(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """SGD, so that the weights show the gradient; momentum-free AdamW would show its sign alone."""
    text = uneven(examples)
    whole = weights_after(tiny_target, text, tmp_path, optim="sgd", per_device_train_batch_size=8)
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same(weights_after(tiny_target, text, tmp_path, optim="sgd", **cut), whole)
    start = dict(tiny_run.tiny_drafter(tiny_target, text).named_parameters())
    assert all((whole[name] - start[name]).abs().max() > 1e-5 for name in ("fc.weight", "lm_head.weight"))


def test_stored_and_online_features_train_alike(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    store = FeatureStore.build(tmp_path / "features", tiny_target, examples, LAYERS)
    online = weights_after(tiny_target, examples, tmp_path, optim="sgd")
    stored = weights_after(tiny_target, examples, tmp_path, optim="sgd", features=store)
    start = dict(tiny_run.tiny_drafter(tiny_target, examples).named_parameters())
    for name in online:
        moved = (online[name] - start[name]).norm()
        assert (stored[name] - online[name]).norm() < 0.02 * moved, name


def test_mixed_precision_steps_go_the_same_way(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """Rounding to bfloat16 turns a gradient a little; a wrong cast or scale would turn it a lot."""
    start = dict(tiny_run.tiny_drafter(tiny_target, examples).named_parameters())
    single = weights_after(tiny_target, examples, tmp_path, optim="sgd")
    mixed = weights_after(tiny_target, examples, tmp_path, optim="sgd", bf16=True)
    for name, weight in single.items():
        assert mixed[name].dtype == torch.float32
        moved, other = (weight - start[name]).flatten(), (mixed[name] - start[name]).flatten()
        assert not torch.equal(moved, other), "bfloat16 was not used"
        assert torch.cosine_similarity(moved, other, dim=0) > 0.98, name
        assert 0.9 < other.norm() / moved.norm() < 1.1, name


def test_the_served_temperature_is_the_targets_law(
    tiny_target: Target, examples: list[Example], tmp_path: Path
) -> None:
    """By rule target, recorded states: CE to p at that temperature, the drafter's q as it is."""
    options = {"rule": "target", "e_step": None}
    choice = {"objective": "vsd", "objective_options": options, "draft_steps": 1, "temperature": 0.5}
    store = FeatureStore.build(tmp_path / "features", tiny_target, examples, LAYERS, 0.5)
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, features=store, **choice)
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(1.0))
    total, drafter = torch.zeros(()), trainer.model
    for inputs, drafted, _ in examples:
        text = torch.tensor([inputs.ids])
        features = tiny_target.features(along.text(text))
        roots = torch.tensor(drafted).nonzero()[:, 0] - 2
        law = (tiny_target.logits(features.hidden[0, roots + 1]) / 0.5).softmax(-1)[:, drafter.vocabulary.ids]
        paths = along.paths(roots[None], text[:, roots + 2, None])
        hidden = along.states(drafter, along.entries(tiny_target, text, LAYERS), paths)[0, 0]
        total = total - (law * drafter.lm_head(hidden).log_softmax(-1)).sum()
    torch.testing.assert_close(loss, total, rtol=2e-2, atol=0)  # features are kept in bfloat16
    with pytest.raises(VSDError, match="another temperature"):
        FeatureStore.build(tmp_path / "features", tiny_target, examples, LAYERS)
    with pytest.raises(VSDError, match="must be positive"):
        VSDConfig(output_dir=str(tmp_path), temperature=0.0)


def test_short_answers_train_with_many_steps(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """Fewer drafted tokens than steps in the whole batch."""
    text = [Example(Inputs(one.ids[: d.index(True) + 2]), d[: d.index(True) + 2]) for one, d, _ in examples]
    assert max(sum(example.drafted) for example in text) == 2
    weights = weights_after(tiny_target, text, tmp_path, draft_steps=6)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_training_raises_acceptance_in_the_real_decoder(tiny_target: Target, tmp_path: Path) -> None:
    text = tiny_run.tiny_examples(tiny_target, 110, 32)
    prompts = [prompt_of(example) for example in text[94:]]
    trainer = tiny_run.tiny_trainer(
        tiny_target,
        text[:94],
        tmp_path,
        eval_prompts=prompts,
        learning_rate=1e-2,
        num_train_epochs=8,
        logging_steps=10,
        eval_max_new_tokens=24,
        eval_batch=7,
    )
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    after = trainer.evaluate()["eval_tau"]
    assert before < 1.3
    assert after > 1.8
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    logged = [entry for entry in trainer.state.log_history if "accuracy_3" in entry]
    assert logged[-1]["accuracy_1"] > logged[0]["accuracy_1"] + 0.1
    engine = Engine(tiny_target, trainer.model.eval(), TreeShape(5, 4, 12))
    results = [r for i in range(0, 16, 7) for r in engine.generate(prompts[i : i + 7], Sampling(24))]
    assert after == pytest.approx(acceptance_length(results))


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a tenth of a second, whatever the machine."""
    ticks = itertools.count()
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))


def test_the_clock_ends_training_and_anneals_the_rate(
    tiny_target: Target, examples: list[Example], tmp_path: Path, ticking: None
) -> None:
    options = {"max_minutes": 4 / 60, "learning_rate": 3e-3, "logging_steps": 1}
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, **options)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(rates) == 40
    assert max(rates) > 2.9e-3
    assert rates[0] < 2e-3  # warm-up
    assert rates[-1] < 3e-5
    peak = rates.index(max(rates))
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_clock_can_keep_the_rate(
    tiny_target: Target, examples: list[Example], tmp_path: Path, ticking: None
) -> None:
    options = {"max_minutes": 4 / 60, "learning_rate": 3e-3, "lr_scheduler_type": "constant_with_warmup"}
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, logging_steps=1, **options)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] < 2e-3 and len(rates) == 40
    assert set(rates[len(rates) // 2 :]) == {3e-3}


def test_time_before_an_interruption_counts(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """Resumed at its end, a run takes one step, not all of its time again."""
    options = {"max_minutes": 1 / 60, "save_strategy": "steps", "save_steps": 1}
    first = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, **options)
    first.train()
    again = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == first.state.global_step + 1 > 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lk_lambda", {}),
        ("dpace", {}),
        ("vat", {}),
        ("griffin", {}),
        ("vispec", {}),
        ("lk_alpha", {}),
        ("distillspec", {"divergence": "jsd", "samples": 4}),
        ("elbo", {"rule": "rejection", "samples": 4}),
        ("vsd", {}),
        ("vsd", {**FEW, "recorded": False, "arw": True, "car": 0.5}),
        ("vsd", {**FEW, "arw": True, "car": 0.5}),
        ("vsd", {**FEW, "arw": True, "smoothing": 0.3}),
        ("vsd", {**FEW, "arw": True, "cut": -3.0}),
        ("vsd", {"arw": True, "lookup": True, "hard": True, "e_step": None}),
        ("vsd", {**FEW, "rule": "target", "smoothing": 0.3, "car": 0.5}),
        ("vsd", {"rule": "rejection", "arw": True, "anchors": 3, "length": 5}),
        ("vsd", {"rule": "target", "e_step": "drafted", "samples": 4, "smoothing": 0.3, "car": 0.5}),
        ("vsd", {"rule": "rejection", "arw": True, "e_step": "drafted", "samples": 4, "every": 2}),
        ("vsd", {"rule": "target", "arw": True, "car": 0.5, "e_step": "trees", "tree": "4x3x9", "every": 2}),
        ("gto", {"tree": "4x3x9", "anchors": 4}),
        ("gto", {"tree": "2x3x6", "anchors": 4, "rule": "target"}),
    ],
)
def test_every_objective_trains(
    tiny_target: Target, examples: list[Example], tmp_path: Path, name: str, options: dict
) -> None:
    """Four steps, finite and logged; what is drawn is logged too."""
    choice = {"objective": name, "objective_options": options}
    trainer = tiny_run.tiny_trainer(
        tiny_target, examples, tmp_path, **choice, max_steps=4, logging_steps=4, learning_rate=1e-2
    )
    start = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert all(not torch.equal(weight, start[name]) for name, weight in trainer.model.named_parameters())
    assert all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())
    assert ("accuracy_1" in logged) == (name not in ("elbo", "distillspec"))
    assert ("effective_sample_size" in logged) == ("samples" in options)
    if "samples" in options:
        assert 1 <= logged["effective_sample_size"] <= 4
    if "samples" in options or "tree" in options:
        assert 0 <= logged["drafted_utility"] <= 3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_alternative_continuations_are_trained_like_texts(
    tiny_target: Target,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:
    """From E-step to loss and gradient, against a text of its own for every continuation."""
    A, L = 3, 5
    common = int(torch.tensor([example.inputs.ids[-8:] for example in examples]).mode().values.mode().values)
    monkeypatch.setattr(tiny_target, "eos_ids", (tiny_target.eos_ids[0], common))  # so that some paths end early
    options = {"anchors": A, "length": L, "weight": 2.0}
    choice = {"objective": "vsd", "objective_options": options, "draft_steps": 3, "temperature": temperature}
    trainer = tiny_run.tiny_trainer(tiny_target, uneven(examples), tmp_path, **choice)
    inputs = next(iter(trainer.get_train_dataloader()))
    drafter, batch = trainer.model, trainer.batch(inputs)
    posteriors = trainer._e_step(batch)
    loss = trainer._m_step(drafter, batch, [posteriors[0]]).loss
    both = trainer._m_step(drafter, batch, posteriors).loss
    (both - loss).backward()
    found = {name: weight.grad.clone() for name, weight in drafter.named_parameters()}
    drafter.zero_grad()

    entries, paths = posteriors[1].entries, posteriors[1].paths
    T, totals, roots, ended = (
        batch.texts.inputs.ids.shape[1],
        [torch.zeros(())] * len(batch.texts.inputs.ids),
        [0] * len(batch.texts.inputs.ids),
        0,
    )
    for b, p in itertools.product(range(len(batch.texts.inputs.ids)), range(A)):
        below = T + p * (L - 1) + torch.arange(L - 1)
        at = int(entries.positions[b, below[0]])  # the path's first token stands at at + 1
        first = entries.next_ids[b, below]
        rest = paths.tokens[b][(paths.roots[b] == below[-1]) & paths.valid[b, :, 0]]
        own = torch.cat([batch.texts.inputs.ids[b, : at + 1], first, rest[0, :1] if len(rest) else first[:0]])[None]
        eos = torch.isin(own[0, at + 1 :], torch.tensor(tiny_target.eos_ids)).nonzero()
        if len(eos):
            own, ended = own[:, : at + 2 + int(eos[0])], ended + 1
        features = tiny_target.features(along.text(own))
        n = own.shape[1] - at - 1
        where = at - 1 + torch.arange(n)[None]
        law = (tiny_target.logits(features.hidden[0, at:-1]) / temperature).softmax(-1)[:, drafter.vocabulary.ids]
        tokens = own[0, (where[0, :, None] + 2 + torch.arange(3)).clamp(max=own.shape[1] - 1)][None]  # [1, n, K]
        hidden = along.states(drafter, along.entries(tiny_target, own, LAYERS), along.paths(where, tokens))
        log_q = drafter.lm_head(hidden)[:, 0].log_softmax(-1)  # [K, n, Vd]
        for k, i in itertools.product(range(3), range(n)):
            if i + k < n:
                totals[b] = totals[b] - 0.8**k * (law[i + k] * log_q[k, i]).sum()
        roots[b] += n
    assert ended > 0
    shares = (2 * int(real) / n for real, n in zip(batch.texts.real.sum(1), roots))
    total = torch.stack([share * each for share, each in zip(shares, totals)]).sum()
    torch.testing.assert_close(both - loss, total, rtol=1e-4, atol=1e-3)
    total.backward()
    for name, weight in drafter.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_drawn_paths_are_trained_as_they_should_one_by_one(
    tiny_target: Target, examples: list[Example], tmp_path: Path, temperature: float
) -> None:
    """The whole way from E-step to loss, against a target pass and a drafter pass for every single path."""
    options = {"divergence": "fkl", "samples": 3, "anchors": 2}
    choice = {"objective": "distillspec", "objective_options": options, "draft_steps": 4, "temperature": temperature}
    trainer = tiny_run.tiny_trainer(tiny_target, uneven(examples), tmp_path, **choice)
    inputs = next(iter(trainer.get_train_dataloader()))
    drafter, ids = trainer.model, inputs["input_ids"]
    drawn = trainer._e_step(trainer.batch(inputs))
    loss = trainer.compute_loss(drafter, inputs, num_items_in_batch=torch.tensor(1.0))
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in drafter.named_parameters()}
    drafter.zero_grad()

    real = (inputs["labels"] >= 0).sum(1)
    paths, total = drawn[0].paths, torch.zeros(())
    ended = 0
    for b, p in itertools.product(range(len(ids)), range(6)):
        root, tokens = int(paths.roots[b, p]), paths.tokens[b, p]
        text = torch.cat([ids[b, : root + 2], tokens])[None]
        features = tiny_target.features(along.text(text))
        logits = tiny_target.logits(features.hidden[0, root + 1 : -1])
        law = (logits / temperature).softmax(-1)[:, drafter.vocabulary.ids]  # [K, Vd]
        path = along.paths(torch.tensor([[root]]), tokens[None, None])
        hidden = along.states(drafter, along.entries(tiny_target, text, LAYERS), path)[:, 0, 0]
        log_q = (drafter.lm_head(hidden) / temperature).log_softmax(-1)
        for k in range(4):
            total = total - (law[k] * log_q[k]).sum() / 3 * real[b] / 2
            if int(tokens[k]) in tiny_target.eos_ids:
                ended += 1
                break
    assert ended > 0 or all(eos not in drafter.vocabulary.ids for eos in tiny_target.eos_ids)
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-4)
    total.backward()
    for name, weight in drafter.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=2e-3, atol=1e-3, msg=name)


def test_beyond_lookup_only_other_roots_are_trained(
    tiny_target: Target, examples: list[Example], tmp_path: Path
) -> None:
    choice = {"objective": "vsd", "objective_options": {"lookup": True, "e_step": None}}
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, **choice)
    batch = trainer.batch(next(iter(trainer.get_train_dataloader())))
    paths = trainer._e_step(batch)[0].paths
    trained = {(b, int(root)) for b in range(8) for root in paths.roots[b][paths.valid[b, :, 0]]}
    wanted = set()
    for b, ids in enumerate(batch.texts.inputs.ids.tolist()):
        for root in (batch.texts.drafted[b][batch.texts.real[b]] - 2).tolist():
            newest = ids[root - 1 : root + 2]
            if not any(ids[t : t + 3] == newest for t in range(root - 1)):
                wanted.add((b, root))
    assert trained == wanted
    assert len(wanted) < int(batch.texts.real.sum())


@pytest.mark.parametrize("rule", ["greedy", "target"])
def test_gto_prefers_the_tree_that_is_accepted_further(
    tiny_target: Target, examples: list[Example], tmp_path: Path, rule: str
) -> None:
    """Against loops: reward of every anchor's two trees, its best path, and shares that add up to nothing."""
    options = {"tree": "3x3x9", "anchors": 4, "rule": rule}
    choice = {"objective": "gto", "objective_options": options}
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, **choice)
    reference = trainer._e_steps[1].reference
    torch.manual_seed(1)
    for weight in trainer.model.parameters():  # as if training had gone on
        weight.data += 0.05 * torch.randn_like(weight)
    inputs = next(iter(trainer.get_train_dataloader()))
    batch = trainer.batch(inputs)
    found, info = trainer._e_steps[1](batch, trainer._random())
    drafters, shape = (trainer.model, reference), TreeShape(3, 3, 9)
    ended = torch.tensor(tiny_target.eos_ids)
    better = torch.zeros(8, 4)
    for b, a in itertools.product(range(8), range(4)):
        root = int(found.paths.roots[b, a])
        text = batch.texts.inputs.ids[b, : root + 2].tolist()
        rewards, best = [], None
        for drafter in drafters:
            alone = batch._replace(
                texts=batch.texts.some([b]), features=Features(*(f[b : b + 1] for f in batch.features))
            )
            tokens, fresh = trees(trainer._models, drafter, shape, alone, torch.tensor([[root]]))
            reward, worths = 0.0, []
            for path, new in zip(tokens[0, 0].tolist(), fresh[0, 0].tolist()):
                kappa, worth = 1.0, 0.0
                for k, token in enumerate(path):
                    if token < 0 or (k and path[k - 1] in ended):
                        break
                    place = root + 2 + k
                    if rule == "greedy":
                        answered = place < batch.texts.inputs.ids.shape[1] and int(inputs["labels"][b, place]) == token
                        kappa *= float(answered)
                    else:
                        so_far = torch.tensor([text + path[:k]])
                        law = tiny_target.logits(tiny_target.features(along.text(so_far)).hidden[0, -1]).softmax(-1)
                        kappa *= float(law[token])
                    worth += kappa
                    reward += kappa * new[k]
                worths.append(worth)
            rewards.append(reward)
            if best is None:
                best = max(worths)
                taken = tokens[0, 0, worths.index(best)].tolist()
        better[b, a] = rewards[0] - rewards[1]
        assert float(info.utility[b, a]) == pytest.approx(rewards[0], abs=1e-3)
        path = found.paths.tokens[b, a][found.paths.valid[b, a]].tolist()
        assert len(path) == best if rule == "greedy" else path == taken[: len(path)]
    wanted = (better - better.mean(1, keepdim=True)) / better.std(1, keepdim=True).clamp(min=1e-4)
    scale = batch.texts.real.sum() / 32
    torch.testing.assert_close(found.share[..., 0], wanted * scale, rtol=2e-2, atol=2e-2)
    assert better.abs().sum() > 0.1


def test_cut_paths_train_on_fewer_steps(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """All first steps, and later ones as often as the target is sure of the tokens before."""
    rows = {}
    for smoothing in (None, 1.0, 0.1):
        options = {"objective_options": {"smoothing": smoothing}, "per_device_train_batch_size": 8, "draft_steps": 4}
        trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, **options)
        inputs = next(iter(trainer.get_train_dataloader()))
        rows[smoothing] = trainer.compute_loss(trainer.model, inputs, return_outputs=True)[1].rows.tolist()
    assert rows[None] == rows[1.0]
    assert rows[0.1][0] == rows[None][0]
    assert all(0 < few < 0.95 * all_ for few, all_ in zip(rows[0.1][1:], rows[None][1:]))


def test_vsd_raises_acceptance_in_the_real_decoder(tiny_target: Target, tmp_path: Path) -> None:
    text = tiny_run.tiny_examples(tiny_target, 110, 32)
    options = {"objective": "vsd", "objective_options": FEW, "learning_rate": 1e-2, "num_train_epochs": 8}
    prompts = [prompt_of(example) for example in text[94:]]
    trainer = tiny_run.tiny_trainer(
        tiny_target, text[:94], tmp_path, eval_prompts=prompts, eval_max_new_tokens=24, **options
    )
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    assert before < 1.3
    assert trainer.evaluate()["eval_tau"] > 1.8


def test_an_unknown_objective_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(VSDError, match="unknown objective 'eagle4': choose eagle3"):
        VSDConfig(output_dir=str(tmp_path), objective="eagle4")


def test_draft_steps_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(VSDError, match="draft_steps"):
        VSDConfig(output_dir=str(tmp_path), draft_steps=0)


def test_texts_too_long_to_be_continued_are_refused_before_training(
    tiny_target: Target, examples: list[Example], tmp_path: Path
) -> None:
    choice = {"objective": "vsd", "objective_options": {"length": 500}}
    with pytest.raises(VSDError, match="continuations of 500: the target has 512 positions"):
        tiny_run.tiny_trainer(tiny_target, examples, tmp_path, **choice)


def test_a_process_takes_one_gpu(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """Where it sees several, transformers would cut batches up with DataParallel."""
    config = VSDConfig(output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=4)
    config._n_gpu = 2
    trainer = VSDTrainer(tiny_target, tiny_run.tiny_drafter(tiny_target, examples), config, DraftDataset(examples))
    assert trainer.args.train_batch_size == 4
    assert not isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel)


def test_fsdp_is_refused(
    tiny_target: Target, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = VSDTrainer.create_accelerator_and_postprocess

    def sharded(trainer: VSDTrainer) -> None:  # accelerate does not shard on a CPU
        real(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(VSDTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(VSDError, match="use DDP"):
        tiny_run.tiny_trainer(tiny_target, examples, tmp_path)
