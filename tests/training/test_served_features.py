"""Features from a server: those of the target in process, whatever happens to server, client and files in between.

The server is the tiny target behind HTTP. Its states reach the client through our connector for vLLM, whose base class
and cache are imitated here.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
import tiny_run
from fake_server import FakeServer, Handler
from vsd import cli
from vsd.data import Conversation, Example, Server, Servers, ServerTeacher, load_examples, prompt_inputs, regenerate
from vsd.errors import VSDError
from vsd.features import FeatureServer, InProcess, KeepingServer, KeptFeatures, ServedFeatures, Texts, TextStore, server
from vsd.options import TrainJob
from vsd.targets import Inputs, Padded, Target, TargetInfo, load_target_info
from vsd.training import Collator, DraftDataset
from vsd.training.batch import announced, texts_of
from vsd.training.e_step.continued import ContinuedStep

LAYERS, SLOTS, H = (0, 2, 3), 4, 32
NAME = "0123456789abcdef" * 2


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that runs in vLLM, on an imitation of what it imports."""
    base = "vllm.distributed.kv_transfer.kv_connector.v1"
    imitated: dict[str, dict[str, Any]] = {
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(error=print)},
        "vllm.v1.request": {"RequestStatus": Status},
        f"{base}.base": {"KVConnectorMetadata": object},
        f"{base}.example_hidden_states_connector": {"ExampleHiddenStatesConnector": Base},
    }
    for name, content in imitated.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(server.CONNECTOR))
    monkeypatch.delitem(sys.modules, "vsd_connector", raising=False)
    return import_module("vsd_connector")


class Status:
    FINISHED_STOPPED, FINISHED_ABORTED, FINISHED_IGNORED, FINISHED_ERROR = range(4)


class Base:
    """What the connector inherits from vLLM's example."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._storage_path, self._executor = vllm_config.folder, ThreadPoolExecutor(1)
        self._is_tp_rank_zero, self._metadata = True, None

    def has_connector_metadata(self) -> bool:
        return self._metadata is not None

    def _get_connector_metadata(self) -> Any:
        return self._metadata


def settings(folder: Path, layers: tuple[int, ...] = LAYERS, depth: int = 4, caching: bool = False) -> Any:
    """vLLM's configuration, as far as the connector reads it."""
    hf_config = SimpleNamespace(eagle_aux_hidden_state_layer_ids=[*layers, depth])
    return SimpleNamespace(
        folder=str(folder),
        speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=hf_config)),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 4),
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
    )


class TinyVLLM(FakeServer):
    """Answers with the tiny target and gives its states. `lost` of the next files are not written, as after a kill."""

    models = ("tiny",)
    working = threading.Lock()  # of all servers: they share the target, whose norm tells its input

    def __init__(self, target: Target, connector: ModuleType, folder: Path, *faults: Any, **more: Any) -> None:
        self.target, self.connector = target, connector.VSDConnector(settings(folder, **more), "", "")
        self.lost, self.short = 0, 0  # files that are not written, states that are missing in every file
        self.final: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden
        self.clients = list[FeatureServer]()
        super().__init__(*faults)

    def completion(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        chat, tokenizer = path.endswith("/chat/completions"), self.target.tokenizer
        prompt = prompt_inputs(tokenizer, body["messages"]).ids if chat else body["prompt"]
        with self.working:
            answer, log_probs = self.generated(prompt, body)
            ids = prompt + answer
            found = {"prompt_token_ids": prompt, "kv_transfer_params": self.states(ids, len(prompt), body)}
        content = tokenizer.decode(answer, skip_special_tokens=True)
        choice = {
            "finish_reason": "stop" if answer[-1] in self.target.eos_ids else "length",
            **({"token_ids": answer} if body.get("return_token_ids") else {}),
        }
        choice |= {"message": {"content": content}} if chat else {"text": content}
        return {**found, "choices": [{**choice, "logprobs": {"token_logprobs": log_probs}}]}

    def generated(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """An answer, greedy or sampled, and its log-probabilities."""
        ids, log_probs, temperature = list(prompt), list[float](), body.get("temperature", 0.0)
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        while len(log_probs) < body["max_tokens"]:
            law = self.target.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            drawn = (law / temperature).softmax(-1).multinomial(1, generator=generator) if temperature else law.argmax()
            ids.append(int(drawn))
            log_probs.append(float(law[ids[-1]]))
            if ids[-1] in self.target.eos_ids and not body.get("ignore_eos"):
                break
        return ids[len(prompt) :], log_probs

    def states(self, ids: list[int], prompt: int, body: dict[str, Any]) -> dict[str, Any] | None:
        """The states of a request in blocks of a cache, and what the connector makes of them."""
        found = list[torch.Tensor]()
        norm = self.target.outer.norm.register_forward_pre_hook(lambda module, given: found.append(given[0][0]))
        inputs = self.target.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        norm.remove()
        rows = torch.stack(
            [*(inputs[layer][0] for layer in self.connector.layers), self.final(found[0])], dim=1
        )  # [T, n + 1, h]
        count = -(-len(rows) // SLOTS)
        blocks = torch.randperm(count, generator=torch.Generator().manual_seed(len(ids)))
        slots = rows.new_full((count * SLOTS, *rows.shape[1:]), float("nan"))
        slots[: len(rows)] = rows
        cache = slots.unflatten(0, (count, SLOTS)).transpose(1, 2)[blocks.argsort()]  # [blocks, n + 1, slots, h]
        request = SimpleNamespace(
            request_id="r",
            status=Status.FINISHED_STOPPED,
            all_token_ids=ids,
            num_prompt_tokens=prompt,
            num_computed_tokens=len(ids) - 1 - self.short,
            kv_transfer_params=body.get("kv_transfer_params"),
        )
        _, says = self.connector.request_finished(request, blocks.tolist())
        self.connector._metadata, self.connector._kv_cache = self.connector.build_connector_meta(None), cache
        if self.lost > 0 and says is not None:
            self.lost -= 1
        else:
            self.connector.get_finished({"r"})
        return says


Start = Callable[..., TinyVLLM]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def start(tiny_target: Target, connector: ModuleType, shared: Path, monkeypatch: Any) -> Iterator[Start]:
    """Starts servers of the tiny target; the client waits a second for a file."""
    monkeypatch.setattr(server, "_WAIT", 1.0)
    monkeypatch.setattr("vsd.data.server._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("vsd.data.server.LOG.warning", lambda *args: None)
    started = list[TinyVLLM]()

    def starts(*faults: Any, target: Target = tiny_target, **more: Any) -> TinyVLLM:
        started.append(TinyVLLM(target, connector, shared, *faults, **more))
        return started[-1]

    yield starts
    for one in started:
        for ours in one.clients:
            ours.close()
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="module")
def folder(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/ and text.jsonl."""
    folder = tmp_path_factory.mktemp("target")
    tiny_run.write_target(tiny_target, folder / "target")
    tiny_run.write_text(tiny_target, folder / "text.jsonl", 8)
    return folder


@pytest.fixture
def info(folder: Path) -> TargetInfo:
    return load_target_info(str(folder / "target"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    T, F = True, False
    several = Example(prompt_inputs(tiny_target.tokenizer, [{"role": "user", "content": "hi"}]), [])
    ids = several.inputs.ids
    drafted = [F] * (len(ids) - 6) + [T, T, F, F, T, T]  # two answers
    return [Example(several.inputs, drafted), *tiny_run.tiny_examples(tiny_target, 7)]


def client(of: TinyVLLM, info: TargetInfo) -> FeatureServer:
    found = FeatureServer(of.url, None, None, info)
    of.clients.append(found)
    found.check()
    return found


def assert_same(source: Any, target: Target, examples: list[Example], layers: tuple[int, ...] = LAYERS) -> None:
    """Features of a batch equal those in process, but for the last token's, which no drafter reads."""
    dataset = DraftDataset(examples)
    texts = texts_of(Collator()([dataset[i] for i in range(len(examples))]))
    ours, wanted = source.batch(texts), InProcess(target, layers).batch(texts)
    for b, length in enumerate(texts.inputs.lengths.tolist()):
        torch.testing.assert_close(ours.aux[b, : length - 1], wanted.aux[b, : length - 1], rtol=1e-5, atol=1e-5)
        assert not ours.aux[b, length - 1 :].any()
    for found, expected in ((ours.hidden, wanted.hidden), (ours.log_normaliser, wanted.log_normaliser)):
        torch.testing.assert_close(found[texts.real], expected[texts.real], rtol=1e-5, atol=1e-5)
        assert found.shape == expected.shape and found.dtype == expected.dtype


def test_features_are_those_in_process(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example], shared: Path
) -> None:
    source = ServedFeatures(client(start(), info), LAYERS)
    assert_same(source, tiny_target, examples)
    assert_same(source, tiny_target, examples[::-1])
    fewer = ServedFeatures(source.server, (3, 0))
    assert_same(fewer, tiny_target, examples[:2], (3, 0))
    assert not list(shared.iterdir())  # all files were taken


def test_batches_are_announced_when_they_are_made(examples: list[Example]) -> None:
    heard = list[Texts]()
    batch = announced(heard.append)([DraftDataset(examples)[i] for i in (2, 1)])
    assert [texts.examples.tolist() for texts in heard] == [[2, 1]]
    assert torch.equal(heard[0].inputs.ids, batch["input_ids"]) and heard[0].real.sum() == sum(
        sum(examples[i].drafted) for i in (2, 1)
    )


def test_expected_texts_are_asked_for_once_and_early(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example]
) -> None:
    of = start()
    source = ServedFeatures(client(of, info), LAYERS)
    texts = texts_of(Collator()([DraftDataset(examples)[i] for i in (0, 3)]))
    before = len(of.asked)
    source.expect(texts)
    end = time.monotonic() + 30
    while len(of.asked) < before + 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    source.batch(texts)
    assert len(of.asked) == before + 2
    source.batch(texts)
    assert len(of.asked) == before + 4


@pytest.mark.parametrize("family", ["eagle3", "peagle", "dflash", "lm"])
def test_a_drafter_learns_the_same(
    start: Start, tiny_target: Target, info: TargetInfo, tmp_path: Path, family: str
) -> None:
    """With `TargetInfo` alone: same losses, step by step, and same weights."""
    text = tiny_run.tiny_examples(tiny_target, 8)
    layers = tiny_run.tiny_drafter(tiny_target, text, family=family).needs.layers
    source = ServedFeatures(client(start(layers=(0, 1, 2, 3)), info), layers)
    found = []
    for target, features in ((tiny_target, None), (info, source)):
        options = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "objective": "eagle3"}
        trainer = tiny_run.tiny_trainer(
            target, text, tmp_path, features=features, family=family, learning_rate=1e-2, **options
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 4
        found.append((torch.tensor(losses), dict(trainer.model.named_parameters())))
    (wanted, weights), (losses, ours) = found
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-2, atol=1e-3, msg=name)


# ---- continuations


def drawn(trainer: Any, examples: list[Example]) -> tuple[Texts, Any]:
    """Some texts, and the continuations that the E-step of a trainer draws for them."""
    dataset = DraftDataset(examples)
    batch = trainer.batch(Collator()([dataset[i] for i in range(len(examples))]))
    (step,) = (step for step in trainer._e_steps if isinstance(step, ContinuedStep))
    return batch.texts, step._continuations(batch, trainer._random())


CONTINUED = {"recorded": False, "anchors": 3, "length": 5}


def test_continuations_have_the_states_of_the_target(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example], tmp_path: Path, shared: Path
) -> None:
    """Hidden states, features and normalisers are those of one pass in process over text and continuation."""
    layers = tiny_run.tiny_drafter(tiny_target, examples).needs.layers
    of = start(layers=(0, 1, 2, 3))
    source = ServedFeatures(client(of, info), layers, temperature=0.8)
    options = {"objective": "vsd", "objective_options": CONTINUED, "temperature": 0.8}
    trainer = tiny_run.tiny_trainer(info, examples, tmp_path, features=source, **options)
    texts, found = drawn(trainer, examples)
    assert found.tokens.shape == (8, 3, 5)
    for b, p in itertools.product(range(8), range(3)):
        root, tokens = int(found.roots[b, p]), found.tokens[b, p].tolist()
        ids = texts.inputs.ids[b, : root + 2].tolist()
        assert root + 2 in texts.drafted[b][texts.real[b]] and tokens[0] != texts.inputs.ids[b, root + 2]
        whole = tiny_target.features(Padded.of([Inputs(ids + tokens)]), layers)
        behind = slice(root + 1, root + 1 + 5)  # states that predict the new tokens
        torch.testing.assert_close(found.hidden[b, p], whole.hidden[0, behind], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.aux[b, p], whole.aux[0, root + 2 : root + 6], rtol=1e-4, atol=1e-4)
        normaliser = (tiny_target.logits(whole.hidden[0, behind]) / 0.8).logsumexp(-1)
        torch.testing.assert_close(found.log_normaliser[b, p], normaliser, rtol=1e-4, atol=1e-4)
    asked = of.asked[-1]
    assert (asked["temperature"], asked["top_p"], asked["ignore_eos"]) == (0.8, 1.0, True)  # p itself, whatever ends
    assert not list(shared.iterdir())
    again = drawn(tiny_run.tiny_trainer(info, examples, tmp_path, features=source, **options), examples)[1]
    assert torch.equal(again.tokens, found.tokens)  # draws depend on seed, text and epoch alone


def test_first_tokens_are_drawn_as_in_process(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example], tmp_path: Path
) -> None:
    layers = tiny_run.tiny_drafter(tiny_target, examples).needs.layers
    source = ServedFeatures(client(start(layers=(0, 1, 2, 3)), info), layers)
    options = {"objective": "vsd", "objective_options": CONTINUED}
    ours = drawn(tiny_run.tiny_trainer(info, examples, tmp_path, features=source, **options), examples)[1]
    wanted = drawn(tiny_run.tiny_trainer(tiny_target, examples, tmp_path, **options), examples)[1]
    assert torch.equal(ours.roots, wanted.roots) and torch.equal(ours.tokens[..., 0], wanted.tokens[..., 0])


def test_a_server_that_continues_too_little_is_refused(start: Start, info: TargetInfo, monkeypatch: Any) -> None:
    of = start()
    ours = client(of, info)
    one = of.completion
    of.completion = lambda path, body: one(path, {**body, "max_tokens": 2})
    with pytest.raises(VSDError, match=r"did not continue a text by 4 tokens"):
        ours.continued([1, 2, 3], 4, 1.0, 0)
    of.completion = one
    says = of.connector.request_finished
    with monkeypatch.context() as patch:

        def former(*given: Any) -> Any:
            """The connector before it knew `from`."""
            keep, said = says(*given)
            return keep, {"vsd": {name: value for name, value in said["vsd"].items() if name != "from"}}

        patch.setattr(of.connector, "request_finished", former)
        with pytest.raises(VSDError, match=r"has an older connector: start it with the command"):
            ours.continued([1, 2, 3], 4, 1.0, 0)
    of.faults = [lambda handler: handler.json(400, {"error": {"message": "too long"}})]
    with pytest.raises(VSDError, match=r"of a text of 7 tokens: .*too long.*--max-model-len"):
        ours.continued([1, 2, 3], 4, 1.0, 0)


def test_samples_from_another_law_are_refused(start: Start, tiny_target: Target, info: TargetInfo) -> None:
    """Tokens that the target would hardly write; a server that is asked for no samples passes."""
    of = start()
    ours = FeatureServer(of.url, None, None, info, temperature=0.7)
    of.clients.append(ours)
    ours.check()
    one = of.generated

    def noise(prompt: list[int], body: dict[str, Any]) -> tuple[list[int], list[float]]:
        if not body["temperature"]:
            return one(prompt, body)
        law = tiny_target.model(torch.tensor([prompt])).logits[0, -1]
        return [int(law.argmin())] * body["max_tokens"], []

    of.generated = noise
    with pytest.raises(VSDError, match=r"does not sample from the target: at temperature 0.7 "):
        ours.check()
    client(of, info)  # asks for no samples


@pytest.mark.parametrize("e_step", ["drafted", "trees"])
def test_other_e_steps_need_the_layers(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example], tmp_path: Path, e_step: str
) -> None:
    source = ServedFeatures(client(start(layers=(0, 1, 2, 3)), info), (0, 2, 3))
    options = {"objective": "vsd", "objective_options": {"e_step": e_step, "rule": "target"}}
    with pytest.raises(VSDError, match="need the whole target"):
        tiny_run.tiny_trainer(info, examples, tmp_path, features=source, **options)


# ---- what goes wrong on the way


def test_files_that_a_killed_server_did_not_write_are_asked_for_again(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example], monkeypatch: Any
) -> None:
    of = start()
    source = ServedFeatures(client(of, info), LAYERS)
    monkeypatch.setattr(server, "_WAIT", 0.2)
    of.lost = 2
    (of.connector.folder / f"{NAME}.safetensors.part").write_bytes(b"half")
    assert_same(source, tiny_target, examples[:2])
    of.lost = 99
    with pytest.raises(VSDError, match=r"do not appear in .*must share this folder"):
        assert_same(source, tiny_target, examples[:1])


def test_a_server_that_stops_between_two_texts_is_waited_for(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example]
) -> None:
    """Requests meet a closed connection, an overloaded server and a response cut in the middle."""

    def gone(handler: Handler) -> None:
        handler.close_connection = True
        handler.connection.close()

    def busy(handler: Handler) -> None:
        handler.json(503, {"error": "starting"}, Retry_After="0")

    def cut(handler: Handler) -> None:
        handler.raw(200, b'{"choices": [{"te', Content_Length="500")
        handler.close_connection = True

    of = start()
    source = ServedFeatures(client(of, info), LAYERS)
    of.faults = [gone, busy, cut, gone]
    assert_same(source, tiny_target, examples[:3])


def test_a_response_that_is_lost_behind_its_file_is_given_again(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example]
) -> None:
    """The server does the work twice; both files have one name."""
    of = start()
    source = ServedFeatures(client(of, info), LAYERS)

    def lost(handler: Handler) -> None:
        of.completion(handler.path, handler.body)
        handler.close_connection = True
        handler.connection.close()

    of.faults = [lost]
    assert_same(source, tiny_target, examples[:1])


def test_a_file_of_another_text_is_passed_over(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example], monkeypatch: Any
) -> None:
    """As one of an earlier attempt with another answer is: the file of this attempt replaces it."""
    of = start()
    ours = client(of, info)
    of.connector._executor = Late(of.connector._executor)
    assert_same(ServedFeatures(ours, LAYERS), tiny_target, examples[:2])
    assert of.connector._executor.replaced == 2


class Late:
    """Writes the states of another text first, and those of the right one later."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self.executor, self.replaced = executor, 0

    def submit(self, write: Any, one: Any, *rest: Any) -> Any:
        if not rest:
            return self.executor.submit(write, one)
        self.replaced += 1
        write(replace(one, ids=[t + 1 for t in one.ids]), *rest)
        return self.executor.submit(self.late, write, one, *rest)

    def late(self, write: Any, *rest: Any) -> None:
        time.sleep(0.1)
        write(*rest)


@pytest.mark.parametrize("short", [1, 5])
def test_fewer_states_than_tokens_are_refused(
    start: Start, tiny_target: Target, info: TargetInfo, examples: list[Example], short: int, shared: Path
) -> None:
    of = start()
    source = ServedFeatures(client(of, info), LAYERS)
    of.short = short
    with pytest.raises(VSDError, match=r"gives states .* of \d+ tokens.*without prefix caching"):
        assert_same(source, tiny_target, examples[1:2])
    assert not list(shared.glob("*.safetensors"))


def test_a_damaged_file_is_refused(start: Start, info: TargetInfo, examples: list[Example], monkeypatch: Any) -> None:
    of = start()
    ours = client(of, info)
    monkeypatch.setattr(sys.modules["vsd_connector"], "save_file", lambda tensors, path: Path(path).write_bytes(b"xx"))
    with pytest.raises(VSDError, match="is not whole"):
        ours.text(examples[1].inputs.ids, [len(examples[1].inputs.ids) - 1])


# ---- the wrong server


def test_states_of_anything_else_are_refused(
    start: Start, tiny_target: Target, info: TargetInfo, connector: ModuleType
) -> None:
    other = tiny.tiny_target(seed=1)
    with pytest.raises(VSDError, match=r"states of .* are not those of .* nats away"):
        client(start(target=other), info)
    layer = start()
    inputs = list[torch.Tensor]()
    layer.final = lambda hidden: inputs[-1]
    keep = tiny_target.decoder.layers[3].register_forward_pre_hook(lambda m, given: inputs.append(given[0][0]))
    with pytest.raises(VSDError, match=r"nats away"):
        client(layer, info)
    keep.remove()
    deep = start()
    deep.connector.depth = 5
    with pytest.raises(VSDError, match=r"has a model of 5 layers, .* has 4"):
        client(deep, info)
    with pytest.raises(VSDError, match=r"gives features of layers \[0, 2, 3\], and the drafter reads \[1, 2\]"):
        ServedFeatures(client(start(), info), (1, 2))


def test_servers_without_features_are_refused(start: Start, info: TargetInfo, shared: Path, monkeypatch: Any) -> None:
    plain = start()
    monkeypatch.setattr(plain, "states", lambda *args: None)
    with pytest.raises(VSDError, match=r"answers without features: start it with the command that `vsd data server`"):
        client(plain, info)
    elsewhere = start()
    monkeypatch.setattr(elsewhere.connector, "folder", shared / "nowhere")
    with pytest.raises(VSDError, match=r"nowhere', and this machine has no such folder"):
        client(elsewhere, info)
    silent = start()
    silent.gives_ids = False
    with pytest.raises(VSDError, match=r"gives no token ids, so it gives no features"):
        client(silent, info)


def test_a_text_that_the_server_refuses_is_named(start: Start, info: TargetInfo, examples: list[Example]) -> None:
    of = start()
    ours = client(of, info)
    of.faults = [lambda handler: handler.json(400, {"error": {"message": "too long"}})]
    with pytest.raises(VSDError, match=r"of a text of \d+ tokens: .*too long.*--max-model-len"):
        ours.text(examples[1].inputs.ids, [len(examples[1].inputs.ids) - 1])


# ---- answers and their features


def chats() -> list[Conversation]:
    """Conversations of one and two turns."""
    asked = [[f"{word} {i}", "why"][: i % 2 + 1] for i, word in enumerate(tiny_run.WORDS)]
    return [
        Conversation(f"c{i}", f"f:{i + 1}", [{"role": "user", "content": text} for text in texts])
        for i, texts in enumerate(asked)
    ]


def answer(of: TinyVLLM, info: TargetInfo, out: Path, folder: Path) -> None:
    teacher = ServerTeacher(KeepingServer(of.url, "tiny", None, info, folder), info, 4)
    regenerate(teacher, chats(), out, max_new_tokens=12, progress=False)


def assert_complete(info: TargetInfo, target: Target, out: Path, folder: Path) -> None:
    """A file for every record, none doubled, and the right features in them."""
    found = load_examples(out, info.tokenizer, 512)
    assert len(found) == len(out.read_text().splitlines()) == 12
    assert len(list(folder.glob("*/*"))) == len({(tuple(e.inputs.ids[:-1]), tuple(e.drafted)) for e in found})
    assert_same(KeptFeatures(TextStore(folder, info), info, found, LAYERS), target, found)


def test_answers_come_with_their_features(
    start: Start, tiny_target: Target, info: TargetInfo, tmp_path: Path, shared: Path
) -> None:
    of, out, kept = start(), tmp_path / "out.jsonl", tmp_path / "kept"
    answer(of, info, out, kept)
    assert_complete(info, tiny_target, out, kept)
    assert not list(shared.iterdir())
    asked = len(of.asked)
    answer(of, info, out, kept)
    assert len(of.asked) == asked + 1  # the probe: no question is asked twice


def test_several_servers_keep_their_features_in_one_folder(
    start: Start, tiny_target: Target, info: TargetInfo, tmp_path: Path, shared: Path
) -> None:
    """One of them fails after the first answers; another with other layers is refused."""
    busy = lambda handler: handler.json(503, {})  # noqa: E731
    of, out, kept = [start(), start()], tmp_path / "out.jsonl", tmp_path / "kept"

    def answers(*urls: str) -> None:
        servers = Servers([KeepingServer(url, "tiny", None, info, kept) for url in urls])
        regenerate(ServerTeacher(servers, info, 4), chats(), out, max_new_tokens=12, progress=False)

    one = of[1].completion
    of[1].completion = lambda path, body: (setattr(of[1], "faults", [busy] * 3), one(path, body))[1]
    answers(of[0].url, of[1].url)
    assert_complete(info, tiny_target, out, kept)
    assert all(len(server.asked) > 1 for server in of) and not list(shared.iterdir())
    other = start(layers=(0, 1, 3))
    with pytest.raises(VSDError, match=rf"{other.url} gives layers \[0, 1, 3\]; .*another layers"):
        answers(of[0].url, other.url)


@pytest.mark.parametrize("moment", ["before the file is kept", "between file and record"])
def test_a_killed_client_loses_and_doubles_nothing(
    start: Start, tiny_target: Target, info: TargetInfo, tmp_path: Path, monkeypatch: Any, moment: str
) -> None:
    of, out, kept = start(), tmp_path / "out.jsonl", tmp_path / "kept"
    place = (TextStore, "add") if moment.startswith("before") else ("vsd.data.records.RecordLog", "append")
    where = place[0] if isinstance(place[0], type) else import_module("vsd.data.records").RecordLog
    real, calls = getattr(where, place[1]), []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(where, place[1], killed)
        with pytest.raises(KeyboardInterrupt):
            answer(of, info, out, kept)
    assert len(out.read_text().splitlines()) < 12
    answer(of, info, out, kept)
    assert_complete(info, tiny_target, out, kept)


def test_features_of_earlier_answers_are_added(
    start: Start, tiny_target: Target, info: TargetInfo, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """By the same command with --features; then `vsd train` reads them with `TargetInfo` alone."""
    of, out, kept = start(), tmp_path / "out.jsonl", tmp_path / "kept"
    regenerate(ServerTeacher(Server(of.url, "tiny"), info, 4), chats(), out, max_new_tokens=12, progress=False)
    store = TextStore(kept, info, LAYERS)
    found = load_examples(out, info.tokenizer, 512)
    with pytest.raises(VSDError, match=r"lacks the features of 12 of 12 texts"):
        KeptFeatures(store, info, found, LAYERS)
    store.fill(client(of, info).text, found, 4)
    assert_complete(info, tiny_target, out, kept)
    with pytest.raises(VSDError, match=r"are of another layers: give another folder"):
        TextStore(kept, info, (0, 1, 3))
    other = load_target_info(str(folder / "target"), device="cpu", dtype="float32")
    other.outer.head.weight = torch.nn.Parameter(-other.outer.head.weight)
    with pytest.raises(VSDError, match=r"are of another target"):
        TextStore(kept, other)


@pytest.mark.parametrize(("kind", "objective"), [("url", "eagle3"), ("folder", "eagle3"), ("url", "vsd")])
def test_the_commands(
    start: Start, folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, shared: Path, kind: str, objective: str
) -> None:
    """`vsd data regenerate` keeps features, `vsd train` reads them or asks for them; the target is never loaded."""
    monkeypatch.setattr("vsd.training.job.load_target", lambda *args, **more: pytest.fail("the target was loaded"))
    of, out, target = start(), tmp_path / "out.jsonl", ["--target", str(folder / "target"), "--dtype", "float32"]
    target += ["--device", "cpu"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{word} there"}) + "\n" for word in tiny_run.WORDS))
    words = ["data", "regenerate", str(prompts), "--out", str(out), "--max-length", "256", "--max-new-tokens", "12"]
    words += ["--server", of.url, "--model", "tiny", "--features", str(tmp_path / "kept")]
    assert cli.main([*words, *target]) == 0
    assert "features of 8 texts" in capsys.readouterr().out
    features = of.url if kind == "url" else str(tmp_path / "kept")
    words = ["train", "--data", str(out), "--held-out", "0", "--features", features, "--objective", objective]
    words += ["--output-dir", str(tmp_path / "run"), "--draft-vocab-size", "64", "--max-length", "256"]
    words += ["--set", "max_steps=3", "logging_steps=1", "report_to=none", "bf16=false"]
    words += ["objective_options={anchors: 2, length: 4}"] if objective == "vsd" else []
    before = len(of.asked)
    assert cli.main([*words, *target]) == 0
    assert (len(of.asked) > before) == (kind == "url")
    assert (tmp_path / "run" / "drafter" / "config.json").exists() and not list(shared.iterdir())
    assert not (tmp_path / "run" / "features").exists()


def test_two_processes_ask_one_server(start: Start, folder: Path, tmp_path: Path, shared: Path) -> None:
    """Features and continuations from a server: under `torchrun` the drafter of one process."""
    of, one, two = start(), tmp_path / "one", tmp_path / "two"
    words = ["train", "--target", folder / "target", "--data", folder / "text.jsonl", "--held-out", 0]
    words += ["--features", of.url, "--objective", "vsd", "--draft-vocab-size", 64, "--max-steps", 2]
    words += ["--device", "cpu", "--dtype", "float32"]
    words += ["--set", "warmup_steps=0", "report_to=none", "bf16=false", "adam_epsilon=1e-2"]
    words += ["objective_options={anchors: 2, length: 4}"]
    assert cli.main([*map(str, words), "per_device_train_batch_size=4", "--output-dir", str(one)]) == 0
    tiny_run.torchrun([*words, "per_device_train_batch_size=2", "--output-dir", two])
    wanted, found = (load_file(run / "drafter" / "model.safetensors") for run in (one, two))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not list(shared.iterdir())


def test_the_command_of_the_server(folder: Path, capsys: Any) -> None:
    words = ["--target", str(folder / "target"), "--dtype", "float32", "--device", "cpu"]
    assert cli.main(["data", "server", *words, "--folder", "/mnt/a b"]) == 0
    line = capsys.readouterr().out
    assert f"PYTHONPATH={server.CONNECTOR} vllm serve {folder / 'target'} --no-enable-prefix-caching" in line
    assert "[0, 2, 3, 4]" in line and '"/mnt/a b"' in line and line.count("\n") == 1
    assert cli.main(["data", "server", *words, "--family", "eagle3", "--drafter", "d"]) == 1
    assert "give --family or --drafter" in capsys.readouterr().err
    words += ["--out", "o", "--features", "f"]
    assert cli.main(["data", "regenerate", str(folder / "text.jsonl"), *words]) == 1
    assert "come from a server" in capsys.readouterr().err


def test_a_url_is_a_server_and_no_folder() -> None:
    assert TrainJob(features="http://h:1").server == "http://h:1" and TrainJob(features="https://h/v1").store is None
    assert TrainJob(features="./http").server is None and TrainJob(features="online").server is None


# ---- the connector alone


def request(transfer: Any, status: int = Status.FINISHED_STOPPED) -> Any:
    return SimpleNamespace(
        request_id="r",
        status=status,
        all_token_ids=[5, 6, 7, 8],
        num_prompt_tokens=2,
        num_computed_tokens=3,
        kv_transfer_params=transfer,
    )


def test_the_connector_writes_what_is_asked_for(connector: ModuleType, shared: Path) -> None:
    ours = connector.VSDConnector(settings(shared), "", "")
    asked = {"vsd": {"name": NAME}}
    nothing: list[Any] = [None, {}, {"vsd": {}}, {"vsd": {"name": "../" + NAME[3:]}}, {"vsd": {"name": f"{NAME}/a"}}]
    for transfer in nothing:
        assert ours.request_finished(request(transfer), [0]) == (False, None)
    for status in (Status.FINISHED_ABORTED, Status.FINISHED_IGNORED, Status.FINISHED_ERROR):
        assert ours.request_finished(request(asked, status), [0]) == (False, None)
    assert not ours.build_connector_meta(None).wanted
    keep, says = ours.request_finished(request(asked), [0])
    assert keep and says == {
        "vsd": {"path": str(shared / f"{NAME}.safetensors"), "layers": [0, 2, 3], "depth": 4, "from": 0}
    }
    ours.request_finished(request({"vsd": {"name": NAME, "final": [[1, 2], [5, 9]]}}), [0])
    ours.request_finished(request({"vsd": {"name": NAME, "from": 1}}), [0])
    whole, prompt, own = ours.build_connector_meta(None).wanted
    assert (own.ids, own.first, own.read, own.rows) == ([6, 7], 1, 3, [1, 2])
    assert (whole.ids, whole.rows, prompt.ids, prompt.rows) == ([5, 6, 7], [2], [5, 6], [1])
    assert not ours.build_connector_meta(None).wanted  # each is told once


def test_only_the_first_worker_writes_and_reports(connector: ModuleType, shared: Path) -> None:
    ours = connector.VSDConnector(settings(shared), "", "")
    ours._kv_cache = torch.randn(2, 4, SLOTS, H)
    ours.request_finished(request({"vsd": {"name": NAME}}), [1])
    ours._metadata = ours.build_connector_meta(None)
    ours._is_tp_rank_zero = False
    assert ours.get_finished({"r"}) == (None, None)
    ours._is_tp_rank_zero = True
    assert ours.get_finished({"r"}) == ({"r"}, None)
    ours._kv_cache.zero_()  # the blocks may be used again at once
    ours._executor.shutdown()
    (file,) = shared.iterdir()
    assert server.read(file).aux.all()


def test_the_connector_refuses_settings_with_wrong_states(connector: ModuleType, shared: Path) -> None:
    for wrong, message in (
        ({"caching": True}, "--no-enable-prefix-caching"),
        ({"depth": 5}, "end with 4"),
        ({"layers": (2, 0)}, "must ascend"),
    ):
        with pytest.raises(ValueError, match=message):
            connector.VSDConnector(settings(shared, **wrong), "", "")


def test_only_forgotten_files_of_its_own_are_deleted(connector: ModuleType, tmp_path: Path) -> None:
    old, new = [f"{NAME}.safetensors", f"{NAME[::-1]}.safetensors.part"], f"{'0' * 32}.safetensors"
    for name in (*old, new, "mine.safetensors"):
        (tmp_path / name).touch()
    for name in (*old, "mine.safetensors"):
        os.utime(tmp_path / name, (time.time() - 3700,) * 2)
    connector.delete_forgotten(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {new, "mine.safetensors"}


def test_ranges() -> None:
    assert server.ranges([]) == [] and server.ranges([3]) == [[3, 4]]
    assert server.ranges([1, 2, 3, 7, 9, 10]) == [[1, 4], [7, 8], [9, 11]]
