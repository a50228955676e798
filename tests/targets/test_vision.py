"""The embedded multimodal target: a folder that transformers reads, around a language model that stays as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from eye import pixels_of
from tiny import CHATML
from vsd.pictures import render, scene
from vsd.targets import load_target, load_target_info
from vsd.targets.load import resolve
from vsd.targets.vision import IMAGE_TOKEN_ID, IMAGE_TOKENS, WEIGHTS, assembled, llava_config

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"]
PICTURE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with SmolLM2's special tokens."""
    folder = tmp_path_factory.mktemp("text")
    words = [*SPECIAL, "<unk>", *(chr(code) for code in range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=SPECIAL,
        chat_template=CHATML,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            dtype=torch.bfloat16,
        )
    ).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The multimodal target of random tower and projector around it."""
    parts = tmp_path_factory.mktemp("parts")
    tensors = LlavaForConditionalGeneration(llava_config(LlamaConfig.from_pretrained(text))).state_dict()
    renamed = {
        name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in tensors.items()
        if "language_model" not in name and name != "lm_head.weight"
    }
    save_file(renamed, parts / "vision.safetensors", {"format": "pt"})
    return assembled(text, parts / "target", parts / "vision.safetensors")


def test_every_weight_is_read_and_the_language_model_is_unchanged(text: Path, folder: Path) -> None:
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    language = load_file(text / "model.safetensors")
    state = model.model.language_model.state_dict()
    assert len(state) == len(language)
    for name, tensor in language.items():
        assert torch.equal(state[name.removeprefix("model.")], tensor)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_the_processor_writes_a_placeholder_a_patch(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template([PICTURE], add_generation_prompt=True)
    assert "<|im_start|>user\n<image>\nWhat is it?<|im_end|>" in prompt
    wide = Image.new("RGB", (300, 40), (255, 0, 0))
    batch = processor(images=[wide], text=[prompt], return_tensors="pt")
    assert int((batch["input_ids"] == IMAGE_TOKEN_ID).sum()) == IMAGE_TOKENS
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(batch["pixel_values"], red.expand_as(batch["pixel_values"]))
    scenes = [scene(1), scene(2)]
    read = processor.image_processor([render(one) for one in scenes], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(read, pixels_of(map(render, scenes)))  # as the tower is trained on them


def test_texts_without_images_are_those_of_the_language_model(text: Path, folder: Path) -> None:
    old, new = AutoTokenizer.from_pretrained(text), AutoProcessor.from_pretrained(folder)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    chat = [{"role": "system", "content": "Be brief."}, *turns]
    prompt = old.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert new.apply_chat_template(chat, add_generation_prompt=True) == prompt
    assert new.tokenizer.encode(prompt) == old.encode(prompt)
    assert len(new.tokenizer) == len(old)


def test_answers_depend_on_the_picture(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    prompt = processor.apply_chat_template([PICTURE], add_generation_prompt=True)
    logits = [
        model(**processor(images=[Image.new("RGB", (96, 96), colour)], text=[prompt], return_tensors="pt")).logits
        for colour in ("red", "blue")
    ]
    start = int((torch.tensor(processor.tokenizer.encode(prompt)) == IMAGE_TOKEN_ID).nonzero()[0])
    torch.testing.assert_close(logits[0][:, :start], logits[1][:, :start])
    assert not torch.allclose(logits[0][:, -1], logits[1][:, -1], atol=1e-4)


def test_its_ends_are_read_without_the_model(folder: Path) -> None:
    """As `vsd export` reads them: the names of the tower's weights are not those of transformers' modules."""
    target, info = load_target(str(folder), dtype="float32"), load_target_info(str(folder), dtype="float32")
    assert info.fingerprint((1,)) == target.fingerprint((1,))
    assert torch.equal(info.embedding_weight, target.embedding_weight)


def test_it_is_written_once(text: Path, folder: Path) -> None:
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert assembled(text, folder, Path("nowhere")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.real
def test_the_embedded_language_model_is_the_wheels() -> None:
    language = load_file(Path(resolve("smollm2-135m")) / "model.safetensors")
    tensors = load_file(Path(resolve("smollm2-135m-vision")) / "model.safetensors")
    assert all(torch.equal(tensors.pop(f"language_model.{name}"), tensor) for name, tensor in language.items())
    assert tensors.keys() == load_file(WEIGHTS).keys()
    old, new = (AutoTokenizer.from_pretrained(resolve(f"smollm2-135m{end}")) for end in ("", "-vision"))
    assert new.convert_tokens_to_ids("<image>") == IMAGE_TOKEN_ID and len(new) == len(old)
