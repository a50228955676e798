"""A KV connector of vLLM that writes the features of a text for training. It runs in the server, without vsd.

`vsd data server` prints the command that starts vLLM with it. vLLM's `extract_hidden_states` keeps the inputs of chosen
layers, and the output of the last one before the final norm, in a cache of their own. For each request that asks for
features, this connector copies what training needs into a safetensors file in a folder that server and client share:

    ids    [N]        the tokens whose states follow
    aux    [N, n h]   inputs of the n layers that drafters read
    hidden [Q, h]     output of the last layer, only at the positions that predict drafted tokens

A request asks with `kv_transfer_params: {"vsd": {"name": 32 hex digits, …}}`. The text is prompt and answer, all tokens
but the last, which the model never reads, and `hidden` predicts the tokens of the answer but the first. With
`"final": ranges`, a list of [first, end) positions of `hidden`, the text is the prompt. With `"from": position`, the
text begins there, and `hidden` has all its positions: an answer's own states, without those of its prompt. The response
says `kv_transfer_params: {"vsd": {"path", "layers", "depth", "from"}}`, where `depth` counts the model's layers. It may
arrive before the file. A file has its name when it is whole: a killed server leaves at most a `.part`. Files not
fetched within an hour are deleted.

It inherits from vLLM's own example what finds the cache, and was written for vLLM 0.32.

Legend: N tokens, Q drafted tokens, n layers, h hidden.
"""

import os
import re
import time
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

LOG = init_logger("vllm.vsd_connector")
_NAME = re.compile(r"[0-9a-f]{32}")
_FAILED = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_IGNORED, RequestStatus.FINISHED_ERROR)
_FORGOTTEN = 3600.0  # seconds after which a file is deleted
_SWEEP = 60.0  # seconds between two looks for such files


@dataclass
class Wanted:
    """Features of a finished request.

    Attributes:
        ids: the tokens, from position `first` on.
        read: how many tokens the model has read, those before `first` included.
        blocks: of the cache.
        rows: positions of `hidden`.
    """

    request: str
    path: str
    ids: list[int]
    first: int
    read: int
    blocks: list[int]
    rows: list[int]


@dataclass
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the workers in one step."""

    wanted: list[Wanted] = field(default_factory=list)


class VSDConnector(ExampleHiddenStatesConnector):  # type: ignore[misc]
    """Writes features of requests that ask for them.

    Raises:
        ValueError: settings with which states would be wrong or missing.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extracted = vllm_config.speculative_config.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids
        self.depth = vllm_config.model_config.get_total_num_hidden_layers()
        if list(extracted) != sorted(set(extracted)) or extracted[-1] != self.depth:
            raise ValueError(f"eagle_aux_hidden_state_layer_ids must ascend and end with {self.depth}: {extracted}")
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("states of cached prefixes are not written again: add --no-enable-prefix-caching")
        self.layers = list(extracted[:-1])
        self.folder = Path(self._storage_path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.swept = 0.0
        self.finished: list[Wanted] = []

    # ---- in the scheduler

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        """The requests that have finished since the last step."""
        step, self.finished = Step(wanted=self.finished), []
        return step

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether vLLM shall keep the blocks until `get_finished` names the request, and what the response says."""
        asked = (request.kv_transfer_params or {}).get("vsd") or {}
        if request.status in _FAILED or not _NAME.fullmatch(str(asked.get("name"))):
            return False, None
        path = str(self.folder / f"{asked['name']}.safetensors")
        ids, prompt, ranges = list(request.all_token_ids), request.num_prompt_tokens, asked.get("final")
        ids, first = ids[:prompt] if ranges else ids[:-1], asked.get("from", 0)
        ranges = ranges or [[asked.get("from", prompt), len(ids)]]
        rows = [row for start, end in ranges for row in range(start, min(end, len(ids)))]
        read = min(len(ids), request.num_computed_tokens)
        self.finished.append(Wanted(request.request_id, path, ids[first:], first, read, list(block_ids), rows))
        return True, {"vsd": {"path": path, "layers": self.layers, "depth": self.depth, "from": first}}

    # ---- in the workers

    def wait_for_save(self) -> None:
        """Nothing is saved during a pass."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Copy the states of finished requests out of the cache; their blocks may be used again at once.

        The copy is queued behind the pass that wrote them and before the one that overwrites them.
        """
        wanted = self._get_connector_metadata().wanted if self.has_connector_metadata() else []
        if not self._is_tp_rank_zero or not wanted:
            return None, None
        for one in wanted:
            aux, hidden = states(self._kv_cache, one.blocks, one.first, one.read, one.rows)
            ready = None if aux.device.type == "cpu" else torch.cuda.current_stream().record_event()
            self._executor.submit(write, one, aux, hidden, ready).add_done_callback(_report)
        if time.monotonic() - self.swept > _SWEEP:
            self.swept = time.monotonic()
            self._executor.submit(delete_forgotten, self.folder).add_done_callback(_report)
        return {one.request for one in wanted}, None


def states(
    cache: torch.Tensor, blocks: list[int], first: int, end: int, rows: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of aux [end - first, n h] of tokens [first, end), and of hidden [Q, h]; rows behind them are left out.

    Args:
        cache: [blocks, n + 1, slots, h].
    """
    found = cache[torch.tensor(blocks, device=cache.device)].transpose(1, 2).flatten(0, 1)[:end]  # [end, n + 1, h]
    kept = torch.tensor([row for row in rows if row < len(found)], dtype=torch.long, device=cache.device)
    return found[first:, :-1].flatten(1).contiguous(), found[kept, -1]


def write(one: Wanted, aux: torch.Tensor, hidden: torch.Tensor, ready: torch.cuda.Event | None) -> None:
    """Write a file under a name of its own, then give it its name. Copies to the host do not hold up the model."""
    with nullcontext() if ready is None else _behind(ready, aux.device):
        tensors = {"ids": torch.tensor(one.ids), "aux": aux.cpu(), "hidden": hidden.cpu()}
    half = f"{one.path}.part"
    save_file(tensors, half)
    os.replace(half, one.path)


def _behind(ready: torch.cuda.Event, device: torch.device) -> torch.cuda.StreamContext:
    """A stream of its own that waits for `ready`."""
    stream = torch.cuda.Stream(device)
    stream.wait_event(ready)
    return torch.cuda.stream(stream)


def delete_forgotten(folder: Path) -> None:
    """Delete files of this connector that are older than an hour."""
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name.partition(".")[0]):
            with suppress(FileNotFoundError):  # its client was faster
                if time.time() - path.stat().st_mtime > _FORGOTTEN:
                    path.unlink()


def _report(done: "Future[None]") -> None:
    if error := done.exception():
        LOG.error("features could not be written: %s", error)
