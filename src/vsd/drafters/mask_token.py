"""The token that stands at places still to be drafted: its embedding marks them, so texts should not hold it."""

from collections.abc import Iterable

from vsd.targets import TargetInfo


def mask_token(target: TargetInfo) -> int:
    """The tokenizer's mask token; else the last special token that neither ends an answer nor stands in templates."""
    tokenizer = target.tokenizer
    if getattr(tokenizer, "mask_token_id", None) is not None:
        return int(tokenizer.mask_token_id)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    used = {*target.eos_ids, tokenizer.bos_token_id, tokenizer.eos_token_id}
    free = [i for i, text in _special(target) if i not in used and text not in template]
    return max(free, default=int(target.eos_ids[0]))


def _special(target: TargetInfo) -> Iterable[tuple[int, str]]:
    added = getattr(target.tokenizer, "added_tokens_decoder", {})
    return [(i, str(token)) for i, token in added.items() if token.special and i < target.vocab_size]
