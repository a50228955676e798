"""Conversations as token ids and drafted positions; training text written by the target."""

from vsd.data.chat import Conversation, read_conversations
from vsd.data.check import TextCount, count_text, marked_text
from vsd.data.examples import encode, encoded, load_examples
from vsd.data.generate import Answer, generate_answers, generate_batch
from vsd.data.records import Summary
from vsd.data.regenerate import regenerate
from vsd.data.sequences import Example, Examples, drafted_mask
from vsd.data.server import Server
from vsd.data.server_teacher import ServerTeacher
from vsd.data.servers import Servers
from vsd.data.sources import count_rows
from vsd.data.synthesize import synthesize
from vsd.data.target_teacher import TargetTeacher
from vsd.data.teacher import Teacher
from vsd.data.template import prompt_inputs
from vsd.data.tokenized import training_text

__all__ = [
    "Answer",
    "Conversation",
    "Example",
    "Examples",
    "Server",
    "ServerTeacher",
    "Servers",
    "Summary",
    "TargetTeacher",
    "Teacher",
    "TextCount",
    "count_rows",
    "count_text",
    "drafted_mask",
    "encode",
    "encoded",
    "generate_answers",
    "generate_batch",
    "load_examples",
    "marked_text",
    "prompt_inputs",
    "read_conversations",
    "regenerate",
    "synthesize",
    "training_text",
]
