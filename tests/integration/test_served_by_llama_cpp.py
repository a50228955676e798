"""An exported EAGLE-3 drafter accepts in llama.cpp exactly what it accepts here, prompt by prompt, in float32."""

import json
import os
import subprocess
from pathlib import Path

import gguf
import pytest
import torch

from setting import DRAFTER, HERE, REPOSITORY
from vsd.decoding import Engine, Sampling
from vsd.drafters import load_drafter
from vsd.drafters.load import read_drafter
from vsd.export import export_drafter
from vsd.paths import TreeShape
from vsd.targets import Target
from vsd.targets.load import gguf_file

K, LENGTH, PROMPTS = 3, 32, 3


@pytest.fixture(scope="module")
def target_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded target as vsd holds it: its GGUF file, dequantised and rounded to bfloat16, in float32."""
    reader, out = gguf.GGUFReader(gguf_file("smollm2-135m")), tmp_path_factory.mktemp("target") / "target.gguf"
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(out, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        items = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], items)
    for tensor in reader.tensors:
        exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        writer.add_tensor(tensor.name, exact.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def answers(target: Path, drafter: Path | None, prompts: list[list[int]], folder: Path) -> list[dict[str, object]]:
    """llama.cpp's answers, and its counts of drafted and accepted tokens."""
    python = Path(os.environ.get("VSD_LLAMA_CPP", REPOSITORY / ".venv-llama")) / "bin" / "python"
    job = {"target": str(target), "drafter": None if drafter is None else str(drafter), "k": K}
    (folder / "job.json").write_text(json.dumps({**job, "prompts": prompts, "max_new_tokens": LENGTH}))
    command = [str(python), str(HERE / "draft_in_llama_cpp.py"), str(folder / "job.json"), str(folder / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, object]] = json.loads((folder / "result.json").read_text())
    return found


def test_acceptance_is_ours(
    targets: dict[str, Target], target_file: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    target, asked = targets["float32"], prompts[:PROMPTS]
    folder = export_drafter(read_drafter(DRAFTER, target), target, tmp_path / "exported", "gguf")
    plain = answers(target_file, None, asked, tmp_path)
    found = answers(target_file, folder / "drafter.gguf", asked, tmp_path)
    assert [each["content"] for each in found] == [each["content"] for each in plain]
    engine = Engine(target, load_drafter(DRAFTER, target), TreeShape.chain(K))
    answered = [engine.generate([ids], Sampling(LENGTH))[0].delivered for ids in asked]
    ours = [sum(delivered) - len(delivered) for delivered in answered]  # llama.cpp drafts nothing behind the limit
    assert min(ours) > 0
    assert [each["accepted"] for each in found] == ours
