"""The embedded multimodal target: SmolLM2-135M-Instruct with a small vision tower, as LLaVA.

The language model is the wheel's, bit for bit; tower and projector are this package's own, trained on rendered scenes
(`tools/make_multimodal_target.py`). A special token that SmolLM2 never uses becomes the image placeholder, so that the
embedding keeps its size. The folder is what transformers and vLLM read: a `LlavaForConditionalGeneration` with a SigLIP
tower, a processor that runs on PIL, and SmolLM2's chat template with image parts.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig, SiglipVisionConfig

from vsd.files import made_once

WEIGHTS = Path(__file__).parent.parent / "assets" / "smollm2-135m-vision.safetensors"  # tower and projector
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<image>", 4
_REPLACED = "<reponame>"  # SmolLM2's token of that id; nothing was trained on it, "<repo_name>" has another one
SIDE, PATCH = 96, 16  # pixels
IMAGE_TOKENS = (SIDE // PATCH) ** 2  # placeholders of an image
_TOWER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "vision_use_head": False,
}
_PIXELS = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},  # the whole picture, also where it is not square
    "resample": 3,
    "do_center_crop": False,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "image_token": IMAGE_TOKEN,
    "patch_size": PATCH,
    "vision_feature_select_strategy": "full",
    "num_additional_image_tokens": 0,
}
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llava_config(text: PreTrainedConfig) -> LlavaConfig:
    """The configuration of the tower and projector around a language model's."""
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=SiglipVisionConfig(**_TOWER),
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=text.dtype,
    )


def assembled(text: Path, folder: Path, weights: Path = WEIGHTS) -> Path:
    """The folder of the multimodal target, written on first use; it appears only when it is complete.

    Args:
        text: folder of the language model, in safetensors.
        weights: tower and projector, in safetensors.
    """
    return made_once(folder, partial(_write, text, weights))


def _write(text: Path, weights: Path, folder: Path) -> None:
    config = AutoConfig.from_pretrained(text)
    language = {f"language_model.{name}": tensor for name, tensor in load_file(text / "model.safetensors").items()}
    dtype = next(iter(language.values())).dtype
    vision = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
    save_file(language | vision, folder / "model.safetensors", {"format": "pt"})
    llava_config(config).save_pretrained(folder)
    _write_json(folder / "generation_config.json", _read_json(text / "generation_config.json"))
    _write_tokenizer(text, folder)
    _write_json(folder / "preprocessor_config.json", _PIXELS)
    _write_json(folder / "processor_config.json", _PROCESSOR)


def _write_tokenizer(text: Path, folder: Path) -> None:
    """SmolLM2's tokenizer and chat template, with the image placeholder."""
    tokenizer = _read_json(text / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[IMAGE_TOKEN] = vocabulary.pop(_REPLACED)
    for token in tokenizer["added_tokens"]:
        if token["content"] == _REPLACED:
            token["content"] = IMAGE_TOKEN
    _write_json(folder / "tokenizer.json", tokenizer)
    options = _read_json(text / "tokenizer_config.json") | {"extra_special_tokens": {"image_token": IMAGE_TOKEN}}
    _write_json(folder / "tokenizer_config.json", options)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
