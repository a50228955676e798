"""Chat text in, tokens and drafted positions out; text made by the target itself."""

from vsd.data.chat import Conversation, read_conversations
from vsd.data.generate import Answer, generate_answers, generate_batch
from vsd.data.regenerate import Summary, regenerate
from vsd.data.synthesize import synthesize
from vsd.data.template import Example, encode, load_examples, prompt_ids

__all__ = [
    "Answer",
    "Conversation",
    "Example",
    "Summary",
    "encode",
    "generate_answers",
    "generate_batch",
    "load_examples",
    "prompt_ids",
    "read_conversations",
    "regenerate",
    "synthesize",
]
