"""Several servers of one model, used as one: a request goes to the server with the fewest in flight.

A server that fails gets no request until its pause is over (`Patience`: it grows), then one at a time; the request goes
to another server after a pause of its own. A server that has failed for ten minutes while others answer is reported and
left out. A request that has failed for ten minutes, wherever it was sent, raises, as with one server.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vsd.data.lines import LOG
from vsd.data.server import Pace, Patience, Reply, Server, ServerDownError
from vsd.errors import MismatchError, TargetError

S = TypeVar("S", bound=Server)
T = TypeVar("T")


@dataclass
class _Member(Generic[S]):
    """A server, its requests in flight, and how long it has failed; `patience` is None while it answers."""

    server: S
    flying: int = 0
    patience: Patience | None = None
    next_try: float = 0.0


class Servers(Generic[S]):
    """Servers with the same model; threads may share them. Call `check` first.

    Args:
        requests_per_second: the most requests in a second to all of them together; None: no limit.
    """

    def __init__(self, servers: Sequence[S], requests_per_second: float | None = None) -> None:
        self.servers, self.model = list(servers), servers[0].model
        self._members, self._lock = [_Member(server) for server in servers], threading.Lock()
        self._pace, self._closed = Pace(requests_per_second), threading.Event()

    def check(self) -> None:
        """Find out whether every server answers and has the model.

        Raises:
            MismatchError: a server does not have it.
            ConfigurationError, TargetError: of `Server.check`.
        """
        served = {server.url: server.models() for server in self.servers}
        if not all(self.model in names for names in served.values()):
            found = "; ".join(f"{url} has {', '.join(names) or 'no model'}" for url, names in served.items())
            raise MismatchError(f"all servers must serve '{self.model}': {found}")
        for server in self.servers:
            server.check()
            server.retries = False  # from now on, another server is tried

    def ask(self, messages: list[dict[str, str]], ids: list[int], **sampling: Any) -> Reply:
        """See `Server.ask`."""
        return self.use(lambda server: server.ask(messages, ids, **sampling))

    def use(self, request: Callable[[S], T]) -> T:
        """What a request to one of the servers returns.

        Raises:
            TargetError: it has failed for ten minutes; errors of `request`.
        """
        patience: Patience | None = None
        while True:
            self._pace.wait(self._closed)
            if self._closed.is_set():
                raise TargetError("interrupted")
            member, wait = self._take()
            try:
                self._closed.wait(wait)
                found = request(member.server)
            except ServerDownError as error:
                self._failed(member, error)
                patience = patience or Patience()
                if (pause := patience.pause()) is None:
                    raise
                self._closed.wait(pause)
            else:
                member.patience = None
                return found
            finally:
                with self._lock:
                    member.flying -= 1

    def interrupt(self) -> None:
        """See `Server.interrupt`."""
        self._closed.set()
        for server in self.servers:
            server.interrupt()

    def close(self) -> None:
        """See `Server.close`."""
        for server in self.servers:
            server.close()

    def _take(self) -> tuple[_Member[S], float]:
        """The server with the fewest requests among those that answer or may be tried again, and 0.

        If there are none, the server whose pause ends first, and the rest of the pause in seconds.
        """
        with self._lock:
            now = time.monotonic()
            ready = [one for one in self._members if one.patience is None or (one.next_try < now and not one.flying)]
            found = (
                min(ready, key=lambda one: one.flying) if ready else min(self._members, key=lambda one: one.next_try)
            )
            found.flying += 1
            return found, 0.0 if ready else max(0.0, found.next_try - now)

    def _failed(self, member: _Member[S], error: ServerDownError) -> None:
        """Give a server a pause, unless it has one; leave it out if it fails for too long while another answers."""
        with self._lock:
            if member.next_try > time.monotonic():
                return
            member.patience = member.patience or Patience()
            pause = member.patience.pause(error.retry_after)
            if pause is not None:
                member.next_try = time.monotonic() + pause
            elif member in self._members and any(one.patience is None for one in self._members):
                self._members.remove(member)
                LOG.warning("%s has failed for too long and is left out: %s", member.server.url, error.failure)
