"""The texts of online training: a data set that grows while a drafter is trained on it.

A round answers the next prompts of a shuffled order with the drafter as it is then, and is trained on at once; older
rounds are a replay buffer, from which texts are drawn with probability ∝ the verification passes that they took. So
texts on which the drafter errs come first.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset, Sampler

from vsd.data.generate import derive_seed
from vsd.decoding import Engine, Sampling
from vsd.errors import ConfigurationError
from vsd.features import Features, Texts
from vsd.options import OnlineOptions
from vsd.paths import TreeShape
from vsd.targets import Inputs, Target
from vsd.training.batch import in_batches
from vsd.training.online.rollouts import Rollout, roll_out
from vsd.training.online.rounds import Rounds


class OnlineText(Dataset[dict[str, Any]]):
    """Data set, order of texts, and `FeatureSource` of online training.

    Args:
        folder: of the rounds.
        drafter: the one that is trained.
        temperature: of the target's distribution in training.
        seed: of the order of the prompts, of the answers and of the choice of texts.

    Raises:
        ConfigurationError: an option without meaning, a prompt that leaves no room for an answer, or a tree that the
            drafter cannot propose.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        drafter: Any,
        prompts: Sequence[Inputs],
        options: OnlineOptions,
        *,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        options.check()
        _check_room(target, prompts, options.answer_tokens)
        self.prompts, self.options, self.drafter, self.seed = prompts, options, drafter, seed
        self.temperature = temperature
        self.answer_temperature = temperature if options.answer_temperature is None else options.answer_temperature
        tree = None if options.answer_tree == "none" else TreeShape.parse(options.answer_tree)
        self.engine = Engine(target, drafter if tree else None, tree, layers=drafter.needs.layers)
        self.size = min(options.round_prompts, len(prompts))
        self.rounds = Rounds(folder, self.size, self._origin(target))

    @property
    def longest(self) -> int:
        """Tokens of the longest text that there can be."""
        return max(len(prompt.ids) for prompt in self.prompts) + self.options.answer_tokens

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in which every prompt is answered once."""
        return -(-len(self.prompts) // self.size)

    def steps_per_round(self, size: int) -> int:
        """Steps, of `size` texts each, behind every round."""
        return max(1, round(self.size * self.options.replay / size))

    def __len__(self) -> int:
        """Prompts; the number of texts grows."""
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One text and its index."""
        return {"example": self.rounds.texts[index].example, "index": index}

    def batch(self, texts: Texts) -> Features:
        """See `FeatureSource.batch`."""
        return self.rounds.batch(texts)

    def order(self, epoch: int, size: int) -> Iterator[int]:
        """The texts of an epoch, `size` for each step.

        A round is answered when training gets to it, which is one batch ahead; greedy answers are given once.
        """
        first = epoch * self.rounds_per_epoch
        if not self.rounds.texts:  # a resumed run begins in this epoch, and its buffer with earlier rounds
            for number in range(self.oldest_round(first), first):
                self._new(number)
        for number in range(first, first + self.rounds_per_epoch):
            yield from self._chosen(number, self._new(number), size)

    def forget(self, steps: int, size: int) -> None:
        """Delete features that the training does not need behind its first `steps` steps."""
        self.rounds.forget(self.oldest_round(steps // self.steps_per_round(size)))

    def oldest_round(self, number: int) -> int:
        """The oldest round that is trained on behind round `number`."""
        if self.answer_temperature == 0:
            return 0
        return max(0, number + 1 - -(-self.options.buffer // self.size))

    def _origin(self, target: Target) -> dict[str, str]:
        """What the answers and their features depend on, apart from the drafter that decodes them."""
        o = self.options
        return {
            "target": target.fingerprint(self.drafter.needs.layers),
            "prompts": hashlib.sha256(json.dumps([prompt.ids for prompt in self.prompts]).encode()).hexdigest()[:16],
            "sampling": f"{o.answer_tokens} tokens at temperature {self.answer_temperature:g}, seed {self.seed}",
            "round": f"{self.size} prompts, in parts",
            "temperature": f"{self.temperature:g}",
        }

    def _new(self, number: int) -> list[int]:
        """The texts that a round adds to the buffer."""
        if self.answer_temperature == 0 and number >= self.rounds_per_epoch:
            return []
        return self.rounds.load(number, self._answered)

    def _chosen(self, number: int, new: list[int], size: int) -> list[int]:
        """The new texts, and others of the buffer, in steps of similar length."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "texts", number))
        first, texts = self.oldest_round(number) * self.size, self.rounds.texts
        buffer = [i for i in texts if i >= first]
        if not buffer:
            raise ConfigurationError("every answer is a single token: there is nothing to draft")
        whole = size * self.steps_per_round(size)
        missing = whole - len(new)
        if missing > 0:
            passes = torch.tensor([float(texts[i].passes) for i in buffer])
            new = new + [buffer[j] for j in passes.multinomial(missing, True, generator=generator).tolist()]
        new = new[:whole]
        lengths = torch.tensor([len(texts[i].prompt) + len(texts[i].response) for i in new])
        return [new[j] for j in in_batches(lengths, size, generator)]

    def _answered(self, number: int) -> list[Rollout]:
        """This process's prompts of a round, answered. Answers depend on the drafter only where rounding decides."""
        epoch, place = divmod(number, self.rounds_per_epoch)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "prompts", epoch))
        order = torch.randperm(len(self.prompts), generator=generator).tolist()
        chosen = _share(order[place * self.size : (place + 1) * self.size])
        if not chosen:
            return []
        samplings = [
            Sampling(self.options.answer_tokens, self.answer_temperature, seed=derive_seed(self.seed, epoch, i))
            for i in chosen
        ]
        self.drafter.eval()
        found = roll_out(self.engine, [self.prompts[i] for i in chosen], samplings, self.temperature)
        self.drafter.train()
        return found


class OnlineOrder(Sampler[int]):
    """The order of online texts, for the trainer's loader.

    Args:
        size: texts of a step, of all processes.
        epoch: the number of the epoch that begins.
    """

    def __init__(self, texts: OnlineText, size: int, epoch: Callable[[], int]) -> None:
        self.texts, self.size, self.epoch = texts, size, epoch

    def __len__(self) -> int:
        """Texts of an epoch."""
        return self.texts.rounds_per_epoch * self.texts.steps_per_round(self.size) * self.size

    def __iter__(self) -> Iterator[int]:
        """Their indices."""
        return self.texts.order(self.epoch(), self.size)


def _share(items: list[int]) -> list[int]:
    """Those of this process: an even part, in their order."""
    index, count = PartialState().process_index, PartialState().num_processes
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def _check_room(target: Target, prompts: Sequence[Inputs], answer: int) -> None:
    longest = max(len(prompt.ids) for prompt in prompts)
    if target.context is not None and longest + answer > target.context:
        raise ConfigurationError(
            f"a prompt of {longest} tokens and an answer of {answer} leave the target's context of {target.context}: "
            "give a smaller --max-length or --answer-tokens"
        )
