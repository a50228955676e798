"""A causal language model as a drafter (Leviathan et al., arXiv:2211.17192): it reads tokens, no target features.

Entry e of a text holds the token at position e + 1 (`Entries.next_ids`). In training the model runs once over all
entries; a path's token that an entry holds needs no pass of its own (teacher forcing: step k at root r is step 0 at
root r + k), only drafted tokens are appended as further nodes. In decoding the state is a `TreeCache`.

Legend: B batch, E entries, P paths, K steps, A new tokens, W nodes of a level, S drafted nodes, h hidden.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from vsd.drafters.autoregressive import Autoregressive
from vsd.drafters.base import FeatureSpec, Objective
from vsd.drafters.vocabulary import DraftVocabulary
from vsd.errors import ConfigurationError, MismatchError
from vsd.paths import Entries, Paths, rows_at
from vsd.targets import Decoder, Inputs, Padded, TargetInfo, TreeCache
from vsd.targets.load import first_line
from vsd.targets.packed import pack_linears

_FINGERPRINT = "target_fingerprint"  # in config.json; engines ignore it
_LAYERS = 4  # of a new drafter


class LMState:
    """A cache of the committed tokens, the root included, and the output for the root, `hidden` [B, 1, h]."""

    hidden: Tensor

    def __init__(self, cache: TreeCache) -> None:
        self.cache = cache

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows `rows` [B']."""
        self.cache.select(rows)
        self.hidden = self.hidden[rows]


class LMDrafter(Autoregressive, nn.Module):
    """The model's own weights under the model's own names: a checkpoint is the plain model's.

    Args:
        model: a causal LM with full or sliding-window attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.decoder = Decoder(model)

    @classmethod
    def for_target(cls, target: TargetInfo, vocabulary: DraftVocabulary, **overrides: Any) -> "LMDrafter":
        """A new drafter of the target's architecture with few layers; embedding, norm and head are the target's.

        Args:
            vocabulary: not used: the model proposes every token.
            overrides: any field of the target's configuration; with another `hidden_size` all weights are random.
        """
        config = copy.deepcopy(target.config)
        config.final_logit_softcapping = None  # q is the softmax of the LM head's output
        layers = overrides.get("num_hidden_layers", min(_LAYERS, config.num_hidden_layers))
        kinds = getattr(config, "layer_types", None)
        fields = {"num_hidden_layers": layers, **({"layer_types": kinds[:layers]} if kinds else {}), **overrides}
        for name, value in fields.items():
            if not hasattr(config, name):
                raise ConfigurationError(f"drafter_options: {config.model_type} has no field {name}: leave it out")
            setattr(config, name, value)
        if layers < 1:
            raise ValueError(f"num_hidden_layers must be at least 1, not {layers}")
        setattr(config, _FINGERPRINT, target.fingerprint())
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        drafter = cls(model)
        if config.hidden_size == target.hidden_size:
            drafter._copy_ends(target)
        drafter.to(target.device)
        drafter.attach(target)
        with torch.no_grad():  # sizes that do not fit each other fail here, not in the first step
            drafter.decoder.sequences(Padded.of([Inputs([0, 0])], drafter.device))
        return drafter

    @classmethod
    def read(cls, path: Path, target: TargetInfo, dtype: torch.dtype | None) -> "LMDrafter":
        """A causal LM in a folder.

        Raises:
            MismatchError: it cannot be read.
        """
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype or "auto",
                use_safetensors=True,
                attn_implementation="sdpa",
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise MismatchError(f"cannot load a drafter from '{path}': {first_line(error)}") from error
        model, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise MismatchError(f"'{path}' lacks {', '.join(missing[:3])}: copy it again")
        drafter = cls(model.to(target.device))
        drafter._check_head(path)
        return drafter

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    @property
    def needs(self) -> FeatureSpec:
        """Nothing but tokens."""
        return FeatureSpec()

    @property
    def vocabulary(self) -> DraftVocabulary:
        """Every token."""
        return DraftVocabulary(torch.arange(self.config.vocab_size, device=self.device), self.config.vocab_size)

    @property
    def lm_head(self) -> Any:
        """The model's LM head."""
        return self.model.get_output_embeddings()

    def attach(self, target: TargetInfo) -> None:
        """See `Drafter.attach`: vocabularies must be alike; a drafter trained here knows its target's fingerprint."""
        if self.config.vocab_size != target.vocab_size:
            raise MismatchError(
                f"this drafter has a vocabulary of {self.config.vocab_size} tokens, the target {target.vocab_size}: "
                "a draft model needs the target's tokenizer"
            )
        own = getattr(self.config, _FINGERPRINT, None)
        if own is None:
            setattr(self.config, _FINGERPRINT, target.fingerprint())
        elif own != target.fingerprint():
            raise MismatchError(
                f"this drafter was trained for another target: fingerprint {own}, not {target.fingerprint()}"
            )

    def forward(self, entries: Entries, paths: Paths, objective: Objective) -> Any:
        """See `Drafter.__call__`; a bias of the LM head is a further column of it, and a further 1 of every state."""
        states, head, bias = self.states(entries, paths), self.lm_head.weight, self.lm_head.bias
        if bias is None:
            return objective(states, head)
        return objective(F.pad(states, (0, 1), value=1.0), torch.cat([head, bias[:, None]], dim=1))

    def states(self, entries: Entries, paths: Paths) -> Tensor:
        """See `Autoregressive.states`: one pass over entries and drafted tokens."""
        (B, P, K), nodes = paths.tokens.shape, paths.entries[..., :-1]  # step k + 1 is found at nodes[..., k]
        drafted = (nodes < 0) & paths.valid[..., 1:]
        some = drafted.any(2).any(0).nonzero()[:, 0]  # paths that no entries hold
        if len(some):
            E, own = entries.next_ids.shape[1], torch.arange(len(some) * (K - 1), device=nodes.device)
            nodes = nodes.index_copy(1, some, (E + own.view(-1, K - 1)).expand(B, -1, -1))
            hidden = self._entries_and(entries, paths.roots[:, some], paths.tokens[:, some, :-1])
        else:
            hidden = self._pass(entries)
        reach = torch.cat([paths.roots[..., None], nodes], dim=-1).clamp(0, hidden.shape[1] - 1)  # [B, P, K]
        found = rows_at(hidden, reach.flatten(1))
        return found.view(B, P, K, -1).permute(2, 0, 1, 3)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """See `Autoregressive.log_probs`."""
        log_q: Tensor = self.lm_head(hidden).float().log_softmax(-1)
        return log_q

    @torch.no_grad()
    def sample(self, entries: Entries, roots: Tensor, steps: int, choose: Callable[[Tensor], Tensor]) -> None:
        """See `Drafter.sample`."""
        state, tokens = self.begin_at(entries, roots, steps), entries.next_ids.gather(1, roots).flatten()
        law, none = self.conditionals(state, tokens, steps), torch.zeros_like(tokens)[:, None]
        for k in range(steps):
            tokens = choose(law(k, tokens[:, None], none).log_q.view(*roots.shape, -1)).flatten()

    @torch.no_grad()
    def begin_at(self, entries: Entries, roots: Tensor, room: int) -> LMState:
        """See `Drafter.begin_at`; entries must be those of one text."""
        B, P = roots.shape
        ids = torch.cat([entries.first_ids[:, None], entries.next_ids[:, :-1]], dim=1)  # [B, E], the text
        lengths = torch.full((B,), ids.shape[1], device=ids.device)
        state = LMState(self.decoder.new_cache(B, ids.shape[1] + room))
        text = Padded(ids, lengths, entries.positions, ())
        hidden = self.decoder.prefill(text, state.cache).hidden
        state.cache.select(torch.arange(B, device=ids.device).repeat_interleave(P))
        at = roots.flatten() + 1  # the token that the root entry holds
        state.cache.truncate(at + 1)
        state.hidden = rows_at(hidden, roots + 1).flatten(0, 1)[:, None]
        return state

    def begin(self, prompt: Padded, aux: Tensor, root: Tensor, capacity: int) -> LMState:
        """See `Drafter.begin`."""
        state = LMState(self.decoder.new_cache(len(root), capacity + 1))
        self.decoder.prefill(prompt._replace(extras=()), state.cache)
        self.advance(state, aux, root[:, None], torch.ones_like(root))
        return state

    def advance(self, state: LMState, aux: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """See `Drafter.advance`: the decided tokens are read again, as the tree was cut to other ones."""
        (B, A), cache = tokens.shape, state.cache
        order = torch.arange(A, device=tokens.device)
        positions = cache.next[:, None] + order
        chain = (order[:, None] >= order)[None]
        hidden = self.decoder.nodes(tokens, positions, chain, cache).hidden
        cache.commit(order.expand(B, A), counts)
        state.hidden = hidden.gather(1, (counts - 1)[:, None, None].expand(-1, 1, hidden.shape[-1]))

    def expand(self, state: LMState, hidden: Tensor, tokens: Tensor, depth: int, seen: Tensor) -> Tensor:
        """See `Autoregressive.expand`."""
        cache, (W, S) = state.cache, seen.shape[1:]
        fill, lengths = cache.slots.fill, cache.lengths
        committed = (torch.arange(fill, device=tokens.device) < lengths[:, None])[:, None].expand(-1, W, -1)
        before, own = seen.split([S - W, W], dim=-1)
        cache.slots.fill = fill + S - W  # behind the levels drafted before
        positions = (cache.next - 1 + depth)[:, None].expand(-1, W)
        output = self.decoder.nodes(tokens, positions, own, cache, torch.cat([committed, before], dim=-1))
        cache.slots.fill = fill
        return output.hidden

    def freeze(self) -> None:
        """See `Drafter.freeze`."""
        self.eval().requires_grad_(False)
        pack_linears(self.model)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass."""
        self.model.gradient_checkpointing_enable(**options)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's."""
        return self.model.load_state_dict(*args, **kwargs)

    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        """A folder that `AutoModelForCausalLM.from_pretrained` reads."""
        implementation = self.model.config._attn_implementation
        self.model.save_pretrained(folder, **kwargs)
        self.model.config._attn_implementation = implementation

    def _pass(self, entries: Entries) -> Tensor:
        """Outputs [B, E, h] for the tokens that entries hold."""
        positions = torch.cat([torch.zeros_like(entries.positions[:, :1]), entries.positions + 1], dim=1)
        ids = torch.cat([entries.first_ids[:, None], entries.next_ids], dim=1)  # [B, 1 + E]
        if entries.seen is None:
            lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
            return self.decoder.sequences(Padded(ids, lengths, positions, ())).hidden[:, 1:]
        return self.decoder.packed(ids, positions, _with_first(entries.seen)).hidden[:, 1:]

    def _entries_and(self, entries: Entries, roots: Tensor, tokens: Tensor) -> Tensor:
        """Outputs [B, E + P k, h] for the entries' tokens and for chains of tokens [B, P, k] below roots [B, P]."""
        B, P, k = tokens.shape
        E, device = entries.next_ids.shape[1], tokens.device
        places = torch.arange(E, device=device)
        text = (places <= places[:, None]).expand(B, E, E) if entries.seen is None else entries.seen
        above = entries.seen_from(roots).repeat_interleave(k, dim=1)  # [B, P k, E]
        order = torch.arange(k, device=device)
        chain = torch.block_diag(*[order[:, None] >= order] * P).bool().expand(B, -1, -1)
        seen = torch.cat([F.pad(text, (0, P * k)), torch.cat([above, chain], dim=2)], dim=1)
        behind = entries.positions.gather(1, roots)[..., None] + 2 + order  # [B, P, k]
        ids = torch.cat([entries.first_ids[:, None], entries.next_ids, tokens.flatten(1)], dim=1)
        zero = torch.zeros_like(entries.positions[:, :1])
        positions = torch.cat([zero, entries.positions + 1, behind.flatten(1)], dim=1)
        return self.decoder.packed(ids, positions, _with_first(seen)).hidden[:, 1:]

    @torch.no_grad()
    def _check_head(self, path: Path) -> None:
        """Refuse a model that changes its logits behind the LM head: training would see another q than engines."""
        text = Padded.of([Inputs([token % self.config.vocab_size for token in range(4)])], self.device)
        own = self.model(input_ids=text.ids).logits.float()
        ours = self.lm_head(self.decoder.sequences(text).hidden).float()
        if not torch.allclose(own, ours, rtol=2e-2, atol=2e-2 * float(own.abs().max())):
            raise MismatchError(f"'{path}' caps or scales its logits: not supported as a drafter")

    @torch.no_grad()
    def _copy_ends(self, target: TargetInfo) -> None:
        embedding: Any = self.model.get_input_embeddings()
        embedding.weight.copy_(target.embedding_weight)
        self.lm_head.weight.copy_(target.head_weight)
        if target.head_bias is not None and self.lm_head.bias is not None:
            self.lm_head.bias.copy_(target.head_bias)


def _with_first(seen: Tensor) -> Tensor:
    """Masks [B, N, N] with the text's first token before all others, which every node attends to: [B, 1 + N, 1 + N]."""
    wider = F.pad(seen, (1, 0, 1, 0))
    wider[:, :, 0] = True
    return wider
