"""The role of a drafter. Outside `drafters/` no code knows a family; a family is a folder here that fulfils this role.

Legend: B batch, E entries, A new tokens, P paths, K steps, W nodes, V target and Vd draft vocabulary, n h width of the
features.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from vsd.drafters.lattice import Head
from vsd.drafters.vocabulary import DraftVocabulary
from vsd.paths import Chain, Entries, Paths, Tree, TreeShape
from vsd.targets import Padded, TargetInfo
from vsd.targets.sampling import Generators

Objective = Callable[[Tensor, Head], Any]


class FeatureSpec(NamedTuple):
    """The target features a drafter reads.

    Attributes:
        layers: decoder layers, by index of their *inputs*; () for a drafter that reads none.
    """

    layers: tuple[int, ...] = ()


class State(Protocol):
    """A drafter's side of a batch that is being decoded, changed in place by its methods."""

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows `rows` [B']."""


class Drafter(Protocol):
    """A small model that proposes continuations of a text for a frozen target to verify."""

    @property
    def needs(self) -> FeatureSpec:
        """The target features it reads."""

    @property
    def one_pass(self) -> bool:
        """Whether one pass drafts all levels of a tree."""

    @property
    def vocabulary(self) -> DraftVocabulary:
        """The target tokens it can propose."""

    def attach(self, target: TargetInfo) -> None:
        """Check that a target is its own, and take from it the weights that both share.

        Raises:
            MismatchError: the drafter was trained for another target; names the difference.
        """

    # ---- training

    def __call__(self, entries: Entries, paths: Paths, objective: Objective) -> Any:
        """The training pass: `objective` of the states along given paths [K, B, P, h] and of the head.

        The head is the LM head [Vd, h] or, in a family with a selector, a lattice (`vsd.drafters.lattice`). Row k of
        the states predicts the path's token k. The objective is called inside `forward`, so that a wrapper such as DDP
        sees the whole backward pass.
        """

    def confidence(self, states: Tensor) -> Tensor | None:
        """Logit of the probability that its token is accepted if all before it are, [...], at states [..., h].

        States are those of the training pass. None for a drafter that predicts no acceptance.
        """

    # ---- E-step

    def sample(self, entries: Entries, roots: Tensor, steps: int, choose: Callable[[Tensor], Tensor]) -> None:
        """Draft `steps` tokens below every root [B, P]: `choose` takes log q [B, P, Vd] to draft ids [B, P]."""

    def begin_at(self, entries: Entries, roots: Tensor, room: int) -> Any:
        """The state of decoding at roots [B, P] of texts: B P rows, with room for `room` drafted nodes."""

    # ---- decoding

    def begin(self, prompt: Padded, aux: Tensor, root: Tensor, capacity: int) -> Any:
        """The state behind prompts.

        Args:
            aux: target features of the prompts, [B, N, n h].
            root: the first token behind each prompt, already decided by the target, [B].
            capacity: tokens that a row may grow to, those of one draft tree included.
        """

    def propose(self, state: Any, root: Tensor, shape: TreeShape) -> Tree:
        """The draft tree below `root` [B], the token decided last."""

    def draw(
        self, state: Any, root: Tensor, shape: TreeShape, temperature: Sequence[float], generators: Generators
    ) -> Chain:
        """A chain below `root` [B] drawn from q, row b at temperature[b] (0: the best tokens), with its q."""

    def log_q(self, state: Any, root: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """log q [B, K] of a given chain of tokens [B, K] below `root` [B], at a temperature; -inf where q has none."""

    def advance(self, state: Any, aux: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Take in the tokens [B, A] that verification decided, row b the first counts[b]; the last is the next root.

        Args:
            aux: target features of the tokens *before* each of them, [B, A, n h].
        """

    # ---- checkpoints

    def freeze(self) -> None:
        """Make it ready for decoding: no gradients, weights packed where that is faster."""

    def save_pretrained(self, folder: Any, /) -> Any:
        """Write a checkpoint that `load_drafter` reads."""
