"""A server answers about images: they travel in the request, and the record holds the tokens that the target reads."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import seeing
from fake_server import FakeServer
from vsd.data import Server, ServerTeacher, encoded, read_conversations, regenerate
from vsd.data.pictures import pictures_of
from vsd.errors import DataError, MismatchError
from vsd.targets import Target

ANSWER = [20, 21, 22]


class SeeingServer(FakeServer):
    """Counts an image as one token, as its template prints it, and adds `wrong` to the prompt."""

    def __init__(self, target: Target, wrong: str = "") -> None:
        super().__init__()
        self.target, self.wrong = target, wrong

    def completion(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        target = self.target
        messages = [
            {**m, "content": [{"type": "image"} if p["type"] == "image_url" else p for p in m["content"]]}
            for m in body["messages"]
        ]
        text = target.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = target.tokenizer(text + self.wrong, add_special_tokens=False)["input_ids"]
        answer = target.tokenizer.decode(ANSWER)
        choice = {"finish_reason": "length", "message": {"role": "assistant", "content": answer}}
        return {"choices": [{**choice, "token_ids": ANSWER}], "prompt_token_ids": prompt}


@pytest.fixture(scope="module")
def target() -> Target:
    return seeing.target("llava")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two questions about pictures, a file and a data URL."""
    (tmp_path / "a.png").write_bytes(seeing.picture(0).source)
    inline = f"data:image/png;base64,{base64.b64encode(seeing.picture(1).source).decode()}"
    question = {"type": "text", "text": "see"}
    rows = [
        {"id": name, "messages": [{"role": "user", "content": [{"type": "image", "image": image}, question]}]}
        for name, image in (("one", "a.png"), ("two", inline))
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def start(fake: Callable[..., Any], target: Target) -> Callable[..., SeeingServer]:
    return lambda wrong="": fake(target, wrong, kind=SeeingServer)


def answered(server: SeeingServer, target: Target, prompts: Path) -> Path:
    out = prompts.with_name("text.jsonl")
    texts = read_conversations(prompts, need_answer=False)
    teacher = ServerTeacher(Server(server.url, "tiny"), target, 1)
    assert regenerate(teacher, texts, out, max_new_tokens=3, progress=False).written == 2
    return out


def test_images_travel_and_records_are_read_again(target: Target, prompts: Path, start: Any) -> None:
    server = start()
    found = list(encoded(answered(server, target, prompts), target.tokenizer, 512, images=target.images))
    sent = [part["image_url"]["url"] for body in server.asked for m in body["messages"] for part in m["content"][:1]]
    assert [base64.b64decode(url.partition(",")[2]) for url in sent] == [seeing.picture(n).source for n in (0, 1)]
    for number, (conversation, (example,)) in enumerate(found):
        (picture,) = pictures_of(conversation.messages)
        assert picture.digest == seeing.picture(number).digest
        assert example.inputs.ids[-3:] == ANSWER and "pixel_values" in example.inputs.extras
        assert example.inputs.ids.count(target.images.placeholder) > 1


def test_another_template_is_refused(target: Target, prompts: Path, start: Any) -> None:
    with pytest.raises(MismatchError, match="the server's prompt tokens are not those of 'one/0'"):
        answered(start("what"), target, prompts)


def test_a_picture_that_has_gone_is_named(target: Target, prompts: Path, start: Any) -> None:
    texts = list(read_conversations(prompts, need_answer=False))
    texts[0].messages[0]["content"][0]["image"].source.unlink()
    teacher = ServerTeacher(Server(start().url, "tiny"), target, 1)
    with pytest.raises(DataError, match=r"a\.png' cannot be"):
        regenerate(teacher, texts, prompts.with_name("text.jsonl"), max_new_tokens=3, progress=False)
