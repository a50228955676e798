"""EAGLE-3 drafter (Li et al., arXiv:2503.01840): one decoder layer over the target's fused hidden states.

Entry t pairs the target's features at position t with the token at t + 1 and predicts the token at t + 2:

    g_t = fc(aux_t)                                              once, from three target layers
    a   = [input_layernorm(embed(x_{t+1})) ; hidden_norm(g_t)]   2h wide, into q, k, v
    r   = g_t + Attn(a);   out = r + MLP(post_attention_layernorm(r));   logits = lm_head(norm(out))

Drafting further feeds `out` (before `norm`) back in place of g (`vsd.drafters.eagle3.recurrent`).

Tensor names are those of `LlamaForCausalLMEagle3` checkpoints. Token embeddings are the target's (`attach`), so tied
and untied targets are alike and a checkpoint holds the drafter alone.

Legend: B batch, E entries, P paths, h hidden.
"""

from torch import Tensor

from vsd.drafters.eagle3.body import EagleBody
from vsd.drafters.eagle3.layer import EagleLayer
from vsd.drafters.eagle3.recurrent import Recurrent, Roots
from vsd.drafters.feature_drafter import FeatureDrafterConfig
from vsd.paths import Entries, rows_at


class Eagle3Config(FeatureDrafterConfig):
    """Sizes of an EAGLE-3 drafter, and which target it belongs to."""

    model_type = "vsd_eagle3"


class Eagle3Drafter(Recurrent, EagleBody):
    """The drafter; see the module's docstring for the equations."""

    title = "EAGLE-3 drafter"
    config_class = Eagle3Config

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        self.post_init()

    def add_layers(self, config: Eagle3Config) -> None:
        """See `EagleBody.add_layers`."""
        self.midlayer = EagleLayer(config, first=True)

    def decoder_layers(self) -> list[EagleLayer]:
        """See `EagleBody.decoder_layers`."""
        return [self.midlayer]

    def roots(self, entries: Entries, roots: Tensor) -> Roots:
        """See `Recurrent.roots`; the fused features stand for what is fed back."""
        embeds, aux = self.embedded(entries.next_ids, entries.aux)
        fused = self.fc(aux)  # [B, E, h]
        _, a = self.read(embeds, fused)
        shared = self.midlayer.self_attn.keys_values(a, self.rotary_emb(fused, entries.positions))
        hidden = rows_at(fused, roots)
        return Roots(hidden, shared, entries.seen_from(roots), entries.positions.gather(1, roots), roots + 1)

    def read(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `Recurrent.read`."""
        return hidden, self.midlayer.input(embeds, hidden)

    def fed_back(self, hidden: Tensor, output: Tensor) -> Tensor:
        """See `Recurrent.fed_back`: the output."""
        return output

    def predicting(self, hidden: Tensor) -> Tensor:
        """See `Recurrent.predicting`."""
        normed: Tensor = self.norm(hidden)
        return normed
