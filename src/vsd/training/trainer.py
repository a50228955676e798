"""The trainer: a `transformers.Trainer` whose loss is a drafter's and whose evaluation is τ in the real decoder.

Legend: B batch, T tokens, Q drafted tokens of a sequence, K steps, h hidden, V target and Vd draft vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from vsd.decoding import Engine, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import Eagle3Drafter
from vsd.objective import FusedLoss, HeadTarget, fused_loss
from vsd.objective.eagle3 import align, step_weights
from vsd.paths import TreeShape
from vsd.targets import Target
from vsd.training.batch import ByLength, Collator, DraftDataset
from vsd.training.budget import TimeBudget
from vsd.training.config import VSDConfig
from vsd.training.features import Features, FeatureStore, compute_features


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
        ids = drafter.draft_ids()
        self._head = target.head_weight[ids].detach()  # [Vd, h]
        self._bias = None if target.head_bias is None else target.head_bias[ids].detach()  # [Vd]
        self._draft_of = torch.full((target.vocab_size,), -1, device=ids.device)
        self._draft_of[ids] = torch.arange(len(ids), device=ids.device)
        self._counts = _Counts.zeros(args.draft_steps)
        self._budget = TimeBudget(args.max_minutes) if args.max_minutes else None
        if self._budget is not None:
            self.add_callback(self._budget)
            self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """Grouping by length must not draw from the global generator: a resumed run would see other batches."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(size, self.train_dataset, lambda: self.args.seed + int(self.state.epoch or 0))  # type: ignore[arg-type]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """By steps as configured, or by the clock when `max_minutes` is."""
        if self._budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        rate = self._budget.rate
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]
            lambda _: rate(self.args.warmup_steps),
        )
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """EAGLE-3's training-time test on one batch; see `vsd.objective.eagle3`."""
        ids, drafted = inputs["input_ids"], inputs["drafted"]  # [B, T], [B, Q]
        features = self._features(inputs)
        tokens = inputs["labels"].gather(1, drafted)  # [B, Q], -100 where padding
        valid = (tokens >= 0) & _first_occurrence(drafted)
        steps = self._steps()
        weights = step_weights(drafted, valid, steps)
        roots = drafted - 2
        consumed = roots + 1 + torch.arange(steps, device=ids.device)[:, None, None]  # [K, B, Q]
        path = ids.gather(1, consumed.clamp(max=ids.shape[1] - 1).transpose(0, 1).flatten(1))
        path = path.unflatten(1, consumed.shape[::2]).transpose(0, 1)
        rows = HeadTarget(
            features.hidden.flatten(0, 1),
            self._head,
            self._bias,
            features.log_normaliser.flatten(),
            self.target.cap,
            self._draft_of[tokens.clamp(min=0)].flatten(),
        )
        output: FusedLoss = model(
            aux=features.aux,
            next_embeds=self.target.embed(ids.roll(-1, dims=1)),
            roots=roots,
            path_embeds=self.target.embed(path),
            objective=partial(_recorded_loss, target=rows, weights=weights),
        )
        self._counts.add(output)
        items = num_items_in_batch if num_items_in_batch is not None else valid.sum()
        loss = output.loss / items
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients that are sums here
        return (loss, output) if return_outputs else loss

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Answer the held-out prompts greedily with the drafter as it is now: τ, by the engine that serves."""
        config, drafter = self.args, self.accelerator.unwrap_model(self.model)
        shape = TreeShape(config.depth, config.top_k, config.nodes)
        prompts: list[list[int]] = self.eval_dataset or []  # type: ignore[assignment]
        drafter.eval()
        engine, sampling = Engine(self.target, drafter, shape), Sampling(config.eval_max_new_tokens)
        results = [
            result
            for start in range(0, len(prompts), config.eval_batch)
            for result in engine.generate(prompts[start : start + config.eval_batch], sampling)
        ]
        drafter.train()
        metrics = {f"{metric_key_prefix}_tau": acceptance_length(results)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each step's share of recorded tokens that the drafter would have proposed first."""
        if "loss" in logs:
            logs |= self._counts.accuracies()
            self._counts = _Counts.zeros(self.args.draft_steps)
        super().log(logs, start_time)

    def _steps(self) -> int:
        """K now: grows evenly from 1 to `draft_steps` over the first share `ramp` of the training."""
        K, ramp = self.args.draft_steps, self.args.ramp
        clock = self._budget.progress() if self._budget else self.state.global_step / max(1, self.state.max_steps)
        return K if clock >= ramp else 1 + int(K * clock / ramp)

    def _features(self, inputs: dict[str, Tensor]) -> Features:
        """From the store, by way of the collator, or from the target, now."""
        if "aux" in inputs:
            return Features(*(inputs[name] for name in Features._fields))
        found = compute_features(self.target, inputs["input_ids"], inputs["drafted"])
        return Features(*(field.float() for field in found))


class _Counts:
    """Running counts of rows and of correct rows, per step."""

    def __init__(self, rows: Tensor, correct: Tensor) -> None:
        self.rows, self.correct = rows, correct

    @classmethod
    def zeros(cls, steps: int) -> "_Counts":
        return cls(torch.zeros(steps), torch.zeros(steps))

    def add(self, output: FusedLoss) -> None:
        self.rows[: len(output.rows)] += output.rows.cpu()
        self.correct[: len(output.rows)] += output.correct.cpu()

    def accuracies(self) -> dict[str, float]:
        share = (self.correct / self.rows.clamp(min=1)).tolist()
        return {f"accuracy_{k + 1}": round(value, 4) for k, value in enumerate(share)}


def _recorded_loss(hidden: Tensor, head: Tensor, *, target: HeadTarget, weights: Tensor) -> FusedLoss:
    """hidden [K, B, Q, h] by root, weights [K, B, Q] by predicted token."""
    return fused_loss(align(hidden).flatten(1, 2), head, target, weights.flatten(1))


def _first_occurrence(drafted: Tensor) -> Tensor:
    """False where a position [B, Q] repeats or falls behind the one before it: padding."""
    rising = torch.ones_like(drafted, dtype=torch.bool)
    rising[:, 1:] = drafted[:, 1:] > drafted[:, :-1]
    return rising
