"""Chat text in, tokens and drafted positions out; text made by the target itself."""

from vsd.data.chat import Conversation, read_conversations
from vsd.data.generate import Answer, generate_answers, generate_batch
from vsd.data.questions import Summary
from vsd.data.regenerate import regenerate
from vsd.data.remote import regenerate_by_server
from vsd.data.server import Server
from vsd.data.synthesize import synthesize
from vsd.data.template import Example, encode, load_examples, prompt_ids

__all__ = [
    "Answer",
    "Conversation",
    "Example",
    "Server",
    "Summary",
    "encode",
    "generate_answers",
    "generate_batch",
    "load_examples",
    "prompt_ids",
    "read_conversations",
    "regenerate",
    "regenerate_by_server",
    "synthesize",
]
