"""A server, or several, that hold the target as teacher: many questions at once, records in the order of arrival.

The turns of a conversation are asked one after another, conversations concurrently. Questions that have a record are
not asked again, so a run that was killed continues with the others.

Exact tokens: where the server gives token ids (vLLM does), the record holds them, also those of the prompt. Elsewhere
the record holds the tokens into which the target's tokenizer splits the text, and the end-of-turn token if the answer
ended by itself. These are nearly always the tokens that were generated; a model can spell a word in other tokens than
its tokenizer.
"""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from vsd.data.generate import Answer, derive_seed
from vsd.data.lines import BadLineError
from vsd.data.pictures import as_request
from vsd.data.questions import Chat, Question
from vsd.data.records import GenerationSettings, RecordLog
from vsd.data.server import Reply, Server
from vsd.data.servers import Servers
from vsd.data.teacher import Answered, Batch, digest
from vsd.data.template import answer_text, render, tokenize
from vsd.errors import ConfigurationError, MismatchError
from vsd.targets.info import TargetInfo


class ServerTeacher:
    """Answers with a server's model.

    Args:
        server: the address and the name of the model, or several. They are closed when the answers end.
        info: of the target that the server holds.
        concurrency: the number of questions that are asked at once, of all servers together.

    Raises:
        ConfigurationError: `concurrency` is not positive.
    """

    def __init__(self, server: Server | Servers[Any], info: TargetInfo, concurrency: int = 32) -> None:
        if concurrency < 1:
            raise ConfigurationError(f"concurrency must be at least 1, not {concurrency}")
        self.server, self.info, self.concurrency = server, info, concurrency

    @property
    def settings(self) -> dict[str, Any]:
        """The target's name, its chat template and the server's model; the address may change."""
        return {
            "kind": "regenerate by a server",
            "target": self.info.name,
            "model": self.server.model,
            "chat_template": digest(self.info.tokenizer.chat_template),
        }

    def answers(
        self, chats: Iterable[Chat], log: RecordLog, settings: GenerationSettings
    ) -> Generator[Batch, None, None]:
        """All turns without a record in batches of one, in the order of arrival.

        Raises:
            ConfigurationError, TargetError: the server refuses all requests, or has failed too long.
            MismatchError: the server has another model, or `log` was begun with other prompts.
        """
        source, waiting, asked = iter(chats), deque[Chat](), dict[Future[Reply], tuple[Chat, Question]]()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            self.server.check()
            while True:
                while len(asked) < self.concurrency and (chat := waiting.popleft() if waiting else next(source, None)):
                    if (question := _next_question(chat, log)) is not None:
                        asked[pool.submit(self._ask, question, settings)] = chat, question
                if not asked:
                    return
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    chat, question = asked.pop(future)
                    yield Batch(len(log), [self._answered(chat, question, future)])
                    waiting.append(chat)
        finally:
            self.server.interrupt()
            pool.shutdown(cancel_futures=True)
            self.server.close()

    def _ask(self, question: Question, settings: GenerationSettings) -> Reply:
        longest = settings.max_new_tokens
        reply = self.server.ask(
            as_request(question.messages),
            question.inputs.ids,
            max_tokens=longest,
            temperature=settings.temperature,
            seed=derive_seed(settings.seed, question.id) % 2**31,
        )
        if reply.ids and len(reply.ids) > longest:
            raise MismatchError(
                f"the server's answer has {len(reply.ids)} tokens, and {longest} were allowed: is it an OpenAI server?"
            )
        return reply

    def _answered(self, chat: Chat, question: Question, reply: Future[Reply]) -> Answered:
        try:
            return Answered(chat, *exact_answer(self.info, question, reply.result()))
        except BadLineError as error:
            return Answered(chat, question, error)


def _next_question(chat: Chat, log: RecordLog) -> Question | None:
    """The first turn that has no record; None if there is none."""
    while not chat.done and (entry := log.find(chat.name, chat.prompt())) is not None:
        chat.answered(entry.answer)
    return chat.next_question()


def exact_answer(info: TargetInfo, question: Question, reply: Reply) -> tuple[Question, Answer]:
    """The question with the prompt that the server read, and the tokens of its answer.

    Raises:
        MismatchError: the server's token ids are not this target's.
    """
    images = info.images if question.inputs.extras else None
    prompt = reply.prompt_ids or question.inputs.ids
    if images is not None:  # a server may count an image as one token
        if _without(images.placeholder, prompt) != _without(images.placeholder, question.inputs.ids):
            raise MismatchError(
                f"the server's prompt tokens are not those of '{question.id}': has it another template?"
            )
        prompt = question.inputs.ids
    ids = reply.ids or _tokenized(info, question, reply.text)
    if max([*prompt, *ids], default=0) >= len(info.tokenizer):
        raise MismatchError(f"the server's token ids are not in the vocabulary of '{info.name}': give its own target")
    if reply.ids and reply.text.strip().rstrip("\ufffd") not in answer_text(info.tokenizer, ids):
        raise MismatchError(
            f"the server's token ids do not spell its answer with the tokenizer of '{info.name}': give its own target"
        )
    if question.messages and prompt != question.inputs.ids:
        asked = answer_text(info.tokenizer, tokenize(info.tokenizer, question.messages[-1]["content"]))
        if asked.strip() not in answer_text(info.tokenizer, prompt):
            raise MismatchError(f"the server's prompt tokens do not spell the question '{question.id}': mixed up?")
    if reply.finish == "stop" and info.eos_ids and (not ids or ids[-1] not in info.eos_ids):
        ids = [*ids, _end_token(info)]
    return question._replace(inputs=question.inputs._replace(ids=prompt)), Answer(ids, reply.finish)


def _without(token: int, ids: list[int]) -> list[int]:
    return [other for other in ids if other != token]


def _tokenized(info: TargetInfo, question: Question, text: str) -> list[int]:
    """The tokens of an answer's text behind its prompt."""
    if question.messages:
        prompt = question.inputs.ids
        whole = tokenize(info.tokenizer, render(info.tokenizer, question.messages, answer_next=True) + text)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
    return tokenize(info.tokenizer, text)


def _end_token(info: TargetInfo) -> int:
    """The token that ends a turn: the tokenizer's own end token, if it is one of the target's."""
    own = info.tokenizer.eos_token_id
    return own if own in info.eos_ids else info.eos_ids[0]
