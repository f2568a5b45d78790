"""Several processes at one model: the default group of torch.distributed, as sums over all data.

Every process calls the same function of the library with the same model and arguments; each looks at its
share of the data, and what is summed over the data is summed over the processes too. All that is sent
goes through one collective, the all-reduce. What became of a process is known from the group's store:
each notes there how far it has come, and a failure before it raises it. So a process that waits for one
that is gone says which one, and never waits for longer than the group's time-out.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphprune.errors import DistributedError, in_a_line

# Seconds between looks at what others note, and the longest pause between looks at a collective.
_LOOK = 0.2
_PAUSE = 0.02

# Of the group's time-out, what is waited for the others, so that this error comes before the group's own.
_PATIENCE = 0.9

# When the connection to one process broke, the others have at least this long to say that they live, and
# at least this share of the time that the call has taken: they may have more to do.
_GRACE, _GRACE_SHARE = 2.0, 0.2

_STORE_GONE = "the process that keeps the group's store is gone (rank 0, or the launcher)"


@dataclass
class Ranks:
    """The processes that work at one call; alone where there is no process group.

    Attributes:
        rank: of this process.
        size: how many there are.
        store: where they note how they fare; None for a process that is alone.
        call: the number of the call that they work at, the same in all.
        step: how many collectives this process has come to in it.
        started: when it began, on this process's clock.

    """

    rank: int = 0
    size: int = 1
    store: Any = None
    call: int = 0
    step: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def timeout(self) -> float:
        """How long the others are waited for, in seconds."""
        seconds: float = self.store.timeout.total_seconds()
        return _PATIENCE * seconds

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors of the same shapes over all processes, in float64.

        Raises:
            DistributedError: a process failed, or did not come in time.

        """
        summands = [tensor.detach().double() for tensor in tensors]
        if self.size == 1 or not summands:
            return summands
        # All in one, so that processes meet once; on a device that has one of them, to copy less.
        device = next(
            (tensor.device for tensor in summands if not tensor.is_cpu), summands[0].device
        )
        flat = torch.cat([tensor.flatten().to(device) for tensor in summands])
        sums = self._all_reduce(flat).split([tensor.numel() for tensor in summands])
        return [
            flat_sum.to(summand.device).view(summand.shape)
            for flat_sum, summand in zip(sums, summands, strict=True)
        ]

    def gather(self, contribution: Any) -> list[Any]:
        """Return what each process gives, by rank.

        Raises:
            DistributedError: a process failed, or did not come in time.

        """
        if self.size == 1:
            return [contribution]
        message = torch.frombuffer(bytearray(pickle.dumps(contribution)), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(message)
        sizes = self._all_reduce(lengths).tolist()
        # Zeros but for one's own part: their sum over the processes is every part.
        messages = torch.zeros(sum(sizes), dtype=torch.uint8)
        messages.split(sizes)[self.rank].copy_(message)
        messages_by_rank = self._all_reduce(messages).cpu().split(sizes)
        return [pickle.loads(part.numpy().tobytes()) for part in messages_by_rank]

    def agree(self, deviation: str, digest: str) -> None:
        """See that all processes arrived at the same.

        Args:
            deviation: what those did that came to something else, as "arrived at another plan".
            digest: of what this process came to.

        Raises:
            DistributedError: another process came to something else.

        """
        digests = self.gather(digest)
        differing = [rank for rank, rank_digest in enumerate(digests) if rank_digest != digests[0]]
        if differing:
            raise DistributedError(
                f"{_format_ranks(differing)} {deviation} than rank 0: every process must call this "
                "with the same model, arguments and versions, and with data in the same order or, as "
                "graphprune.OwnShare, with a share of its own"
            )

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, on a device that they can send from."""
        self.step += 1
        sent = tensor.to(_find_sending_device(tensor.device))
        try:
            # Noted before the wait: who is behind this step has not come to this collective.
            self._note(str(self.rank), str(self.step))
            self._wait(dist.all_reduce(sent, async_op=True))
        except RuntimeError as failure:
            raise self._explain_lost_connection() from failure
        return sent

    def _wait(self, work: Any) -> None:
        began = looked = time.monotonic()
        pause = 1e-5
        while not work.is_completed():
            now = time.monotonic()
            if now - looked > _LOOK:
                looked = now
                failure = self._read_failure()
                if failure is not None:
                    raise DistributedError(failure)
                if now - began > self.timeout:
                    raise DistributedError(self._describe_missing(f"within {self.timeout:.3g} s"))
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        work.wait()

    def _explain_lost_connection(self) -> DistributedError:
        """Return what to say when a connection broke, once the others had time to note how they fare."""
        grace = max(_GRACE, _GRACE_SHARE * (time.monotonic() - self.started))
        deadline = time.monotonic() + min(grace, self.timeout)
        while (
            self._find_ranks_behind()
            and time.monotonic() < deadline
            and self._read_failure() is None
        ):
            time.sleep(_LOOK)
        return DistributedError(
            self._read_failure() or self._describe_missing("before its connection broke")
        )

    def _describe_missing(self, when: str) -> str:
        ranks_behind = self._find_ranks_behind()
        who = _format_ranks(ranks_behind) if ranks_behind else "another rank"
        return (
            f"{who} did not come {when} to where rank {self.rank} waits: it died, or it does not make "
            "this call; every process of the group has to"
        )

    def _find_ranks_behind(self) -> list[int]:
        """Return the processes that have not come as far as this one."""
        other_ranks = [rank for rank in range(self.size) if rank != self.rank]
        return [rank for rank in other_ranks if int(self._read_note(str(rank)) or 0) < self.step]

    def _note(self, key: str, text: str) -> None:
        self.store.set(self._key(key), text)

    def _read_note(self, key: str, when_gone: str | None = None) -> str | None:
        """Return what a process noted, or None; `when_gone` where the store is gone."""
        try:
            is_noted = self.store.check([self._key(key)])
            return self.store.get(self._key(key)).decode() if is_noted else None
        except RuntimeError:
            return when_gone

    def _read_failure(self) -> str | None:
        """Return what a process noted when it failed, or that the one with the store did; or None."""
        return self._read_note("failed", _STORE_GONE)

    def _key(self, key: str) -> str:
        return f"graphprune/{self.call}/{key}"

    def fail(self, error: BaseException) -> None:
        """Note that this process fails, for the others to see."""
        # The first to fail is the cause; the others fail because of it.
        if self.store is None or self._read_failure() is not None:
            return
        gave_up = isinstance(error, DistributedError)
        text = f"gave up: {error}" if gave_up else f"failed: {in_a_line(error)}"
        try:
            self._note("failed", f"rank {self.rank} {text}")
        except RuntimeError:
            return  # nobody is left to read it


_current: ContextVar[Ranks | None] = ContextVar("_current", default=None)
_calls = 0


def current_ranks() -> Ranks:
    """Return the processes that work at the call that goes on, or this one alone."""
    return _current.get() or Ranks()


@contextmanager
def join_call(on_data: bool = True) -> Iterator[Ranks]:
    """Work at a call with all processes of the group; one that fails in it is seen by the others.

    Inside another such call it is part of that. A call that looks at no data concerns its process alone.
    """
    global _calls
    outer_ranks = _current.get()
    if outer_ranks is not None or not on_data:
        yield outer_ranks or Ranks()
        return
    ranks = Ranks()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # Calls come in the same order everywhere: the number keeps their notes apart.
        _calls += 1
        store = dist.distributed_c10d._get_default_store()
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), store, _calls)
    token = _current.set(ranks)
    try:
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        _current.reset(token)


def _find_sending_device(device: torch.device) -> torch.device:
    """Return the device if the group sends from such, else one that it does send from."""
    kinds = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
    return device if device.type in kinds else torch.device(kinds[0])


def _format_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
