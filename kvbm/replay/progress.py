"""How far a replay is, kept in a small file beside the slab, so that one that was killed can go on.

The file is replaced as a whole, up to fifty times a second. It may be a little behind: those requests are served again,
and what it says of counts is as far behind as what it says of requests, so nothing counts twice. One lock guards it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from kvbm.errors import ConfigError
from kvbm.replay.report import Served
from kvbm.replay.traces import TraceRequest
from kvbm.types import HashArray

FILE_NAME = "replay.progress"
WINDOW_REQUESTS = 100  # after a start, whose hits tell a warm one from a cold one

_FORMAT = 1
_SAVE_S = 0.02


class Totals(msgspec.Struct, forbid_unknown_fields=True):
    """What came of some requests.

    Attributes
    ----------
    requests, blocks, hit_blocks : int
    hits_by_tier : dict of str to int
        Blocks found, by the tier they were found in.
    """

    requests: int = 0
    blocks: int = 0
    hit_blocks: int = 0
    hits_by_tier: dict[str, int] = msgspec.field(default_factory=dict)

    def add(self, served: Served) -> None:
        """Count one more request."""
        self.requests += 1
        self.blocks += served.blocks
        self.hit_blocks += served.hit_blocks
        for tier, num_blocks in served.hits_by_tier.items():
            self.hits_by_tier[tier] = self.hits_by_tier.get(tier, 0) + num_blocks

    def rates(self, tiers: Iterable[str]) -> dict[str, float]:
        """Give the share of the blocks that was found in each of these tiers."""
        return {tier: self.hits_by_tier.get(tier, 0) / max(1, self.blocks) for tier in tiers}


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """What the file holds."""

    format: int
    settings: dict[str, str]
    num_requests: int  # of the workload
    num_done: int  # every request before that place is done
    also_done: list[int]  # places of requests behind it
    totals: Totals  # of what is done, by all runs
    cold: Totals | None = None  # of the first requests of a run that began with empty tiers


class ReplayProgress:
    """Keeps the file of one replay, and knows what was done before.

    Parameters
    ----------
    directory : path
        Where the slab lies.
    settings : dict of str to str
        What has to be the same for a replay to go on: the trace, the sizes of tiers, the schedule.
    num_requests : int
        Of the workload.
    resume : bool
        Whether to go on with a replay that was interrupted.
    clock : callable
        Gives seconds; monotonic.

    Attributes
    ----------
    num_skipped : int
        Requests that earlier runs have done.
    before : Totals
        What came of those.
    window : Totals
        The first requests of this run, in order, as far as they have ended.

    Raises
    ------
    ConfigError
        There is nothing to go on with, or it was another replay; or there is something, and `resume` is False; or the
        file cannot be read.

    Notes
    -----
    Nothing is written before `begin`: by then the slab is locked, and nobody else replays here.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: Mapping[str, str],
        *,
        num_requests: int,
        resume: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(directory) / FILE_NAME
        self._clock = clock
        self._lock = threading.Lock()
        self._saved_at = -_SAVE_S
        self._is_cold = False
        self._places: list[int] = []  # of the requests given out, in the workload
        found = _read(self.path)
        if found is not None and not resume:
            raise ConfigError(
                f"{self.path} tells of a replay that ended after {_count_done(found):,} of {found.num_requests:,} "
                "requests: give --resume to go on with it, or remove that file to begin anew"
            )
        if found is None and resume:
            raise ConfigError(
                f"there is nothing to resume in {self.path.parent}: no replay was interrupted there ({FILE_NAME} is "
                "absent), leave --resume out to begin"
            )
        if found is not None:
            _need_same(found, dict(settings), self.path)
        now = found or _Saved(_FORMAT, dict(settings), num_requests, 0, [], Totals())
        self._cold = now.cold
        self._num_done, self._also_done = now.num_done, set(now.also_done)
        self._settings, self._num_requests = now.settings, now.num_requests
        self._totals = now.totals
        self.num_skipped = _count_done(now)
        self.before = msgspec.convert(msgspec.to_builtins(now.totals), Totals)
        self.window = Totals()
        self._window_hashes: dict[int, HashArray] = {}

    def begin(self, *, is_cold: bool) -> None:
        """Write the file for the first time; say whether every tier is empty."""
        self._is_cold = is_cold
        with self._lock:
            self._save()

    def remaining(self, requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
        """Give the requests of the workload that are not done."""
        num_done, also_done = self._num_done, set(self._also_done)
        for place, request in enumerate(requests):
            if place >= num_done and place not in also_done:
                self._places.append(place)
                yield request

    def note(self, index: int, hashes: HashArray, served: Served) -> None:
        """Note that a request has ended; any thread.

        Parameters
        ----------
        index : int
            Which of those that `remaining` gave.
        hashes : (num_blocks, 2) uint64
        served : Served
        """
        with self._lock:
            self._totals.add(served)
            if index < WINDOW_REQUESTS:
                self.window.add(served)
                if not served.refused:
                    self._window_hashes[index] = hashes
            self._also_done.add(self._places[index])
            while self._num_done in self._also_done:
                self._also_done.discard(self._num_done)
                self._num_done += 1
            if self._clock() - self._saved_at >= _SAVE_S:
                self._save()

    @property
    def totals(self) -> Totals:
        """What came of all that is done, by all runs."""
        return self._totals

    @property
    def cold(self) -> Totals | None:
        """What came of the first requests of the run that began with empty tiers; None where none did."""
        return self.window if self._is_cold else self._cold

    def window_hashes(self) -> list[HashArray]:
        """Give the block hashes of the first requests of this run that were served, in their order."""
        with self._lock:
            return [self._window_hashes[index] for index in sorted(self._window_hashes)]

    def end(self) -> None:
        """Write the file once more, or remove it where everything is done."""
        with self._lock:
            if self._num_done >= self._num_requests:
                self.path.unlink(missing_ok=True)
            else:
                self._save()

    def _save(self) -> None:
        saved = _Saved(
            _FORMAT,
            self._settings,
            self._num_requests,
            self._num_done,
            sorted(self._also_done),
            self._totals,
            self.cold,
        )
        part = self.path.with_name(f"{FILE_NAME}.part")
        # Not synced: a killed process loses nothing by that, and after a power cut some requests are served again.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(part, flags, 0o600), "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(saved)) + b"\n")
        part.replace(self.path)
        self._saved_at = self._clock()


def _read(path: Path) -> _Saved | None:
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        saved = msgspec.json.decode(text, type=_Saved)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{path} is no progress of a replay ({error}): remove it to begin anew, what the slab holds stays"
        ) from error
    if saved.format != _FORMAT:
        raise ConfigError(f"{path} has format {saved.format}, this version reads {_FORMAT}: remove it to begin anew")
    return saved


def _count_done(saved: _Saved) -> int:
    return saved.num_done + len(saved.also_done)


def _need_same(saved: _Saved, settings: dict[str, str], path: Path) -> None:
    names = [name for name in {**saved.settings, **settings} if saved.settings.get(name) != settings.get(name)]
    if names:
        text = ", ".join(
            f"{name} was {saved.settings.get(name, 'absent')} and is {settings.get(name, 'absent')}" for name in names
        )
        raise ConfigError(
            f"cannot resume, {path} is of another replay: {text}; give what was given then, or remove that file and "
            "leave --resume out to begin anew"
        )
