"""Where things are, and how much of them these tests use."""

from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
DRAFTER = REPOSITORY / "drafters" / "smollm2-135m-eagle3"
TEXT = Path(str(files("vsd") / "assets" / "smollm2-135m-text.jsonl.gz"))
PROMPTS, LENGTH = 24, 64
SKIPPED = slice(14, 16)  # layers of the target that the draft model lacks
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
