"""Lossless speculative decoding of a batch: draft a tree, verify it in one target pass, commit the accepted nodes.

Without a drafter the tree consists of its root; the engine then performs plain decoding, the baseline.

Legend: B active rows, N nodes of a tree, A accepted nodes of the row that accepts most, h hidden, V vocabulary.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsd.decoding.lookup import SURE, Lookup
from vsd.decoding.sampling import Sampling
from vsd.drafters import Drafter
from vsd.errors import ConfigurationError, TargetError
from vsd.paths import Chain, Tree, TreeShape, ancestors, graft, rows_at
from vsd.targets import Inputs, Output, Padded, Target, TreeCache
from vsd.verification import Law, Verdict, verify


@dataclass
class Result:
    """One answer and its verification passes.

    Attributes:
        prompt: inputs of the prompt.
        finish: "stop" (EOS or stop string), "length" (max_new_tokens) or "window" (the target's context is full).
        accepted: drafted tokens accepted by each verification pass.
        delivered: new tokens that each pass added to the answer, bonus token included.
        trees: for each pass, (nodes of the tree, root included; levels that the drafter drafted).
    """

    prompt: Inputs
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    accepted: list[int] = field(default_factory=list)
    delivered: list[int] = field(default_factory=list)
    trees: list[tuple[int, int]] = field(default_factory=list)


class States(NamedTuple):
    """The target's states at the text that one pass added to the cache: of every row as many as `counts` says.

    Attributes:
        rows: [B] index into the prompts.
        counts: [B] tokens; the pass over the prompts adds the prompts.
        output: hidden [B, A, h] and aux [B, A, n h] of those tokens.
    """

    rows: list[int]
    counts: list[int]
    output: Output


class Step(NamedTuple):
    """One verification pass: new tokens by row index, and seconds spent to draft, verify and commit."""

    tokens: dict[int, list[int]]
    draft: float
    verify: float
    commit: float


@dataclass
class _State:
    """The state between two steps, for the rows still active."""

    rows: list[int]  # [B] index into the prompts
    laws: list[Law]  # [B]
    root: Tensor  # [B] the last decoded token, not yet in the cache
    cache: TreeCache
    draft: Any  # the drafter's state
    lookups: list[Lookup]  # [B] n-grams of prompt and answer


class Engine:
    """Decodes with a target and, if given, a drafter.

    Args:
        target: the frozen model.
        drafter: None for plain decoding.
        shape: the draft tree.
        verification: "auto" is `greedy` at temperature 0 and `target` above 0; "rejection" samples chains from the
            drafter (temperature > 0; needs a tree of top_k 1).
        layers: features in the `States` of plain decoding; with a drafter they are those that it reads.

    Raises:
        VSDError: the drafter belongs to another target, or the verification does not fit the tree.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        shape: TreeShape | None = None,
        verification: str = "auto",
        layers: tuple[int, ...] = (),
    ) -> None:
        self.target, self.drafter, self.shape = target, drafter, shape or TreeShape()
        self.verification, self.layers = verification, layers
        if drafter is not None:
            drafter.attach(target)
            self.layers = drafter.needs.layers
            if self.shape.top_k > drafter.vocabulary.size:
                raise ConfigurationError(
                    f"top_k {self.shape.top_k} is too wide: the drafter proposes {drafter.vocabulary.size} tokens"
                )
        if verification not in ("auto", "rejection"):
            raise ConfigurationError(f"unknown verification '{verification}': choose auto or rejection")
        if verification == "rejection" and self.shape.lookup:
            raise ConfigurationError("rejection sampling verifies what a drafter has drawn: use lookup 0")
        if verification == "rejection" and self.shape.top_k != 1:
            raise ConfigurationError("rejection sampling verifies chains: use top_k 1 (for trees, verification 'auto')")

    @property
    def _depth(self) -> int:
        """Maximum number of tree levels below the root."""
        return self.shape.deepest if self.drafter is not None else self.shape.lookup

    def generate(self, prompts: Sequence[Inputs | list[int]], sampling: Sampling | Sequence[Sampling]) -> list[Result]:
        """Answer a batch of prompts (inputs, or token ids), with one `Sampling` for all or one for each."""
        results = [Result(prompt if isinstance(prompt, Inputs) else Inputs(prompt)) for prompt in prompts]
        for _ in self.stream(results, sampling):
            pass
        return results

    @torch.inference_mode()
    def stream(
        self,
        results: list[Result],
        sampling: Sampling | Sequence[Sampling],
        keep: Callable[[States], None] | None = None,
    ) -> Iterator[Step]:
        """Answer `results[i].prompt` for all i, fill each result in place and yield after every pass.

        The caller can end an answer early by setting the `finish` of its result.

        Args:
            keep: called with the states of every pass, that over the prompts first.

        Raises:
            VSDError: a prompt is empty or leaves no room in the target's context window; the target or the drafter
                computes NaN; the logits processors exclude every token.
        """
        samplings = [sampling] * len(results) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(results):
            raise ConfigurationError(
                f"{len(samplings)} samplings for {len(results)} prompts: give one, or one for each"
            )
        self._check_prompts(results)
        laws = [s.law(self.target) for s in samplings]
        for result, s in zip(results, samplings):
            if s.max_new_tokens == 0:
                result.finish = "length"
        rows = [i for i, result in enumerate(results) if not result.finish]
        if not rows:
            return
        state, first = self._prefill(rows, results, laws, max(s.max_new_tokens for s in samplings), keep)
        deliver = [_Delivery(self.target, s) for s in samplings]
        yield Step({i: deliver[i](results[i], [int(t)]) for i, t in zip(state.rows, state.root)}, 0, first, 0)
        while self._retire(state, results):
            yield self._step(state, results, deliver, keep)

    def _step(
        self,
        state: _State,
        results: list[Result],
        deliver: list["_Delivery"],
        keep: Callable[[States], None] | None,
    ) -> Step:
        """One verification pass: draft, verify, commit, and add the new tokens to the results."""
        clock = _Clock(self.target.device)
        tree, chain, levels = self._draft(state, results)
        drafted = clock.lap()
        output = self._forward(tree, state)
        verdict = self._verify(tree, chain, output.hidden, state, results)
        path = self._path(tree, verdict)
        counts, decided = verdict.counts.tolist(), path.tolist()
        verified = clock.lap()
        self._commit(state, verdict, output, path)
        if keep is not None:
            keep(States(state.rows, counts, Output(*(rows_at(x, verdict.nodes) for x in output))))
        new, size = {}, (tree.tokens.shape[1], levels)
        for i, count, tokens in zip(state.rows, counts, decided):
            results[i].accepted.append(count - 1)
            new[i] = deliver[i](results[i], tokens[:count])
            results[i].delivered.append(len(new[i]))
            results[i].trees.append(size)
        return Step(new, drafted, verified, clock.lap())

    def _prefill(
        self,
        rows: list[int],
        results: list[Result],
        laws: list[Law],
        max_new_tokens: int,
        keep: Callable[[States], None] | None,
    ) -> tuple[_State, float]:
        """Prefill; the first token of each answer becomes a root. Returns the state and the seconds."""
        clock = _Clock(self.target.device)
        prompt = Padded.of([results[i].prompt for i in rows], self.target.device)
        B, longest = prompt.ids.shape
        capacity = min(longest + max_new_tokens, self.target.context or sys.maxsize) + self.shape.largest + 1
        cache = self.target.new_cache(B, capacity)
        output = self.target.prefill(prompt, cache, self.layers)
        last = (prompt.lengths - 1)[:, None, None].expand(-1, 1, output.hidden.shape[-1])
        state = _State(rows, [laws[i] for i in rows], prompt.ids.gather(1, last[..., 0])[:, 0], cache, None, [])
        state.root = self._verify(_lone(state.root), None, output.hidden.gather(1, last), state, results).bonus
        state.lookups = [Lookup(results[i].prompt.ids) for i in rows if self.shape.lookup]
        if self.drafter is not None:
            room = capacity + self.shape.depth * self.shape.top_k
            state.draft = self.drafter.begin(prompt, output.aux, state.root, room)
        if keep is not None:
            keep(States(rows, prompt.lengths.tolist(), output))
        return state, clock.lap()

    def _draft(self, state: _State, results: list[Result]) -> tuple[Tree, Chain | None, int]:
        """The tree to verify, its sampled chain (rejection only), and the number of levels that the drafter drafted."""
        if not self.shape.lookup:
            return self._drafted(state)
        found = []
        for lookup, i in zip(state.lookups, state.rows):
            lookup.extend(results[i].tokens[len(lookup.tokens) - len(results[i].prompt.ids) :])
            found.append(lookup.propose(self.shape.lookup))
        sure = all(n >= SURE for _, n in found)
        tree, _, levels = (_lone(state.root), None, 0) if sure else self._drafted(state)
        return graft(tree, [tokens for tokens, _ in found])[0], None, levels

    def _drafted(self, state: _State) -> tuple[Tree, Chain | None, int]:
        if self.drafter is None:
            return _lone(state.root), None, 0
        temperatures, chain = [law.temperature for law in state.laws], None
        if self.verification == "rejection" and any(temperatures):
            generators = [law.generator for law in state.laws]
            chain = self.drafter.draw(state.draft, state.root, self.shape, temperatures, generators)
        tree = _sound(chain.tree if chain else self.drafter.propose(state.draft, state.root, self.shape))
        return tree, chain, self.shape.levels(int(tree.depths.max()))

    def _forward(self, tree: Tree, state: _State) -> Output:
        positions = state.cache.next[:, None] + tree.depths
        if self.target.context is not None:
            positions.clamp_(max=self.target.context - 1)  # tokens beyond the context are never delivered
        ids = tree.tokens.clamp(min=0)  # outputs of nodes without a token are not used
        above = ancestors(tree.parents, self._depth)
        return self.target.forward(ids, positions, above, state.cache, layers=self.layers)

    def _verify(self, tree: Tree, chain: Chain | None, hidden: Tensor, state: _State, results: list[Result]) -> Verdict:
        def history(b: int) -> list[int]:
            return results[state.rows[b]].prompt.ids + results[state.rows[b]].tokens

        return verify(tree, self.target.logits(hidden), state.laws, history, chain)

    @staticmethod
    def _path(tree: Tree, verdict: Verdict) -> Tensor:
        """New tokens of every row [B, A]: the accepted tokens below the root, then the bonus token."""
        accepted = tree.tokens.clamp(min=0).gather(1, verdict.nodes)
        shifted = torch.cat([accepted[:, 1:], accepted[:, :1]], dim=1)
        return shifted.scatter(1, verdict.counts[:, None] - 1, verdict.bonus[:, None])

    def _commit(self, state: _State, verdict: Verdict, output: Output, path: Tensor) -> None:
        """Keep the accepted nodes in both models' states; the bonus token is the next root."""
        state.cache.commit(verdict.nodes, verdict.counts)
        state.root = verdict.bonus
        if self.drafter is not None:
            self.drafter.advance(state.draft, rows_at(output.aux, verdict.nodes), path, verdict.counts)

    @staticmethod
    def _retire(state: _State, results: list[Result]) -> bool:
        """Remove finished rows from the batch; False when no row is left."""
        keep = [b for b, i in enumerate(state.rows) if not results[i].finish]
        if len(keep) < len(state.rows) and keep:
            rows = torch.tensor(keep, device=state.root.device)
            state.root = state.root[rows]
            state.cache.select(rows)
            if state.draft is not None:
                state.draft.select(rows)
        state.rows, state.laws = [state.rows[b] for b in keep], [state.laws[b] for b in keep]
        state.lookups = [state.lookups[b] for b in keep if state.lookups]
        return bool(keep)

    def _check_prompts(self, results: list[Result]) -> None:
        window = self.target.context
        for i, result in enumerate(results):
            length = len(result.prompt.ids)
            if not length:
                raise ConfigurationError(f"prompt {i} is empty")
            if window is not None and length >= window:
                raise ConfigurationError(f"prompt {i} has {length} tokens; the target's window is {window}")


def _sound(tree: Tree) -> Tree:
    """Refuse NaN scores: with them a node can lose its parent, and decoding is no longer lossless."""
    if bool(tree.log_q.isnan().any()):
        raise TargetError("the drafter computes NaN or infinity: its weights, or its precision, are broken")
    return tree


def _lone(root: Tensor) -> Tree:
    """The tree that consists of its root [B]."""
    zero = torch.zeros_like(root[:, None])
    return Tree(root[:, None], zero, zero, zero.float())


class _Delivery:
    """Appends new tokens to an answer until the answer ends."""

    def __init__(self, target: Target, sampling: Sampling) -> None:
        self.sampling = sampling
        self.eos = sampling.ends(target)
        self.window = target.context or sys.maxsize
        self.text: Callable[[list[int]], Any] = target.tokenizer.decode

    def __call__(self, result: Result, tokens: list[int]) -> list[int]:
        """Append tokens; set `finish` if the answer ends; return the appended tokens."""
        start = len(result.tokens)
        for token in tokens:
            result.tokens.append(token)
            if token in self.eos or self._stopped(result.tokens):
                result.finish = "stop"
            elif len(result.tokens) == self.sampling.max_new_tokens:
                result.finish = "length"
            elif len(result.prompt.ids) + len(result.tokens) >= self.window:
                result.finish = "window"
            if result.finish:
                break
        return result.tokens[start:]

    def _stopped(self, tokens: list[int]) -> bool:
        if not self.sampling.stop:
            return False
        # A stop string of n characters is completed within the last n + 4 tokens, whatever bytes they split.
        tail = self.text(tokens[-max(map(len, self.sampling.stop)) - 4 :])
        return any(stop in tail for stop in self.sampling.stop)


class _Clock:
    """Measures the seconds between laps; every lap synchronizes the device."""

    def __init__(self, device: torch.device) -> None:
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.lap()

    def lap(self) -> float:
        self.wait()
        now = time.perf_counter()
        elapsed, self.last = now - getattr(self, "last", now), now
        return elapsed
