"""A tiny target and tokenizer built in code, so that tests need neither a hub nor minutes.

The tokenizer knows one token a character and the special tokens of four template families, so that every
mask can be worked out by hand. The model is random, but its head leans towards letters and away from
control tokens, so that it "speaks": answers end, and most turns it makes up are usable.
"""

import string
from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vsd.targets.target import Target

VOCAB = 128
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]"]
SPECIAL += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
CHARACTERS = "\n" + string.printable[:95]

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(
    chat_template: str = CHATML, more: Sequence[str] = (), **names: dict[str, str]
) -> PreTrainedTokenizerFast:
    """128 tokens: 15 special ones, printable ASCII and the newline, `more` special ones, and unused ones."""
    words = [*SPECIAL, *CHARACTERS, *more]
    words += [f"<unused{i}>" for i in range(VOCAB - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=[*SPECIAL[1:], *more],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **names,
    )


def tiny_target(seed: int = 0) -> Target:
    """A random Llama: 4 layers, hidden 32, 4 heads of which 2 hold keys, vocabulary 128."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # channel 0 of every hidden state is a constant, so column 0 of the head is a bias
        model.model.embed_tokens.weight.mul_(5.0)[:, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 1:] *= 3.0
        model.lm_head.weight[:, 0] = -6.0
        model.lm_head.weight[len(SPECIAL) : len(SPECIAL) + len(CHARACTERS), 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 0.5
    return Target(model, tokenizer, name="tiny")
