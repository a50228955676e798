"""Tiny random targets that read images, one of every family, with their processors, and pictures for them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3Processor,
    Idefics3Config,
    Idefics3Processor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SmolVLMConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tiny
from architectures import GROUPED, SIZES
from vsd.targets import Inputs, Target
from vsd.targets.images import ImageReader, Picture, put_together

QWEN = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
GEMMA = ["<start_of_image>", "<image_soft_token>", "<end_of_image>"]
IDEFICS = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>"]
IDEFICS += ["<row_2_col_1>", "<row_2_col_2>"]
TOKENS = ["<image>", *QWEN, *GEMMA, *IDEFICS]
ID = {token: len(tiny.SPECIAL) + len(tiny.CHARACTERS) + i for i, token in enumerate(TOKENS)}
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "gemma3")
PRINTED = {"gemma3": GEMMA[0], "qwen2_5_vl": "".join(QWEN[:3]), "qwen3_vl": "".join(QWEN[:3])}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'MARKER' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {**SIZES, **GROUPED, "tie_word_embeddings": False}
EYES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
PIXELS = {"size": {"shortest_edge": 64, "longest_edge": 1024}, "patch_size": 4, "merge_size": 2}


def picture(seed: int, width: int = 8, height: int = 8) -> Picture:
    """Noise, as the bytes of a PNG file."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return Picture.of(file.getvalue(), f"picture {seed}")


def config(family: str) -> Any:
    """A configuration whose vision tower has as many layers as its language model."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    patches = {"image_size": 8, "patch_size": 2}
    qwen = {"image_token_id": ID[QWEN[1]], "video_token_id": ID[QWEN[3]], "vision_start_token_id": ID[QWEN[0]]}
    square = {"depth": 4, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    square |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.3}
    if family == "llava":
        eyes = {"model_type": "clip_vision_model", **EYES, "image_size": 8, "patch_size": 4, "initializer_range": 0.3}
        text = {"model_type": "llama", **TEXT}
        return LlavaConfig(vision_config=eyes, text_config=text, image_token_index=ID["<image>"])
    if family == "qwen2_5_vl":
        eyes = {**square, "window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=eyes, **qwen)
    if family == "qwen3_vl":
        eyes = {**square, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        return Qwen3VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=eyes, **qwen)
    if family in ("idefics3", "smolvlm"):
        kind = Idefics3Config if family == "idefics3" else SmolVLMConfig
        text = {"model_type": "llama", **TEXT}
        eyes = {**EYES, **patches, "initializer_range": 0.3}
        return kind(vision_config=eyes, text_config=text, image_token_id=ID["<image>"], scale_factor=2)
    kinds = ["sliding_attention", "full_attention"] * 2
    text = {**TEXT, "sliding_window": 5, "layer_types": kinds, "query_pre_attn_scalar": 8}
    ids = {"image_token_index": ID[GEMMA[1]], "boi_token_index": ID[GEMMA[0]], "eoi_token_index": ID[GEMMA[2]]}
    eyes = {**EYES, **patches}
    return Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4, tie_word_embeddings=False, **ids)


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    names = {"image_token": "<image>"}
    if family == "gemma3":
        names = dict(zip(("boi_token", "image_token", "eoi_token"), GEMMA))
    elif family.startswith("qwen"):
        names = {"image_token": QWEN[1], "video_token": QWEN[3]}
    template = TEMPLATE.replace("MARKER", PRINTED.get(family, "<image>"))
    return tiny.tiny_tokenizer(template, TOKENS, model_specific_special_tokens=names)


def processor(family: str) -> ProcessorMixin:
    words = tokenizer(family)
    square = {"height": 8, "width": 8}
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=square)
        options = {"patch_size": 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
        return put_together(LlavaProcessor, images, words, options)
    if family.startswith("qwen"):
        kind = Qwen2_5_VLProcessor if family == "qwen2_5_vl" else Qwen3VLProcessor
        return put_together(kind, Qwen2VLImageProcessorPil(**PIXELS), words, {})
    if family in ("idefics3", "smolvlm"):
        images = Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
        return put_together(Idefics3Processor, images, words, {"image_seq_len": 4})
    return put_together(Gemma3Processor, Gemma3ImageProcessorPil(size=square), words, {"image_seq_length": 4})


def target(family: str, seed: int = 0) -> Target:
    """A random float32 target; pictures move its logits."""
    torch.manual_seed(seed)
    settings = config(family)
    model = AutoModelForImageTextToText.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.mul_(3.0)
            elif "vision" in name or "visual" in name or "projector" in name or "connector" in name:
                parameter.normal_(0, 0.3)
        model.get_output_embeddings().weight[settings.image_token_id] = 0  # it writes no image tokens
    made = processor(family)
    return Target(model, made.tokenizer, name=family, images=ImageReader(made, settings))


def write(target: Target, folder: Path) -> None:
    """A folder that `load_target` takes, as checkpoints of multimodal models are."""
    target.model.save_pretrained(folder)
    made = target.images.processor
    made.tokenizer.save_pretrained(folder)
    made.image_processor.save_pretrained(folder)
    settings = {name: value for name, value in made.to_dict().items() if name not in made.get_attributes()}
    (folder / "processor_config.json").write_text(json.dumps(settings))


def said(family: str, text: str) -> str:
    """Text as a chat template prints it, with `#` for an image."""
    return text.replace("#", PRINTED.get(family, "<image>"))


def read(target: Target, text: str, *pictures: Picture) -> Inputs:
    """Inputs of text with `#` for an image."""
    expanded = target.images.expand(said(target.name, text), pictures)
    return target.images.inputs(target.tokenizer(expanded, add_special_tokens=False)["input_ids"], pictures)


def plain(target: Target, text: str, *pictures: Picture, more: Sequence[int] = ()) -> Any:
    """What the model's own processor makes of it, with more tokens of text behind."""
    images = [one.decoded() for one in pictures] or None
    found = target.images.processor(
        text=[said(target.name, text)], images=images, add_special_tokens=False, return_tensors="pt"
    )
    tail = torch.tensor([list(more)], dtype=torch.long)
    fills = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in found:
            found[name] = torch.cat([found[name], fills.get(name, torch.zeros_like(tail))], dim=1)
    return found
