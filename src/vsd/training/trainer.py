"""The trainer: a `transformers.Trainer` that alternates E-step and M-step, and measures τ in the real decoder.

Read `compute_loss`, `_e_step`, `_m_step` downwards. The E-step (`vsd.training.e_step`) says which paths are trained,
and what the target makes of them; the M-step maximises their weighted likelihood.

Legend: B batch, T tokens, Q drafted tokens of a sequence, P paths, K steps, h hidden, Vd draft vocabulary.
"""

import copy
import hashlib
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

from vsd.decoding import Engine, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import Eagle3Drafter
from vsd.errors import VSDError
from vsd.objective import WRITTEN, Continued, Contrasted, Drafted, FusedLoss, PathTarget, Proposed, Recorded, fused_loss
from vsd.objective import objective as objective_named
from vsd.paths import TreeShape, check_length, consumed, widths
from vsd.targets import Target
from vsd.training.batch import ByLength, Collator, DraftDataset, real
from vsd.training.budget import TimeBudget
from vsd.training.config import VSDConfig
from vsd.training.e_step import Batch, EStep, Posterior
from vsd.training.features import Features, FeatureStore, compute_features

_REMEMBERED = 0.99  # of the running acceptance, a batch


class VSDTrainer(Trainer):
    """Trains a drafter for a frozen target.

    Args:
        store: features of the training examples; None computes them in every step.
        eval_prompts: token ids of held-out prompts; `evaluate` answers them greedily and reports τ.
    """

    args: VSDConfig

    def __init__(
        self,
        target: Target,
        drafter: Eagle3Drafter,
        args: VSDConfig,
        train_dataset: DraftDataset,
        *,
        store: FeatureStore | None = None,
        eval_prompts: Sequence[list[int]] = (),
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        drafter.check_target(target)
        args._n_gpu = min(args.n_gpu, 1)  # not DataParallel: a GPU more is a process more
        super().__init__(
            model=drafter,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=list(eval_prompts) or None,
            data_collator=Collator(store),
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True  # the loss is normalised by the whole batch's drafted tokens
        self.target = target
        self._counts = _Counts(args.draft_steps)
        self._objective = objective_named(args.objective, args.objective_options)
        self._posterior_of = EStep(target, drafter, self._objective.rule, args.temperature, self.accelerator.autocast)
        self._acceptance: float | None = None  # running share of first drafted tokens that are right
        self._batch = (0, 0)  # step, and how often chance was asked in it
        if self.is_fsdp_enabled:
            raise VSDError("a drafter sharded by FSDP can neither draw paths nor be measured: use DDP, it is small")
        self._beginning: Eagle3Drafter | None = None
        for part in self._objective.parts:
            match part.paths:
                case Continued() as draw:
                    longest = max(len(example.inputs.ids) for example in train_dataset.examples)
                    check_length(target, longest, draw.length)
                case Contrasted():
                    self._beginning = copy.deepcopy(drafter).eval().requires_grad_(False)
        self._budget = TimeBudget(args.max_minutes) if args.max_minutes else None
        if self._budget is not None:
            self.add_callback(self._budget)
            self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """Grouping by length must not draw from the global generator: a resumed run would see other batches."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength(size, self.train_dataset, lambda: self.args.seed + int(self.state.epoch or 0))  # type: ignore[arg-type]

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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """E-step, then M-step, on one batch; see `vsd.objective` for what is minimised."""
        batch = self.batch(inputs)
        posteriors = self._e_step(batch)
        output = self._m_step(model, batch, posteriors)
        self._counts.add_drawn(posteriors)
        if isinstance(posteriors[0].part.paths, WRITTEN):
            self._remember(output)
        items = num_items_in_batch if num_items_in_batch is not None else batch.real.sum()
        loss = output.loss / items
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients that are sums here
        return (loss, output) if return_outputs else loss

    def batch(self, inputs: dict[str, Tensor]) -> Batch:
        """The collator's tensors with features, as the E-step takes them."""
        ids, drafted, index = (inputs[name] for name in ("input_ids", "drafted", "index"))
        return Batch(ids, drafted, real(inputs), index, self._features(inputs), self._steps())

    def _e_step(self, batch: Batch) -> list[Posterior]:
        """Which paths are trained now: the text's own, and what the objective's E-step adds."""
        posteriors, find = [], self._posterior_of
        drafter = self.accelerator.unwrap_model(self.model)
        for part in self._objective.parts:
            match part.paths:
                case Recorded() as text:
                    posteriors.append(find.recorded(part, text, batch, self._generator("cut")))
                case Continued() as draw:
                    epoch = int(self.state.epoch or 0)
                    posteriors.append(find.continued(part, draw, batch, epoch, self._seeded))
                case draw if self.state.global_step % draw.every:
                    continue
                case Drafted() as draw:
                    posteriors.append(find.drafted(part, draw, batch, drafter, self._generator("draw")))
                case Contrasted() as draw:
                    assert self._beginning is not None
                    both = (drafter, self._beginning)
                    posteriors.append(find.contrasted(part, draw, batch, *both, self._generator("draw")))
                case Proposed() as draw:
                    posteriors.append(find.proposed(part, draw, batch, drafter, self._generator("draw")))
        return posteriors

    def _m_step(self, model: nn.Module, batch: Batch, posteriors: list[Posterior]) -> FusedLoss:
        """The drafter along all paths at once; its weighted loss is computed inside its forward pass."""
        entries = next((p.entries for p in posteriors if p.entries is not None), batch.text)
        return model(
            aux=entries.aux,
            next_embeds=self.target.embed(entries.next_ids),
            roots=torch.cat([posterior.paths.roots for posterior in posteriors], dim=1),
            path_embeds=self.target.embed(torch.cat([consumed(entries.next_ids, p.paths) for p in posteriors], dim=2)),
            widths=widths(torch.cat([posterior.paths.valid for posterior in posteriors], dim=1)),
            positions=entries.positions,
            seen=entries.seen,
            objective=partial(
                _weighted_loss,
                posteriors=posteriors,
                draft_of=self._posterior_of.draft_of,
                temperature=self._posterior_of.draft_temperature,
                acceptance=self._acceptance or 0.0,
            ),
        )

    def _remember(self, output: FusedLoss) -> None:
        self._counts.add(output)
        now = float(output.correct[0] / output.rows[0].clamp(min=1))
        before = now if self._acceptance is None else self._acceptance
        self._acceptance = _REMEMBERED * before + (1 - _REMEMBERED) * now

    def _generator(self, use: str) -> torch.Generator:
        """Chance of one use in one batch: a resumed run draws what the interrupted one would have."""
        step = self.state.global_step
        self._batch = (step, self._batch[1] + 1 if self._batch[0] == step else 0)  # batches are accumulated
        return self._seeded(f"{self._batch}, {self.args.process_index}, {use}")

    def _seeded(self, use: str) -> torch.Generator:
        """Chance of one use in one run."""
        key = f"{self.args.seed}, {use}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
        return torch.Generator(self.args.device).manual_seed(seed)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Answer the held-out prompts greedily with the drafter as it is now: τ, by the engine that serves."""
        drafter = self.accelerator.unwrap_model(self.model)
        drafter.eval()
        with self._budget.paused() if self._budget else nullcontext():
            (tau,) = broadcast_object_list([self._tau(drafter)])  # what depends on it must not differ
        metrics = {f"{metric_key_prefix}_tau": tau}
        drafter.train()
        if self._budget is not None:
            metrics["minutes"] = self._budget.minutes
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _tau(self, drafter: Eagle3Drafter) -> float:
        config = self.args
        prompts: list[list[int]] = self.eval_dataset or []  # type: ignore[assignment]
        engine = Engine(self.target, drafter, TreeShape(config.depth, config.top_k, config.nodes))
        sampling = Sampling(config.eval_max_new_tokens)
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

    def _save_rng_state(self, output_dir: str) -> None:
        """With what chance decided, what the weights of paths depend on, and the time that is over."""
        super()._save_rng_state(output_dir)
        minutes = self._budget.minutes if self._budget else 0.0
        self._memory(output_dir).write_text(json.dumps({"acceptance": self._acceptance, "minutes": minutes}))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._memory(checkpoint).exists():
            memory = json.loads(self._memory(checkpoint).read_text())
            self._acceptance = memory["acceptance"]
            if self._budget is not None:
                self._budget.go_on(memory["minutes"])

    def _memory(self, folder: str) -> Path:
        return Path(folder) / f"memory_{self.args.process_index}.json"

    def _steps(self) -> int:
        """K now: grows evenly from 1 to `draft_steps` over the first share `ramp` of the training."""
        K, ramp = self.args.draft_steps, self.args.ramp
        clock = self._budget.progress if self._budget else self.state.global_step / max(1, self.state.max_steps)
        return K if clock >= ramp else 1 + int(K * clock / ramp)

    def _features(self, inputs: dict[str, Tensor]) -> Features:
        """From the store, by way of the collator, or from the target, now."""
        if "aux" in inputs:
            return Features(*(inputs[name] for name in Features._fields))
        found = compute_features(self.target, inputs["input_ids"], inputs["drafted"], self.args.temperature)
        return Features(*(field.float() for field in found))


class _Counts:
    """Running counts, per step, of the target's tokens and right proposals; and what became of drawn paths."""

    def __init__(self, steps: int) -> None:
        self.rows, self.correct = torch.zeros(steps), torch.zeros(steps)
        self.draws, self.utility, self.effective = 0, 0.0, 0.0

    def add(self, output: FusedLoss) -> None:
        self.rows[: len(output.rows)] += output.rows.cpu()
        self.correct[: len(output.rows)] += output.correct.cpu()

    def add_drawn(self, posteriors: list[Posterior]) -> None:
        for posterior in posteriors:
            if posterior.utility is not None:
                self.draws += 1
                self.utility += float(posterior.utility.mean())
            if posterior.effective is not None:
                self.effective += float(posterior.effective.mean())

    def report(self) -> dict[str, float]:
        shares = (self.correct / self.rows).tolist()
        found = {f"accuracy_{k + 1}": round(share, 4) for k, share in enumerate(shares) if self.rows[k] > 0}
        if self.draws:
            found["drafted_utility"] = self.utility / self.draws
        if self.effective:
            found["effective_sample_size"] = self.effective / self.draws
        return found


def _weighted_loss(
    hidden: Tensor,
    head: Tensor,
    *,
    posteriors: list[Posterior],
    draft_of: Tensor,
    temperature: float,
    acceptance: float,
) -> FusedLoss:
    """hidden [K, B, P, h] of all posteriors' paths, side by side. Counts are those of the first."""
    outputs = []
    for posterior, states in zip(posteriors, hidden.split([p.paths.roots.shape[1] for p in posteriors], dim=2)):
        tokens, valid, rows = (field.flatten(0, 1).T for field in posterior.paths[1:])  # [K, R]
        share, old = (x if x is None else x.flatten(0, 1).T for x in (posterior.share, posterior.old_log_q))
        target = PathTarget(draft_of[tokens], rows, valid, share, posterior.group, old, temperature, posterior.written)
        terms = posterior.part.terms
        outputs.append(fused_loss(states.flatten(1, 2), head, posterior.target, target, terms, acceptance))
    return outputs[0]._replace(loss=torch.stack([output.loss for output in outputs]).sum())
