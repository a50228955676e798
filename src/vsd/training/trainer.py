"""The trainer: a `transformers.Trainer` that alternates E-step and M-step, and measures τ in the real decoder.

Read `compute_loss`, `_e_step`, `_m_step` downwards. The E-step (`vsd.training.e_step`) builds paths and their weights;
the M-step minimises the objective's weighted divergence along them.

Legend: B batch, T tokens, Q drafted tokens of a sequence, P paths, K steps, h hidden, Vd draft vocabulary.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PrinterCallback, SchedulerType, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vsd.decoding import Engine, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters.lattice import Head
from vsd.errors import ConfigurationError, VSDError
from vsd.features import FeatureSource, InProcess, ServedFeatures
from vsd.objective import Confidence, Contrasted, FusedLoss, PathTarget, Proposed, Recorded, fused_loss
from vsd.objective import objective as objective_named
from vsd.paths import Paths, TreeShape
from vsd.targets import Inputs, Target, TargetInfo
from vsd.training.advice import advice
from vsd.training.batch import ByLength, Collator, DraftDataset, texts_of
from vsd.training.budget import TimeBudget
from vsd.training.config import VSDConfig
from vsd.training.e_step import Batch, Info, Models, Posterior, e_steps
from vsd.training.online import OnlineOrder, OnlineText
from vsd.training.random_source import RandomSource

_REMEMBERED = 0.99  # of the running acceptance, a step
_PREPARED_WITH = 8  # texts
_SLOPE = 2.0  # of locality at first: a weight of attention is divided by e² for every position (docs/log.md)
_MEMORY = "memory_0.json"  # in a checkpoint; older ones also have files of other processes


class VSDTrainer(Trainer):
    """Trains a drafter for a frozen target.

    Args:
        target: `TargetInfo` is enough without `eval_prompts`, for objectives on recorded text with stored features, and
            for those on continuations with `ServedFeatures`.
        drafter: of any family, attached to the target.
        features: their source; None computes them in every step.
        eval_prompts: held-out prompts; `evaluate` answers them and reports τ.

    Raises:
        ConfigurationError: the whole target is needed and was not given; a drafter sharded by FSDP.
    """

    args: VSDConfig

    def __init__(
        self,
        target: TargetInfo,
        drafter: Any,
        args: VSDConfig,
        train_dataset: DraftDataset | OnlineText,
        *,
        features: FeatureSource | None = None,
        eval_prompts: Sequence[Inputs] = (),
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        drafter.attach(target)
        drafter.config.draft_steps = args.draft_steps  # block drafters are exported with it
        if (features is None or eval_prompts) and not isinstance(target, Target):
            raise ConfigurationError("features computed in process and τ need the target's layers: load_target(…)")
        if args.learning_rate is None:
            args.learning_rate = default_learning_rate(sum(weight.numel() for weight in drafter.parameters()))
        args._n_gpu = min(args.n_gpu, 1)  # not DataParallel: a GPU more is a process more
        super().__init__(
            model=drafter,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=list(eval_prompts) or None,
            data_collator=Collator(),
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True  # the loss is normalised by the whole batch's drafted tokens
        self._counts = _Counts(args.draft_steps)
        if features is None:
            assert isinstance(target, Target)
            features = InProcess(target, drafter.needs.layers, args.temperature)
        self.features = features
        if self.is_fsdp_enabled:
            raise ConfigurationError("a drafter sharded by FSDP can neither draw paths nor be measured: use DDP")
        objective = objective_named(args.objective, args.objective_options)
        server = features if isinstance(features, ServedFeatures) and not isinstance(target, Target) else None
        self._slope = _SLOPE if drafter.one_pass and drafter.untrained else 0.0  # of locality, now
        if self._slope and isinstance(train_dataset, DraftDataset):
            drafter.prepare(partial(self._some_features, train_dataset))
        self._models = Models(target, drafter, objective.rule, args.temperature, self.accelerator.autocast, server)
        self._e_steps = e_steps(objective, self._models, train_dataset.longest)
        if any(isinstance(step.part.paths, Proposed | Contrasted) for step in self._e_steps):
            self._slope = 0.0  # trees are grown as in decoding, and q must be that of their growth
        self._acceptance: float | None = None  # running share of first drafted tokens that are right
        self._first = torch.zeros(2)  # first drafted tokens of this step so far: right ones, and all
        self._budget = TimeBudget(args.max_minutes) if args.max_minutes else None
        if self._budget is not None:
            self.add_callback(self._budget)
            self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int] | None:
        """Grouping by length must not draw from the global generator: a resumed run would see other batches."""
        if isinstance(self.train_dataset, OnlineText):
            return OnlineOrder(self.train_dataset, self._step_size, lambda: self._epoch)
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return ByLength(self._step_size, self.train_dataset, lambda: self.args.seed + self._epoch)  # type: ignore[arg-type]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """By steps as configured; by the clock when `max_minutes` is: constant, or a cosine."""
        if self._budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        rate, anneal = self._budget.rate, "constant" not in SchedulerType(self.args.lr_scheduler_type).value
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]
            lambda _: rate(self.args.warmup_steps, anneal),
        )
        return self.lr_scheduler

    def _some_features(self, texts: DraftDataset) -> Tensor:
        """Features of all tokens of a few texts, [N, n h]: the same in every process."""
        found = []
        for i in range(min(_PREPARED_WITH, len(texts))):
            one = texts_of(self._prepare_inputs(Collator()([texts[i]])))
            found.append(self.features.batch(one).aux[0, :-1])  # no drafter reads those of the last token
        return torch.cat(found)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """E-step, then M-step, on one batch; see `vsd.objective` for the loss."""
        self._set_locality()
        batch = self.batch(inputs)
        posteriors = self._e_step(batch)
        batch = batch._replace(prefill=None)  # its memory is the M-step's
        output = self._m_step(model, batch, posteriors)
        if posteriors[0].part.paths.written:
            self._remember(output)
        items = num_items_in_batch if num_items_in_batch is not None else batch.texts.real.sum()
        loss = output.loss / items
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients that are sums here
        return (loss, output) if return_outputs else loss

    def batch(self, inputs: dict[str, Any]) -> Batch:
        """The collator's tensors with their features, and the target's cache of the texts for E-steps that need it.

        Features computed in process and cache come from one pass of the target.
        """
        texts, steps = texts_of(inputs), self._steps()
        rooms = [step.room(texts, self._epoch, steps) for step in self._due()]
        needed = [room for room in rooms if room is not None]
        if needed and isinstance(self.features, InProcess):
            features, prefill = self.features.prefilled(texts, max(needed))
            return Batch(texts, features, steps, prefill)
        return Batch(texts, self.features.batch(texts), steps)

    def _e_step(self, batch: Batch) -> list[Posterior]:
        """Paths and their weights, one posterior for each part of the objective that is due in this step."""
        random = self._random()
        found = [step(batch, random) for step in self._due()]
        self._counts.add_drafted([info for _, info in found])
        return [posterior for posterior, _ in found]

    def _due(self) -> list[Any]:
        """The E-steps of this step."""
        return [step for step in self._e_steps if self.state.global_step % step.part.paths.every == 0]

    @property
    def _step_size(self) -> int:
        """Texts of a step, of all batches and processes."""
        size: int = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return size

    @property
    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def _m_step(self, model: nn.Module, batch: Batch, posteriors: list[Posterior]) -> FusedLoss:
        """The drafter along all paths at once; its weighted loss is computed inside its forward pass."""
        entries = next((p.entries for p in posteriors if p.entries is not None), batch.entries)
        paths = Paths.joined([posterior.paths for posterior in posteriors])
        loss = partial(_weighted_loss, posteriors=posteriors, models=self._models, acceptance=self._acceptance or 0.0)
        output: FusedLoss = model(entries, paths, loss)
        return output

    def _remember(self, output: FusedLoss) -> None:
        """Count; and at the end of a step move the running acceptance, by the batches of all processes."""
        self._counts.add(output)
        self._first = self._first + torch.stack([output.correct[0], output.rows[0]]).cpu()
        if not self.accelerator.sync_gradients:
            return
        correct, rows = self.accelerator.reduce(self._first.to(self.args.device)).tolist()
        now = correct / max(1, rows)
        before = now if self._acceptance is None else self._acceptance
        self._acceptance = _REMEMBERED * before + (1 - _REMEMBERED) * now
        self._first = torch.zeros(2)

    def _random(self) -> RandomSource:
        """The draws of a step: a resumed run draws what the interrupted one would have."""
        return RandomSource(self.args.seed, self._epoch, self.state.global_step, self.args.device)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Answer the held-out prompts with the drafter as it is now, as it will be served: τ, by the serving engine."""
        drafter = self.accelerator.unwrap_model(self.model)
        drafter.eval()
        with self._budget.paused() if self._budget else nullcontext():
            (tau,) = broadcast_object_list([self._tau(drafter)])  # what depends on it must not differ
        metrics = {f"{metric_key_prefix}_tau": tau}
        drafter.train()
        if self._budget is not None:
            metrics["minutes"] = self._budget.minutes
        self.log(metrics)
        self._keep_best(tau)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def best(self) -> Path:
        """Folder of the drafter with the highest τ so far; there is none before the first measurement."""
        return Path(str(self.args.output_dir)) / "best"

    def _keep_best(self, tau: float) -> None:
        """Save the drafter if it is the best so far; end the training if none has been for `patience` measurements.

        While blocks are trained with locality, and measured without, a τ that does not rise says nothing.
        """
        if self.state.best_metric is None or tau > self.state.best_metric:
            self.state.best_metric = tau
            self.save_model(str(self.best), _internal_call=True)
        measured = list(self.measured.values())
        since = len(measured) - 1 - measured.index(max(measured)) if measured else 0
        if self.args.patience is not None and since >= self.args.patience and not self._slope:
            self.control.should_training_stop = True
            self.control.should_save |= self.args.save_strategy == "steps"

    @property
    def measured(self) -> dict[int, float]:
        """Held-out τ by step."""
        return {int(entry["step"]): entry["eval_tau"] for entry in self.state.log_history if "eval_tau" in entry}

    def advice(self) -> str | None:
        """See `vsd.training.advice`; answers of online training are new in every round."""
        added = [step for step in self._e_steps if not isinstance(step.part.paths, Recorded)]
        grows = bool(added) or isinstance(self.train_dataset, OnlineText)
        return advice(list(self.measured.values()), self.state.epoch or 0.0, grows)

    def _tau(self, drafter: Any) -> float:
        """By the verification that the objective is for: greedy, or sampled at the temperature of serving."""
        config, rule = self.args, self._models.rule
        prompts: list[Inputs] = self.eval_dataset or []  # type: ignore[assignment]
        shape, verification = TreeShape.parse(config.tree), "auto"
        if rule == "rejection":
            shape, verification = TreeShape.chain(shape.depth), "rejection"
        engine = Engine(self._models.target, drafter, shape, verification)
        temperature = 0.0 if rule == "greedy" else config.temperature
        sampling = Sampling(config.eval_max_new_tokens, temperature, seed=config.seed)
        results = [
            result
            for start in range(0, len(prompts), config.eval_batch)
            for result in engine.generate(prompts[start : start + config.eval_batch], sampling)
        ]
        return acceptance_length(results)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each step's share of the target's own tokens that the drafter would have proposed first."""
        if "loss" in logs:
            logs |= self._counts.report()
            self._counts = _Counts(self.args.draft_steps)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """And delete the features of answers from which no checkpoint goes on."""
        super()._save_checkpoint(model, trial)
        if isinstance(self.train_dataset, OnlineText):
            self.accelerator.wait_for_everyone()  # the first process has written the checkpoint
            saved = Path(str(self.args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
            (oldest,) = broadcast_object_list([min(int(path.name.rpartition("-")[2]) for path in saved)])
            self.train_dataset.forget(oldest, self._step_size)

    def _save_rng_state(self, output_dir: str) -> None:
        """And the running acceptance, which weights depend on, the slope of locality, and the minutes trained."""
        super()._save_rng_state(output_dir)
        minutes = self._budget.minutes if self._budget else 0.0
        if self.is_world_process_zero():
            memory = json.dumps({"acceptance": self._acceptance, "slope": self._slope, "minutes": minutes})
            (Path(output_dir) / _MEMORY).write_text(memory)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        path = Path(checkpoint or "") / _MEMORY
        (memory,) = broadcast_object_list([json.loads(path.read_text()) if path.exists() else None])
        if memory is not None:
            self._acceptance, self._slope = memory["acceptance"], memory.get("slope", 0.0)
            if self._budget is not None:
                self._budget.go_on(memory["minutes"])

    def _steps(self) -> int:
        """K now: grows evenly from 1 to `draft_steps` over the first share `ramp` of the training."""
        K, ramp, clock = self.args.draft_steps, self.args.ramp, self._clock
        return K if clock >= ramp else 1 + int(K * clock / ramp)

    def _set_locality(self) -> None:
        """Blocks of a new drafter attend near their root, ever less so over the first share `locality`."""
        drafter, share = self._models.drafter, self.args.locality
        left = max(0.0, 1 - self._clock / share) if share else 0.0
        self._slope = min(self._slope, _SLOPE * left)  # it never rises, also in a run that is resumed with more time
        if drafter.one_pass:
            drafter.locality_slope, drafter.untrained = self._slope, False

    @property
    def _clock(self) -> float:
        """The share of the training that is done."""
        return self._budget.progress if self._budget else self.state.global_step / max(1, self.state.max_steps)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The drafter's own checkpoint, whatever its family."""
        folder, drafter = Path(output_dir or str(self.args.output_dir)), self.accelerator.unwrap_model(self.model)
        if not all(weight.isfinite().all() for weight in drafter.parameters()):
            raise VSDError("training diverged, the drafter's weights hold NaN or infinity: lower --learning-rate")
        drafter.save_pretrained(folder, state_dict=state_dict)
        torch.save(self.args, folder / "training_args.bin")


def default_learning_rate(parameters: int) -> float:
    """1e-3 up to 20 million parameters, as measured (docs/results.md); ∝ parameters^-0.75 above, 1e-4 at 430 million.

    The drafters of 8B targets, which have about 430 million, are trained with 1e-4 by other trainers.
    """
    return 1e-3 * float(min(1.0, (2e7 / parameters) ** 0.75))


class _Counts:
    """Running counts, per step, of recorded tokens and right proposals; and the utility of drafted paths."""

    def __init__(self, steps: int) -> None:
        self.rows, self.correct = torch.zeros(steps), torch.zeros(steps)
        self.draws, self.utility, self.effective = 0, 0.0, 0.0

    def add(self, output: FusedLoss) -> None:
        self.rows[: len(output.rows)] += output.rows.cpu()
        self.correct[: len(output.rows)] += output.correct.cpu()

    def add_drafted(self, infos: list[Info]) -> None:
        for info in infos:
            if info.utility is not None:
                self.draws += 1
                self.utility += float(info.utility.mean())
            if info.effective is not None:
                self.effective += float(info.effective.mean())

    def report(self) -> dict[str, float]:
        shares = (self.correct / self.rows).tolist()
        found = {f"accuracy_{k + 1}": round(share, 4) for k, share in enumerate(shares) if self.rows[k] > 0}
        if self.draws:
            found["drafted_utility"] = self.utility / self.draws
        if self.effective:
            found["effective_sample_size"] = self.effective / self.draws
        return found


def _weighted_loss(
    hidden: Tensor, head: Head, *, posteriors: list[Posterior], models: Models, acceptance: float
) -> FusedLoss:
    """hidden [K, B, P, h] of all posteriors' paths, side by side. Counts are those of the first."""
    outputs = []
    for posterior, states in zip(posteriors, hidden.split([p.paths.roots.shape[1] for p in posteriors], dim=2)):
        paths = posterior.paths
        tokens, valid, rows = (field.flatten(0, 1).T for field in (paths.tokens, paths.valid, paths.rows))  # [K, R]
        share, old = (x if x is None else x.flatten(0, 1).T for x in (posterior.share, posterior.old_log_q))
        labels, temperature = models.draft_of[tokens], models.draft_temperature
        target = PathTarget(labels, rows, valid, share, posterior.group, old, temperature, posterior.written)
        states, terms = states.flatten(1, 2), posterior.part.terms
        logits = models.drafter.confidence(states.detach())  # its loss does not train the states
        confidence = None if logits is None else Confidence(logits, models.rule)
        outputs.append(fused_loss(states, head, posterior.target, target, terms, acceptance, confidence=confidence))
    return outputs[0]._replace(loss=torch.stack([output.loss for output in outputs]).sum())
