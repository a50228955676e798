"""Regeneration by a server that holds the target: the same records as in process, many questions at once.

A conversation's turns are asked one after another, conversations side by side; an answer is on disk before the next
turn is asked. A killed run continues with the questions that have no record; the order of the file is that of arrival.

Exact tokens: where the server gives token ids (vLLM does), the record holds them, the prompt's too. Elsewhere prompt
and answer are the target's tokenizer's reading of the text, with the end-of-turn token behind an answer that stopped;
that is nearly always what was generated, not always (a model may spell a word in other tokens than its tokenizer).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path

from vsd.data.chat import LOG, BadLineError, Conversation, OnBadLine, Report, handle_bad_line
from vsd.data.generate import Answer, derive_seed
from vsd.data.questions import Chat, Question, Sampling, Summary, open_chats, record_of, room_for_prompts
from vsd.data.records import Entry, Record, RecordLog, progress_bar
from vsd.data.regenerate import digest
from vsd.data.server import Reply, Server
from vsd.data.template import render, spell, tokenize
from vsd.errors import VSDError
from vsd.targets.info import TargetInfo


def regenerate_by_server(
    server: Server,
    info: TargetInfo,
    conversations: Iterable[Conversation],
    out: Path,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    concurrency: int = 32,
    max_length: int | None = None,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
    progress: bool = True,
) -> Summary:
    """Answer every user turn of `conversations` with the server's model; `out` is resumed when it exists.

    Args:
        info: of the target that the server serves.
        concurrency: how many questions are asked at once.
        max_length, on_bad_line, report: as in `regenerate`; what the server refuses is a bad line too.

    Raises:
        VSDError: a bad line, when fatal; `out` cannot be resumed; nothing to answer; the server serves another model,
            refuses us, or is gone for good.
    """
    if concurrency < 1:
        raise VSDError("concurrency must be at least 1")
    report = report or LOG.warning
    room = room_for_prompts(info, max_length, max_new_tokens)
    chats, skipped = open_chats(info, conversations, room, on_bad_line, report)
    settings = {
        "kind": "regenerate by a server",
        "target": info.name,
        "model": server.model,
        "chat_template": digest(info.tokenizer.chat_template),
        "prompts": digest([[c.id, c.history, c.turns, c.exact] for c in chats]),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "max_length": max_length,
    }
    sampling = Sampling(max_new_tokens, temperature, seed)
    total, made = sum(len(c.turns) for c in chats), 0
    with RecordLog(Path(out), settings) as log, progress_bar(enabled=progress) as bar:
        entries = dict(log.entries)
        task = bar.add_task("regenerate", total=total, completed=len(entries), tokens=0)
        following = partial(_unanswered, entries, info, room, report)
        with closing(_replies(server, chats, following, sampling, concurrency)) as replies:
            for chat, question, reply in replies:
                try:
                    record = _record(info, question, reply(), len(entries), sampling)
                except BadLineError as error:
                    handle_bad_line(f"{chat.where}: {error}", on_bad_line, report)
                    chat.end()
                    continue
                if record is None:
                    report(f"{chat.where}: the server's answer to '{question.id}' is empty")
                    chat.end()
                    continue
                log.append([record])
                entries[question.id] = Entry.of(record)
                made += len(record["response_ids"])
                bar.update(task, completed=len(entries), tokens=made)
    return Summary(len(entries), skipped + total - len(entries), sum(e.tokens for e in entries.values()))


def _replies(
    server: Server,
    chats: Iterable[Chat],
    following: Callable[[Chat], Question | None],
    sampling: Sampling,
    concurrency: int,
) -> Generator[tuple[Chat, Question, Callable[[], Reply]], None, None]:
    """Every question with its reply (a call, which may raise), as they arrive; a chat's next is asked afterwards."""
    waiting, asked = deque(chats), dict[Future[Reply], tuple[Chat, Question]]()
    pool = ThreadPoolExecutor(concurrency)
    try:
        server.check()
        while waiting or asked:
            while waiting and len(asked) < concurrency:
                chat = waiting.popleft()
                if (question := following(chat)) is not None:
                    asked[pool.submit(_ask, server, question, sampling)] = chat, question
            for future in wait(asked, return_when=FIRST_COMPLETED).done if asked else ():
                chat, question = asked.pop(future)
                yield chat, question, future.result
                waiting.appendleft(chat)
    finally:
        server.interrupt()
        pool.shutdown(cancel_futures=True)
        server.close()


def _unanswered(entries: dict[str, Entry], info: TargetInfo, room: int, report: Report, chat: Chat) -> Question | None:
    """The first question of a chat that has no record; the answers before it become its history."""
    while (question := chat.question_within(info, room, report)) is not None:
        if question.id not in entries:
            return question
        chat.answered(entries[question.id].answer)
    return None


def _ask(server: Server, question: Question, sampling: Sampling) -> Reply:
    return server.ask(
        question.messages,
        question.ids,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=derive_seed(sampling.seed, question.id) % 2**31,
    )


def _record(info: TargetInfo, question: Question, reply: Reply, number: int, sampling: Sampling) -> Record | None:
    """The line for one reply; None if there is nothing to draft in it."""
    prompt = reply.prompt_ids or question.ids
    ids = reply.ids or _tokens(info, question, reply)
    if max([*prompt, *ids], default=0) >= len(info.tokenizer):
        raise VSDError(f"the server's tokens are not '{info.name}''s: is --target the model it serves?")
    if reply.ids and reply.text.strip().rstrip("\ufffd") not in spell(info.tokenizer, ids):
        raise VSDError(f"the server's tokens do not spell its answer in '{info.name}': is --target what it serves?")
    if reply.finish == "stop" and info.eos_ids and (not ids or ids[-1] not in info.eos_ids):
        ids = [*ids, _end(info)]
    return record_of(info, question._replace(ids=prompt), Answer(ids, reply.finish), number, sampling)


def _tokens(info: TargetInfo, question: Question, reply: Reply) -> list[int]:
    """The text of an answer as the tokenizer reads it behind its prompt."""
    if question.messages:
        before = render(info.tokenizer, question.messages, answer_next=True)
        whole = tokenize(info.tokenizer, before + reply.text)
        if whole[: len(question.ids)] == question.ids:
            return whole[len(question.ids) :]
    return tokenize(info.tokenizer, reply.text)


def _end(info: TargetInfo) -> int:
    """The token that ends a turn: the tokenizer's own end, where it is one of the target's."""
    own = info.tokenizer.eos_token_id
    return own if own in info.eos_ids else info.eos_ids[0]
