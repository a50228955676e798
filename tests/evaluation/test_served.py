"""A served drafter beside this engine, with a small server that answers and counts as vLLM or SGLang do."""

import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import overfit
import seeing
import tiny_run
from vsd import cli
from vsd.data import Server, prompt_inputs
from vsd.data import server as client
from vsd.data.messages import messages_of
from vsd.decoding import Engine, Result, Sampling
from vsd.decoding.statistics import acceptance_per_position
from vsd.errors import VSDError
from vsd.evaluation import Prompt, compare, connect, print_server, write_json
from vsd.evaluation.served import acceptance_difference, first_difference
from vsd.evaluation.serving import _Counters
from vsd.paths import TreeShape
from vsd.targets import Inputs, Target

DEPTH, LENGTH = 3, 10
PROMPTS = [Prompt(str(n), "mt", None, [f"why {n}"] if n else ["hi", "and then?"]) for n in range(8)]

Answer = Callable[[Inputs, int], Result]


class Fake(ThreadingHTTPServer):
    """Serves `answer`; `kind` is vllm, sglang or neither. `read` makes inputs of a chat."""

    daemon_threads = True
    read: Callable[[list[Any]], Inputs]

    def __init__(self, answer: Answer | None, kind: str = "vllm", **options: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.kind, self.options = answer, kind, options
        self.passes, self.requests, self.accepted = 5, 2, [4, 1, 1]  # of requests before ours
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def metrics(self) -> str:
        lines = ["# HELP vllm:request_success_total Finished.", "# TYPE vllm:request_success_total counter"]
        labels = 'engine="0",model_name="tiny"'
        lines += [f'vllm:request_success_total{{{labels},finished_reason="stop"}} {float(self.requests)}']
        lines += [f'vllm:request_success_created{{{labels},finished_reason="stop"}} 1.7e+09']
        if self.answer is not None:
            lines += [f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(self.passes)}"]
            name = "vllm:spec_decode_num_accepted_tokens"
            lines += [f"{name}_total{{{labels}}} {float(sum(self.accepted))}"]
            for k, count in enumerate(self.accepted):
                lines += [f'{name}_per_pos_total{{{labels},position="{k}"}} {float(count)}']
                lines += [f'{name}_per_pos_created{{{labels},position="{k}"}} 1.7e+09']
        return "\n".join(lines) + "\n"

    def count(self, result: Result) -> None:
        self.requests += self.options.get("finished", 1)
        self.passes += len(result.accepted)
        self.accepted = [old + sum(a > k for a in result.accepted) for k, old in enumerate(self.accepted)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fake

    def do_GET(self) -> None:
        server = self.server
        algorithm = "EAGLE3" if server.answer else None
        info = {"speculative_algorithm": algorithm, "speculative_num_steps": DEPTH, "speculative_eagle_topk": 1}
        if self.path == "/v1/models":
            self.send(200, json.dumps({"data": [{"id": "tiny"}]}))
        elif self.path == "/metrics" and server.kind == "vllm":
            self.send(200, server.metrics())
        elif self.path == "/get_server_info" and server.kind == "sglang":  # the name before /server_info
            self.send(200, json.dumps({**info, **server.options}))
        else:
            self.send(404, json.dumps({"detail": "Not Found"}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path in ("/v1/completions", "/v1/chat/completions") and server.kind == "vllm":
            assert body["temperature"] == 0 and body["model"] == "tiny"
            asked = server.read(body["messages"]) if "messages" in body else Inputs(body["prompt"])
            result = server.answer(asked, body["max_tokens"])
            server.count(result)
            choice = {"text": "", "message": {"content": ""}, "finish_reason": "length", "prompt_token_ids": asked.ids}
            ids = {"token_ids": result.tokens} if server.options.get("ids", True) else {}
            self.send(200, json.dumps({"choices": [{**choice, **ids}]}))
        elif self.path == "/generate" and server.kind == "sglang":
            assert body["sampling_params"]["temperature"] == 0
            result = server.answer(Inputs(body["input_ids"]), body["sampling_params"]["max_new_tokens"])
            histogram = np.bincount(result.accepted).tolist() if result.accepted else []
            info = {
                "spec_verify_ct": len(result.accepted),
                server.options.get("name", "spec_accept_histogram"): histogram,
            }
            self.send(200, json.dumps({"text": "", "output_ids": result.tokens, "meta_info": info}))
        else:
            self.send(404, json.dumps({"detail": "Not Found"}))

    def send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def drafter(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Any:
    text = tiny_run.tiny_examples(tiny_target, 48, 32)
    options: dict[str, Any] = {"learning_rate": 1e-2, "num_train_epochs": 6}
    trainer = tiny_run.tiny_trainer(tiny_target, text, tmp_path_factory.mktemp("served"), **options)
    trainer.train()
    return trainer.model.eval()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fake]]:
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "_FIRST_RETRY_SECONDS", 0.2)
    started: list[Fake] = []

    def start(answer: Answer | None, kind: str = "vllm", **options: Any) -> Fake:
        started.append(Fake(answer, kind, **options))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def chain(target: Target, drafter: Any) -> Answer:
    engine = Engine(target, drafter, TreeShape.chain(DEPTH))
    return lambda inputs, length: engine.generate([inputs], Sampling(length))[0]


def compared(target: Target, server: Fake, drafter: Any, prompts: Sequence[Prompt] = PROMPTS) -> dict[str, Any]:
    with closing(Server(server.url, "tiny")) as found:
        serving = connect(found)
        assert serving.depth == DEPTH
        return compare(target, serving, prompts, drafter, max_new_tokens=LENGTH, progress=False)


@pytest.mark.parametrize(
    ("kind", "options"), [("vllm", {}), ("sglang", {}), ("sglang", {"name": "spec_correct_drafts_histogram"})]
)
def test_the_same_chain_is_accepted_alike(
    fake: Any, tiny_target: Target, drafter: Any, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Its counts before ours do not matter; ours equal those of the results, one by one."""
    given: list[Result] = []
    own = chain(tiny_target, drafter)

    def answer(inputs: Inputs, length: int) -> Result:
        given.append(own(inputs, length))
        return given[-1]

    report = compared(tiny_target, fake(answer, kind, **options), drafter)
    server = report["server"]
    assert server["engine"] == {"vllm": "vLLM", "sglang": "SGLang"}[kind] and server["answers"] == len(given) == 9
    assert server["acceptance"]["passes"] == sum(len(result.accepted) for result in given)
    assert server["acceptance"]["per_position"] == pytest.approx(acceptance_per_position(given, DEPTH))
    accepted = [count for result in given for count in result.accepted]
    assert server["acceptance"]["length"] == pytest.approx(1 + sum(accepted) / len(accepted))
    for side in ("acceptance", "here"):
        del server[side]["tokens_per_second"]
    assert server["acceptance"] == server["here"]
    assert server["difference"] is None and server["equal"] == 1.0 and server["differences"] == []
    write_json(report, tmp_path / "out.json")


def test_a_drafter_that_is_served_otherwise_is_seen(fake: Any, tiny_target: Target, drafter: Any) -> None:
    """The second drafted token is never accepted on the server."""
    own = chain(tiny_target, drafter)

    def answer(inputs: Inputs, length: int) -> Result:
        result = own(inputs, length)
        result.accepted = [min(count, 1) for count in result.accepted]
        return result

    report = compared(tiny_target, fake(answer), drafter)
    found = report["server"]["difference"]
    assert found["position"] == 2 and found["ci"][0] <= found["difference"] <= found["ci"][1] < 0
    assert found["difference"] == pytest.approx(-report["server"]["here"]["per_position"][1])
    text = printed(report)
    assert "differs from drafted token 2 on" in text and "9 of 9 equal" in text


def test_answers_that_differ_are_named_with_their_margin(fake: Any, tiny_target: Target, drafter: Any) -> None:
    own = chain(tiny_target, drafter)

    def answer(inputs: Inputs, length: int) -> Result:
        result = own(inputs, length)
        if len(asked) == 3:
            result.tokens[4] = 99
        asked.append(inputs.ids)
        return result

    asked: list[list[int]] = []
    report = compared(tiny_target, fake(answer), None)
    (found,) = report["server"]["differences"]
    assert report["server"]["equal"] == pytest.approx(8 / 9) and report["server"]["here"] is None
    assert (found["prompt"], found["turn"], found["position"], found["there"]) == ("2", 0, 4, 99)
    tokens = Engine(tiny_target).generate([asked[3]], Sampling(LENGTH))[0].tokens
    logits = tiny_target.model(torch.tensor([asked[3] + tokens[:4]])).logits[0, -1]
    best = logits.topk(2)
    assert found["here"] == tokens[4] == int(best.indices[0])
    assert found["margin"] == pytest.approx(float(best.values[0] - best.values[1]), rel=1e-3, abs=1e-4)
    assert found["second"] == (int(best.indices[1]) == 99)
    assert "8 of 9 equal" in (text := printed(report)) and "99" in text


def test_an_answer_that_ends_early_differs_at_its_end(tiny_target: Target) -> None:
    end = next(iter(tiny_target.eos_ids))
    asked = Inputs([20, 21, 22])
    for here, there, first in [
        ([30, 31, end], [30, 31], None),
        ([30, 31], [30, 31, end], None),
        ([30, 31, end], [30, 31, 32], (2, end, 32)),
        ([30, 31, 32], [30, 31], (2, 32, None)),
        ([30, 31], [30, 31, 32], (2, None, 32)),
        ([30, 31], [], (0, 30, None)),
    ]:
        found = first_difference(tiny_target, asked, here, there)
        assert (found and found[:3]) == first


def printed(report: dict[str, Any]) -> str:
    buffer = io.StringIO()
    print_server(report, Console(file=buffer, width=140))
    return buffer.getvalue()


# ---- chance


def test_equal_engines_seldom_seem_different_and_others_do() -> None:
    """60 comparisons of 40 prompts and 3 positions: at most 11 false alarms (binomial at 0.07, 1e-3)."""
    rng = np.random.default_rng(0)
    alarms, found = 0, []

    def draw(shares: list[float]) -> tuple[Any, Any]:
        passes = rng.integers(20, 40, 40)
        return np.array([rng.binomial(passes, share) for share in shares]).astype(float), passes.astype(float)

    for _ in range(60):
        alarms += acceptance_difference(*draw([0.6, 0.4, 0.2]), *draw([0.6, 0.4, 0.2])) is not None
        found.append(acceptance_difference(*draw([0.6, 0.3, 0.1]), *draw([0.6, 0.4, 0.2])))
    assert alarms <= 11
    assert sum(one is not None and one["position"] == 2 for one in found) >= 45


def test_few_prompts_show_nothing() -> None:
    ones, none = np.ones((2, 7)), np.zeros((2, 7))
    assert acceptance_difference(ones, np.ones(7), none, np.ones(7)) is None
    ones, none = np.ones((2, 8)), np.zeros((2, 8))
    assert acceptance_difference(ones, np.ones(8), none, np.ones(8)) == {
        "position": 1,
        "difference": 1.0,
        "ci": (1.0, 1.0),
    }


# ---- mistakes


def test_counters_are_summed_over_processes() -> None:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    text = "\n".join(f'{name}{{engine="{e}",position="{k}"}} {10.0 * e + k}' for e in (1, 2) for k in (0, 10, 2))
    text += '\nvllm:spec_decode_num_drafts_total{engine="1"} 1e+02\nvllm:spec_decode_num_drafts_total{engine="2"} 5'
    assert _Counters.of(text) == _Counters(0, 105, {0: 30, 2: 34, 10: 50})


def chats() -> list[Prompt]:
    """Two turns that begin with pictures, a text, and noise in another size."""
    first, second, third = ({"type": "image", "image": seeing.picture(n, 8 + 8 * n, 8)} for n in range(3))
    told = [first, {"type": "text", "text": "and then"}, second]
    return [
        Prompt("0", "mt", None, [told, "and why"]),
        Prompt("1", "mt", None, ["only text"]),
        Prompt("2", "mt", None, [[third, {"type": "text", "text": "hi"}]]),
    ]


def test_chats_with_images_are_sent_with_them(fake: Any) -> None:
    target = seeing.target("llava")
    drafter, read = overfit.random_drafter(target), list[int]()

    def inputs(messages: list[Any]) -> Inputs:
        found = messages_of({"messages": messages}, exact=False, need_answer=False)
        asked = prompt_inputs(target.tokenizer, found, target.images)
        read.append(len(asked.extras["pixel_values"]))
        return asked

    serving = fake(chain(target, drafter))
    serving.read = inputs
    server = compared(target, serving, drafter, chats())["server"]
    assert read == [2, 2, 1] and server["answers"] == 4 and server["equal"] == 1.0
    assert server["acceptance"]["passes"] == server["here"]["passes"] > 0
    assert server["acceptance"]["per_position"] == server["here"]["per_position"]


@pytest.mark.parametrize(("kind", "reason"), [("vllm", "other tokens of a chat"), ("sglang", "with vLLM only")])
def test_chats_with_images_that_cannot_be_compared(fake: Any, kind: str, reason: str) -> None:
    target = seeing.target("llava")
    server = fake(lambda inputs, length: Result(inputs, [20, 21], "length", [1], [2]), kind)
    server.read = lambda messages: Inputs([5])
    with pytest.raises(VSDError, match=reason) as caught:
        compared(target, server, None, chats())
    assert "\n" not in str(caught.value) and server.url in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("vllm", {"answer": None}, "--speculative-config"),
        ("sglang", {"answer": None}, "--speculative-algorithm"),
        ("sglang", {"speculative_eagle_topk": 4}, "drafts trees"),
        ("other", {}, "counts no drafted tokens"),
        ("vllm", {"finished": 3}, "other requests meanwhile"),
        ("vllm", {"ids": False}, "no token ids"),
        ("sglang", {"name": "nothing"}, "by position"),
    ],
)
def test_what_cannot_be_compared(
    fake: Any, tiny_target: Target, kind: str, options: dict[str, Any], reason: str
) -> None:
    drafted = Result(Inputs([5]), [20, 21, 22], "length", [1], [2])
    server = fake(options.pop("answer", lambda inputs, length: drafted), kind, **options)
    with pytest.raises(VSDError, match=reason) as caught:
        compared(tiny_target, server, None)
    assert "\n" not in str(caught.value) and server.url in str(caught.value)


def test_the_command_compares_and_reports_in_one_line_what_it_cannot(
    fake: Any, tiny_target: Target, drafter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run.write_target(tiny_target, tmp_path / "target")
    drafter.save_pretrained(tmp_path / "drafter")
    (tmp_path / "p.jsonl").write_text('{"prompt": "why"}\n{"prompt": "who"}\n')
    server = fake(chain(tiny_target, drafter))

    def run(url: str, *more: object) -> int:
        words = ["bench", "--prompts", tmp_path / "p.jsonl", "--server", url, "--max-new-tokens", 8]
        words += ["--target", tmp_path / "target", "--dtype", "float32", *more]
        return cli.main([str(word) for word in words])

    named = ["--drafter", tmp_path / "drafter", "--model"]
    assert run(server.url, *named, "tiny", "--json", tmp_path / "out.json") == 0
    text = capsys.readouterr().out
    assert "2 of 2 equal" in text and "vsd, chain of 3" in text and "too few prompts" in text
    assert json.loads((tmp_path / "out.json").read_text())["server"]["equal"] == 1.0
    page = (tmp_path / "out.html").read_text()
    assert "2 of 2 answers (100 %) equal" in page and f"vsd bench --prompts {tmp_path / 'p.jsonl'}" in page
    server.shutdown()
    server.server_close()
    other = fake(None, "vllm")
    for words, reason in [
        ((server.url, *named, "tiny"), "run the same command again"),
        ((other.url, *named, "huge"), "does not serve 'huge': it has tiny"),
        ((other.url, *named, "tiny"), "--speculative-config"),
        ((other.url,), "go together"),
        ((other.url, *named, "tiny", "--temperature", 1), "at temperature 0"),
        (("localhost", *named, "tiny"), "no server's address"),
    ]:
        assert run(*words) == 1
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1, error
