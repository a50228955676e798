"""A vLLM server that gives features: a request returns an answer and leaves the text's states in a shared folder.

The server runs the connector in `in_vllm/`, whose docstring has the protocol; `command` is the line that starts it. Of
the target the client needs embedding, final norm and LM head alone. The server's last state is the one before the final
norm, which is ours to apply.

Every request names its own file. A file that does not appear, because the server was killed between answer and file, is
requested again; one of an earlier attempt of the request is passed over. Before the first of them, `check` compares the
log-probabilities that the target's head gives to the server's states with those that the server reports: another layer,
a missing norm or another model do not pass.

Legend: T tokens of a text, Q drafted tokens, n layers, h hidden.
"""

import json
import shlex
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vsd.data import Server
from vsd.data.lines import BadLineError
from vsd.data.questions import Question
from vsd.data.server import Reply
from vsd.data.server_teacher import exact_answer
from vsd.data.template import tokenize
from vsd.errors import ConfigurationError, MismatchError, TargetError
from vsd.targets.info import TargetInfo
from vsd.targets.inputs import Inputs

CONNECTOR = Path(__file__).parent / "in_vllm"
_PROBE = "The three largest rivers of Europe are the"
_PROBE_TOKENS = 8
_TOLERANCE = 0.25  # nats between the two log-probabilities of a token, on average
_SAMPLES = 8  # of so many tokens
_SURPRISE = 2.0  # nats, eight standard deviations of their mean
_WAIT = 60.0  # seconds until a file is requested again
_ATTEMPTS = 3
_LONGEST_PAUSE = 0.1  # seconds between two looks for a file
# p itself, whatever the model's generation_config.json says
_PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
_REMEDY = "start it with the command that `vsd data server` prints"


class States(NamedTuple):
    """The server's states of a text.

    Attributes:
        aux: inputs of the server's layers at all tokens but the last, which the server never reads, [T - 1, n h]; of a
            continuation, from the token before the new ones on.
        hidden: output of the last layer, before the final norm, at the positions before the drafted ones, [Q, h]; of a
            continuation, before the new ones.
    """

    aux: Tensor
    hidden: Tensor


def command(target: str, layers: Sequence[int], depth: int, folder: str) -> str:
    """The command that starts vLLM with `target`, of `depth` layers, to give the inputs of `layers` in a folder.

    Raises:
        ConfigurationError: the final hidden states are among them.
    """
    if depth in layers:
        raise ConfigurationError("a server gives no final hidden states of whole texts: train with --features online")
    extracted = [*sorted(layers), depth]
    draft = {"hf_config": {"eagle_aux_hidden_state_layer_ids": extracted}}
    speculative = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": draft}
    transfer = {
        "kv_connector": "VSDConnector",
        "kv_connector_module_path": "vsd_connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    }
    options = {"speculative-config": speculative, "kv-transfer-config": transfer}
    words = [f"--{name} {shlex.quote(json.dumps(value))}" for name, value in options.items()]
    start = f"PYTHONPATH={shlex.quote(str(CONNECTOR))} vllm serve {shlex.quote(target)}"
    return " ".join([start, "--no-enable-prefix-caching", *words])


class FeatureServer(Server):
    """A server that answers and gives features; threads may share it. Call `check` first.

    Args:
        model: the name under which the target is served; None: it is the only one.
        info: embedding, final norm and LM head of the server's target.
        temperature: at which it will be asked for samples; 0: for none.

    Attributes:
        layers: decoder layers, by input index, whose inputs the server gives; known after `check`.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        requests_per_second: float | None,
        info: TargetInfo,
        temperature: float = 0.0,
    ) -> None:
        super().__init__(url, model or "", requests_per_second)
        self.info, self.temperature, self.layers = info, temperature, tuple[int, ...]()

    def check(self) -> None:
        """Find out what the server gives, and whether its states and samples are those of the target.

        Raises:
            MismatchError: the server has other models, another target, other states, or less likely samples.
            ConfigurationError: it gives no features, or none that this machine sees.
        """
        if not self.model:
            served = self.models()
            if len(served) != 1:
                raise MismatchError(f"{self.url} serves {', '.join(served) or 'no model'}: start it with one model")
            self.model = served[0]
        super().check()
        prompt = tokenize(self.info.tokenizer, _PROBE)
        sampling = {"max_tokens": _PROBE_TOKENS, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
        reply, path = self.answer([], prompt, **sampling)
        states = taken(path)
        exact_answer(self.info, Question("probe", [], Inputs(prompt)), reply)
        ours, theirs = self._log_probs(states.hidden, reply.ids or []), torch.tensor((reply.log_probs or [])[1:])
        if ours.shape != theirs.shape:
            raise ConfigurationError(f"{self.url} reports no log-probabilities of its tokens: {_REMEDY}")
        if not (away := float((ours - theirs).abs().mean())) < _TOLERANCE:
            raise MismatchError(
                f"the states of {self.url} are not those of '{self.info.name}': log-probabilities from them are "
                f"{away:.2f} nats away from the server's own; serve this target, and {_REMEDY}"
            )
        if self.temperature > 0:
            self._check_samples(prompt)

    def _check_samples(self, prompt: list[int]) -> None:
        """Refuse samples that are less likely than the target's own, whose mean of -log p - entropy is 0.

        vLLM's CPU build (0.32.0) does not pass this: it verifies drafted tokens, those of `extract_hidden_states`
        included, at a temperature that it has not set.
        """
        away = []
        for seed in range(_SAMPLES):
            tokens, path = self.continued(prompt, _PROBE_TOKENS, self.temperature, seed)
            law = (self._logits(taken(path).hidden) / self.temperature).log_softmax(-1)  # [tokens, V]
            surprise = -law.gather(1, torch.tensor(tokens, device=law.device)[:, None])[:, 0]
            away.append(surprise + (law.exp() * law).sum(-1))
        if not (mean := float(torch.cat(away).mean())) < _SURPRISE:
            raise MismatchError(
                f"{self.url} does not sample from the target: at temperature {self.temperature:g} its tokens are "
                f"{mean:.0f} nats less likely than the target's own (vLLM's CPU build samples wrongly while it gives "
                "features): let a GPU serve it, or ask for nothing that is sampled"
            )

    def answer(self, messages: list[dict[str, str]], ids: list[int], **sampling: Any) -> tuple[Reply, Path]:
        """As `ask`, with the file of the states of prompt and answer, which now is the caller's.

        Raises:
            ConfigurationError, MismatchError: as `check`; TargetError: the file does not appear.
        """

        def ask(name: str) -> tuple[Reply, list[int], int]:
            transfer = {"vsd": {"name": name}}
            reply = super(FeatureServer, self).ask(messages, ids, **sampling, kv_transfer_params=transfer)
            if reply.ids is None:
                raise ConfigurationError(f"{self.url} gives no token ids, so it gives no features: {_REMEDY}")
            return reply, [*(reply.prompt_ids or ids), *reply.ids][:-1], len(reply.ids) - 1

        return self._file_of(ask)

    def text(self, ids: list[int], drafted: list[int]) -> Path:
        """The file of the states of a given text with drafted positions, ascending; it now is the caller's.

        Raises:
            as `answer`; ConfigurationError: the server refuses the text.
        """
        asked = {"final": ranges([position - 1 for position in drafted])}

        def ask(name: str) -> tuple[Reply, list[int], int]:
            transfer = {"vsd": {"name": name, **asked}}
            sampling: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "kv_transfer_params": transfer}
            return super(FeatureServer, self).ask([], ids[:-1], **sampling), ids[:-1], len(drafted)

        try:
            return self._file_of(ask)[1]
        except BadLineError as error:
            raise self._refused(len(ids), error) from None

    def continued(self, ids: list[int], count: int, temperature: float, seed: int) -> tuple[list[int], Path]:
        """`count` tokens behind a text, sampled from the target as it is; and the file of states, now the caller's.

        The file holds the states of the text's last token and of the new tokens but the last: `count` each of `aux` and
        `hidden`, which predicts the new ones.

        Raises:
            as `text`.
        """
        first = len(ids) - 1
        sampling: dict[str, Any] = {"max_tokens": count, "temperature": temperature, "seed": seed, **_PLAIN}

        def ask(name: str) -> tuple[Reply, list[int], int]:
            transfer = {"vsd": {"name": name, "from": first}}
            reply = super(FeatureServer, self).ask([], ids, **sampling, kv_transfer_params=transfer)
            if (reply.transfer or {}).get("vsd", {"from": first}).get("from") != first:
                raise ConfigurationError(f"{self.url} has an older connector: {_REMEDY}")
            if reply.ids is None or len(reply.ids) != count:
                raise ConfigurationError(f"{self.url} did not continue a text by {count} tokens: {_REMEDY}")
            return reply, [*ids, *reply.ids][first:-1], count

        try:
            reply, path = self._file_of(ask)
        except BadLineError as error:
            raise self._refused(len(ids) + count, error) from None
        return reply.ids or [], path

    def _refused(self, tokens: int, error: BadLineError) -> ConfigurationError:
        return ConfigurationError(
            f"{self.url} gives no features of a text of {tokens} tokens: {error} (see vllm serve --max-model-len)"
        )

    def _file_of(self, ask: Callable[[str], tuple[Reply, list[int], int]]) -> tuple[Reply, Path]:
        """The reply to a request, and its file when it is whole; both are requested again if the file does not appear.

        Args:
            ask: sends the request with a name for the file; returns the reply, the tokens whose states the file must
                hold, and the rows of `hidden`.
        """
        for _ in range(_ATTEMPTS):
            reply, ids, rows = ask(uuid.uuid4().hex)
            path = self._promised(reply)
            if self._appears(path, ids, rows):
                return reply, path
        raise TargetError(
            f"{self.url} answers, but its features do not appear in '{path.parent}': server and client must share this "
            "folder (vsd data server --folder), and it must not be full"
        )

    def _promised(self, reply: Reply) -> Path:
        """The path of a reply's file.

        Raises:
            ConfigurationError: no features are promised, or the folder is not here; MismatchError: another target.
        """
        promise = (reply.transfer or {}).get("vsd")
        if promise is None:
            raise ConfigurationError(f"{self.url} answers without features: {_REMEDY}")
        path, depth = Path(promise["path"]), self.info.config.num_hidden_layers
        if promise["depth"] != depth:
            raise MismatchError(
                f"{self.url} has a model of {promise['depth']} layers, '{self.info.name}' has {depth}: serve this one"
            )
        if not path.parent.is_dir():
            raise ConfigurationError(
                f"{self.url} writes features to '{path.parent}', and this machine has no such folder: start it with a "
                "folder that both share (vsd data server --folder)"
            )
        self.layers = tuple(promise["layers"])
        return path

    def _appears(self, path: Path, ids: list[int], rows: int) -> bool:
        """Wait for a file with the states of `ids`; False if none comes. Another text's file is deleted.

        Raises:
            MismatchError: it does not hold all states.
        """
        end, pause = time.monotonic() + _WAIT, 0.001
        while not self._closed.is_set():
            if path.exists():
                if self._holds(path, ids, rows):
                    return True
                path.unlink()
            if time.monotonic() > end:
                return False
            self._closed.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise TargetError("interrupted")

    def _holds(self, path: Path, ids: list[int], rows: int) -> bool:
        try:
            with safe_open(path, "pt") as file:
                tokens = file.get_tensor("ids").tolist()
                shapes = [list(file.get_slice(name).get_shape()) for name in ("aux", "hidden")]
        except (SafetensorError, OSError, ValueError) as error:
            raise MismatchError(f"'{path}' is not whole: {error}; {_REMEDY}") from error
        h = self.info.hidden_size
        if tokens == ids and shapes != [[len(ids), len(self.layers) * h], [rows, h]]:
            path.unlink()
            raise MismatchError(
                f"{self.url} gives states {shapes} of {len(ids)} tokens, {rows} of them drafted, and "
                f"'{self.info.name}' is {h} wide: serve this target, without prefix caching; {_REMEDY}"
            )
        return bool(tokens == ids)

    def _log_probs(self, hidden: Tensor, ids: list[int]) -> Tensor:
        """What the target's head gives to the tokens of an answer but the first, [Q]."""
        law = self._logits(hidden).log_softmax(-1)
        tokens = torch.tensor(ids[1:], dtype=torch.long, device=law.device)
        return law.gather(1, tokens[:, None])[:, 0].cpu()

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        """The target's logits [Q, V] of the server's last states [Q, h]."""
        return self.info.logits(self.info.norm(hidden.to(self.info.device, self.info.dtype)))


def ranges(positions: Sequence[int]) -> list[list[int]]:
    """Ascending positions as [first, end) ranges."""
    found: list[list[int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1][1] += 1
        else:
            found.append([position, position + 1])
    return found


def read(path: Path) -> States:
    """The states in a file."""
    with safe_open(path, "pt") as file:
        return States(file.get_tensor("aux"), file.get_tensor("hidden"))


def taken(path: Path) -> States:
    """The states in a file, which is deleted."""
    states = read(path)
    path.unlink()
    return states
