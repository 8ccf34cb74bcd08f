"""Processes that each serve the model on a card of their own: how they are begun, watched, begun again and ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import enum
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.server.operation import EndedEarly
from pascalvl.runtime.server.upstream import Upstream, UpstreamLost

log = logging.getLogger(__name__)

VARIABLE = "PASCALVL_REPLICA"
_VISIBLE_CARDS = "CUDA_VISIBLE_DEVICES"
_COMMAND = "import sys; from pascalvl.runtime.cli import main; sys.exit(main())"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
"""Seconds before one is begun again, twice as long each time."""
_LONG_LIFE = 60.0
"""Seconds, after which what ended one is taken for something new."""
_CHECK_SECONDS, _MOST_SILENT_CHECKS = 1.0, 30
_END_SECONDS = 60.0
"""In which one may keep its cache, when it has nothing more to answer."""
_PR_SET_PDEATHSIG = 1
_MOST_PATH_BYTES = 107
"""Of a Unix socket's address, see unix(7)."""


def visible_cards() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that there are for this process; none without a driver."""
    from pascalvl.engines.device.gpu import count_gpus

    count = count_gpus()
    named = os.environ.get(_VISIBLE_CARDS)
    return [name.strip() for name in named.split(",")][:count] if named else [str(card) for card in range(count)]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What a replica is told beside the command's own arguments, by a variable of its environment."""

    number: int
    socket: str
    """Path that it listens at."""
    parent: int
    """Process without which it ends."""
    is_first: bool
    """Whether it tells what others would tell again, and asks the hub if that is to be asked."""

    @classmethod
    def taken(cls) -> Assignment | None:
        """This process's, which then is tied to its parent; None: it is no replica."""
        given = os.environ.pop(VARIABLE, None)
        if given is None:
            return None
        assignment = cls(**json.loads(given))
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != assignment.parent:  # which ended before that
            os._exit(0)
        return assignment


class State(enum.Enum):
    """How a replica is."""

    STARTING = "starting"
    READY = "ok"
    FAILED = "failed"


class Replica:
    """One process, and the next one when it ends.

    Args:
        number: among the others.
        arguments: of the command ``pascalvl``.
        socket: path that it listens at.
        environment: variables that it has besides this process's.
        cores: of this machine, that it runs on; none: all.
    """

    def __init__(
        self, number: int, arguments: Sequence[str], socket: str, environment: dict[str, str], cores: Sequence[int] = ()
    ) -> None:
        self.number, self.socket = number, socket
        self.state = State.STARTING
        self.requests = 0
        """At work there."""
        self.restarts = 0
        self.model_name = ""
        self.exit_code: int | None = None
        """Of the process that ended last; None: there is one at work, or none could be begun."""
        self.changed = asyncio.Event()
        """Is set when it begins to answer, or ends."""
        self._arguments, self._environment, self._cores = arguments, environment, cores
        self._process: asyncio.subprocess.Process | None = None
        self._is_ending = False

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked."""
        return self.state is State.READY

    def lost(self) -> None:
        """It does not answer: it is not asked again before it is known to be well."""
        if self.is_ready:
            self.state = State.FAILED

    async def run(self, is_first: bool) -> None:
        """Keep one at work until `end`; of the first, only once it has answered."""
        pause = _FIRST_PAUSE
        while not self._is_ending:
            begun = time.monotonic()
            await self._live(is_first and not self.restarts)
            if self._is_ending or (is_first and not self.model_name):
                return
            pause = _FIRST_PAUSE if time.monotonic() - begun > _LONG_LIFE else pause
            log.warning("replica %d ended (%s), and is begun again in %g s", self.number, self.exit_code, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            self.restarts += 1

    async def _live(self, is_first: bool) -> None:
        """From a process's beginning to its end."""
        assignment = Assignment(self.number, self.socket, os.getpid(), is_first)
        told = {VARIABLE: json.dumps(dataclasses.asdict(assignment))}
        self.state, self.exit_code = State.STARTING, None
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _COMMAND, *self._arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, **self._environment, **told},
                start_new_session=True,  # Ctrl-C is for the parent, which lets answers end
            )
        except OSError as error:
            log.error("replica %d cannot be begun: %s", self.number, error.strerror)
            self.state = State.FAILED
            self.changed.set()
            return
        try:
            if self._is_ending:
                process.kill()
            if self._cores:
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(process.pid, self._cores)
            assert process.stdout is not None
            line = (await process.stdout.readline()).decode(errors="replace")
            if line:
                self.model_name = line.rpartition(" at ")[0]
                self.state = State.READY
                self.changed.set()
                await self._watch(process)
        finally:
            self.state = State.FAILED
            if process.returncode is None and not self._is_ending:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            self.exit_code = await process.wait()
            self.changed.set()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Until a process ends, or is of no use any more."""
        ended = asyncio.ensure_future(process.wait())
        silent = 0
        try:
            while silent < _MOST_SILENT_CHECKS:
                await asyncio.wait([ended], timeout=_CHECK_SECONDS)
                if ended.done():
                    return
                health = await self._health()
                silent = 0 if health else silent + 1
                if health == "engine_stopped":
                    log.error("replica %d: its engine has stopped by an error", self.number)
                    return
                if health and not self._is_ending:
                    self.state = State.READY if health == "ok" else State.FAILED
            log.error("replica %d has not answered for %d checks", self.number, silent)
        finally:
            ended.cancel()

    async def _health(self) -> str:
        """What it says of itself; empty: nothing."""

        async def asked() -> bytes:
            async with Upstream(self.socket) as upstream:
                return await upstream.get("/health")

        try:  # with the connection, which one that hangs may not take, either
            return str(json.loads(await asyncio.wait_for(asked(), _CHECK_SECONDS))["status"])
        except (UpstreamLost, asyncio.TimeoutError, ValueError, KeyError):
            return ""

    async def end(self) -> None:
        """Let it end, and wait for that."""
        self._is_ending = True
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        except asyncio.TimeoutError:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._is_ending = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


class Replicas:
    """All of them; `running` is their life.

    Args:
        arguments: of the command ``pascalvl`` that each runs.
        count: how many.
        cards: one for each, as CUDA_VISIBLE_DEVICES has it; none: they share this machine's cores.

    Raises:
        UserError: for more replicas than cards.
    """

    def __init__(self, arguments: Sequence[str], count: int, cards: Sequence[str]) -> None:
        if count < 1:
            raise UserError(f"--replicas is out of range: expected at least 1, found {count}.")
        if cards and count > len(cards):
            plural = "s" * (len(cards) > 1)
            raise UserError(
                f"--replicas {count} are more than the {len(cards)} GPU{plural} here, each of which takes one: give at "
                f"most {len(cards)}, or more GPUs with {_VISIBLE_CARDS}."
            )
        self._arguments, self.count, self._cards = arguments, count, cards
        self.all: list[Replica] = []

    @property
    def ready(self) -> list[Replica]:
        """Those that can be asked."""
        return [replica for replica in self.all if replica.is_ready]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While it is open, they are at work; it opens when the first is, and then begins the others, which find what
        that one made. Raises `EndedEarly` if it ends before, having told why."""
        with tempfile.TemporaryDirectory(prefix="pascalvl-") as folder:
            if len(os.fsencode(folder)) + 16 > _MOST_PATH_BYTES:
                raise UserError(
                    "the path of the folder for temporary files is too long for sockets: set TMPDIR to another."
                )
            self.all = [self._replica(number, folder) for number in range(self.count)]
            tasks = [asyncio.ensure_future(self.all[0].run(is_first=True))]
            try:
                await self.all[0].changed.wait()
                if not self.all[0].model_name:
                    raise EndedEarly(self._code_of(self.all[0].exit_code))
                tasks += [asyncio.ensure_future(replica.run(is_first=False)) for replica in self.all[1:]]
                yield
            finally:
                self.kill()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def _code_of(code: int | None) -> int:
        if code is None:
            raise UserError("no process can be begun for the first replica: end what else takes memory.")
        if code < 0:
            raise UserError(f"the first replica was ended by signal {-code} before it answered: see dmesg.")
        return code

    def _replica(self, number: int, folder: str) -> Replica:
        environment = {_VISIBLE_CARDS: self._cards[number]} if self._cards else {}
        cores: list[int] = []
        if not self._cards:
            there = sorted(os.sched_getaffinity(0))
            if len(there) >= self.count:
                cores = there[len(there) * number // self.count : len(there) * (number + 1) // self.count]
        return Replica(number, self._arguments, os.path.join(folder, str(number)), environment, cores)

    async def end(self) -> None:
        """Let all end, and wait for that."""
        await asyncio.gather(*(replica.end() for replica in self.all))

    def kill(self) -> None:
        """End all at once."""
        for replica in self.all:
            replica.kill()
