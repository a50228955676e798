"""The target in this process as teacher: numbered batches that a resumed run repeats.

Batches are a function of the prompts and the settings alone, and an answer is a function of its batch. So a run that
was killed continues at the batch it was in, and ends with the file of an uninterrupted run. Conversations are read a
window at a time, whose batches are sorted by length.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from vsd.data.generate import Answer, batch_seed, generate_batch, plan_batches
from vsd.data.pictures import as_json
from vsd.data.questions import Chat, Question
from vsd.data.records import GenerationSettings, RecordLog
from vsd.data.teacher import Answered, Batch, digest
from vsd.errors import ConfigurationError
from vsd.targets.target import Target

_WINDOW = 16  # the conversations of so many batches are sorted by length together


class TargetTeacher:
    """Answers with a loaded target, `batch_size` questions at a time.

    Raises:
        ConfigurationError: `batch_size` is not positive.
    """

    def __init__(self, target: Target, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ConfigurationError(f"the batch size must be at least 1, not {batch_size}")
        self.target, self.batch_size = target, batch_size
        self.info = target

    @property
    def settings(self) -> dict[str, Any]:
        """The target's weights and chat template, and the batch size."""
        return {
            "kind": "regenerate",
            "target": self.target.fingerprint(),
            "chat_template": digest(self.target.tokenizer.chat_template),
            "batch_size": self.batch_size,
        }

    def answers(
        self, chats: Iterable[Chat], log: RecordLog, settings: GenerationSettings
    ) -> Generator[Batch, None, None]:
        """All turns in numbered batches."""
        batches = chain.from_iterable(map(self._batches, self._windows(chats, log)))
        for number, asked in enumerate(batches):
            answers = self.answer(number, [question for _, question in asked], log, settings)
            yield Batch(number, [Answered(*turn, answer) for turn, answer in zip(asked, answers, strict=True)])

    def answer(
        self, number: int, questions: Sequence[Question], log: RecordLog, settings: GenerationSettings
    ) -> Sequence[Answer | None]:
        """The answers of one batch; None for all of them if the file holds the batch."""
        if log.holds(number, questions):
            return [None] * len(questions)
        prompts = [question.inputs for question in questions]
        return generate_batch(
            self.target,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=batch_seed(settings.seed, prompts),
        )

    def _windows(self, chats: Iterable[Chat], log: RecordLog) -> Iterator[list[Chat]]:
        """Conversations that are sorted by length together; the file notes them before they are asked."""
        source, size = iter(chats), self.batch_size * _WINDOW
        count, read = 0, ""
        while window := list(islice(source, size)):
            count += len(window)
            read = digest([read, as_json([[chat.id, chat.history, chat.turns, chat.exact] for chat in window])])
            log.expect(count, read, last=len(window) < size)
            yield window

    def _batches(self, open_chats: list[Chat]) -> Iterator[list[tuple[Chat, Question]]]:
        """All turns in batches of similar length; those of a batch are answered before the next is taken."""
        while open_chats:
            asked = [(chat, chat.next_question()) for chat in open_chats]
            fits = [(chat, question) for chat, question in asked if question is not None]
            for rows in plan_batches([question.inputs for _, question in fits], self.batch_size):
                yield [fits[i] for i in rows]
            open_chats = [chat for chat, _ in fits]
