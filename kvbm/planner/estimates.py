"""How long it takes to move blocks: an estimate for each route, from the jobs of that route so far.

A job takes a latency and a time a byte. Each settled job moves both towards what was seen; recent jobs count most. A
job that is far from what was predicted counts as an outlier at first; when the next one is too, it is believed, and
what was before is forgotten. Everything that comes up from a tier is one route, whichever memory it
goes to. Noting a job costs a request nothing: what waits is learnt from by whoever reads. Its one lock is held for
arithmetic only.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvbm.jobs import CopyJob, Outcome
from kvbm.planner.ledger import OpenJob
from kvbm.types import Tier

_ORDER = {tier: place for place, tier in enumerate(Tier)}
_FADING = 0.9  # weight of a job beside the one after it
_STIFFNESS = 0.1  # what it costs, in jobs, to move a part without need
_LONGEST_STEP = 4.0  # by which a part is multiplied or divided
_FAR = 4.0  # so many times more or less than predicted is an outlier at first
_NO_TIME_S = 1e-9
_MAX_WAITING = 256  # jobs; those before them have faded

# (latency in seconds, bytes a second) of what comes from, or goes to, a tier before anything was measured.
DEFAULTS = {Tier.DEVICE: (5e-5, 10e9), Tier.HOST: (5e-5, 10e9), Tier.DISK: (5e-4, 1e9), Tier.REMOTE: (5e-2, 100e6)}


@dataclass(frozen=True)
class RouteEstimate:
    """What is believed of a route at one moment.

    Attributes
    ----------
    latency_s : float
        Of one job, in seconds.
    bytes_per_s : float
    num_jobs : int
        Jobs measured since the start; 0: these are defaults.
    measured_at : float or None
        Moment of the planner's clock when the last one was.
    """

    latency_s: float
    bytes_per_s: float
    num_jobs: int = 0
    measured_at: float | None = None

    @property
    def is_default(self) -> bool:
        """Whether nothing was measured yet."""
        return not self.num_jobs

    def seconds(self, nbytes: float, num_jobs: float = 1) -> float:
        """Predict how long jobs take that move so many bytes in all, one after the other."""
        return num_jobs * self.latency_s + nbytes / self.bytes_per_s


class _Route:
    """The estimate of one route, as it moves.

    Least squares of the relative errors, old jobs fading; each job is one step of Levenberg and Marquardt, so that what
    the jobs cannot tell (all of one size) stays in the measure it has.
    """

    def __init__(self, tier: Tier) -> None:
        self.now = RouteEstimate(*DEFAULTS[tier])
        self.latency_s, self.byte_s = self.now.latency_s, 1 / self.now.bytes_per_s
        self.block_nbytes = 0.0  # of the last job that moved any
        self._num_far = 0  # outliers in a row: above 0 slower ones, below 0 faster ones
        self._moments = [0.0] * 5  # sums over jobs, x bytes and y seconds: 1/yy, x/yy, xx/yy, 1/y, x/y

    def observe(self, nbytes: float, seconds: float, now: float) -> None:
        ratio = max(seconds, _NO_TIME_S) / self._predict(nbytes)
        far = (ratio > _FAR) - (ratio < 1 / _FAR)
        self._num_far = far if far * self._num_far <= 0 else self._num_far + far
        if self.now.is_default or abs(self._num_far) > 1:  # what was before is of no use
            self._moments = [0.0] * 5
            self.latency_s *= ratio
            self.byte_s *= ratio
            ratio = 1.0
        y = min(max(ratio, 1 / _FAR), _FAR) * self._predict(nbytes)
        news = (1 / y**2, nbytes / y**2, (nbytes / y) ** 2, 1 / y, nbytes / y)
        self._moments = [_FADING * old + new for old, new in zip(self._moments, news, strict=True)]
        self._step()
        self.now = RouteEstimate(self.latency_s, 1 / self.byte_s, self.now.num_jobs + 1, now)

    def _predict(self, nbytes: float) -> float:
        return self.latency_s + nbytes * self.byte_s

    def _step(self) -> None:
        """Move both parts by the factors that fit best, where a factor far from 1 costs something."""
        yy, xyy, xxyy, y, xy = self._moments
        a, b = self.latency_s, self.byte_s
        aa, ab, bb = a * a * yy + _STIFFNESS, a * b * xyy, b * b * xxyy + _STIFFNESS
        ra, rb = a * y + _STIFFNESS, b * xy + _STIFFNESS
        determinant = aa * bb - ab * ab
        self.latency_s *= min(max((ra * bb - rb * ab) / determinant, 1 / _LONGEST_STEP), _LONGEST_STEP)
        self.byte_s *= min(max((rb * aa - ra * ab) / determinant, 1 / _LONGEST_STEP), _LONGEST_STEP)


class Estimates:
    """The estimates of a planner.

    Parameters
    ----------
    top : Tier
        The highest tier.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(self, top: Tier, *, clock: Callable[[], float]) -> None:
        self._top = top
        self._clock = clock
        self._waiting: deque[tuple[OpenJob, float]] = deque(maxlen=_MAX_WAITING)  # settled jobs, and when they were
        self._lock = threading.Lock()  # guards the routes
        self._routes: dict[tuple[Tier, Tier], _Route] = {}

    def route(self, source: Tier, destination: Tier) -> RouteEstimate:
        """Give what is believed of a route."""
        key, default = self._key_of(source, destination)
        with self._lock:
            self._learn()
            known = self._routes.get(key)
        return RouteEstimate(*DEFAULTS[default]) if known is None else known.now

    def default(self, source: Tier, destination: Tier) -> RouteEstimate:
        """Give what is believed of a route that was never measured."""
        return RouteEstimate(*DEFAULTS[self._key_of(source, destination)[1]])

    def routes(self) -> dict[tuple[Tier, Tier], RouteEstimate]:
        """Give what was measured: what comes up from a tier stands under that tier and the top one."""
        with self._lock:
            self._learn()
            return {key: route.now for key, route in self._routes.items() if not route.now.is_default}

    def observe(self, entry: OpenJob) -> None:
        """Note a settled job.

        A job that was late counts if it took longer than predicted; one that nobody has begun, or that failed as a
        whole, says nothing.
        """
        if entry.seconds > 0 and isinstance(entry.job, CopyJob):
            self._waiting.append((entry, self._clock()))

    # -- private, under the lock -------------------------------------------------------------------------------

    def _learn(self) -> None:
        while self._waiting:
            self._learn_from(*self._waiting.popleft())

    def _learn_from(self, entry: OpenJob, now: float) -> None:
        job = entry.job
        if not isinstance(job, CopyJob) or not len(job.hashes):
            return
        num_good = len(job.hashes) if entry.is_whole else int(entry.ok.sum())
        key, default = self._key_of(job.source, job.destination)
        if key not in self._routes:
            self._routes[key] = _Route(default)
        route = self._routes[key]
        if num_good:
            route.block_nbytes = entry.nbytes / (num_good * max(1, len(entry.results)))
        is_late = not entry.is_whole and bool((entry.outcomes == Outcome.LATE).any())
        nbytes = route.block_nbytes * (max(1, num_good) if is_late else len(job.hashes))
        if not nbytes or not (num_good or is_late):
            return
        if is_late and entry.seconds < route.now.seconds(nbytes):
            return
        route.observe(nbytes, entry.seconds, now)

    def _key_of(self, source: Tier, destination: Tier) -> tuple[tuple[Tier, Tier], Tier]:
        """Give the name under which a route stands, and the tier whose default it begins with: the lower one."""
        if _ORDER[destination] < _ORDER[self._top]:  # into an engine's memory
            return (source, destination), source
        if _ORDER[destination] < _ORDER[source]:
            return (source, self._top), source
        return (source, destination), destination
