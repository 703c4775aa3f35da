"""Streams and events of other packages, by what they show of themselves; none of those packages is imported.

A stream is any object with ``__cuda_stream__`` (the protocol of cuda.core, CuPy and ours), a handle as an integer,
torch's ``cuda_stream``, CuPy's ``ptr``, Numba's ``handle``, or a handle object of cuda-python. None is the default one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvbm.errors import ConfigError
from kvbm.gpu.runtime import Gpu

if TYPE_CHECKING:
    from kvbm._backend import Event, Stream

_ADVICE = "give a stream (anything with __cuda_stream__, a torch or CuPy stream, a handle as an integer) or None"
_EVENT_HANDLES = ("CUevent", "cudaEvent_t")  # of cuda-python: plain handles, told from streams by their type's name


def stream_handle(stream: Any) -> int:
    """Give the handle of a stream.

    Parameters
    ----------
    stream : object
        As the module says; None is the legacy default stream, handle 0.

    Raises
    ------
    ConfigError
        It is no stream, or its protocol is of a version that we do not know.
    """
    if stream is None:
        return 0
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol() if callable(protocol) else protocol
        if version != 0:
            raise ConfigError(f"a {_kind(stream)} speaks version {version} of __cuda_stream__, only 0 is known")
        return _checked(handle, stream)
    for name in ("cuda_stream", "ptr"):
        if (handle := getattr(stream, name, None)) is not None and not hasattr(stream, "cuda_event"):
            return _checked(handle, stream)
    pointer: Any = getattr(stream, "handle", None)
    if hasattr(pointer, "value"):  # Numba: a ctypes pointer, None for 0
        return _checked(pointer.value or 0, stream)
    if is_event(stream):
        raise ConfigError(f"a {_kind(stream)} is an event, {_ADVICE}")
    if isinstance(stream, int) or _is_cuda_python(stream):
        return _checked(stream, stream)
    raise ConfigError(f"a {_kind(stream)} is no stream, {_ADVICE}")


def as_stream(gpu: Gpu, stream: Any) -> Stream:
    """Give a stream of our own, or any other, as one that `gpu.device` takes; it stays its owner's.

    Parameters
    ----------
    gpu : Gpu
    stream : object
        As for `stream_handle`.

    Raises
    ------
    ConfigError
        It is no stream.
    """
    return stream if isinstance(stream, gpu.module.Stream) else gpu.device.adopt_stream(stream_handle(stream))


def is_event(work: Any) -> bool:
    """Whether an object is an event, of ours, torch, CuPy or cuda-python, rather than a stream."""
    if hasattr(work, "__cuda_stream__") or hasattr(work, "cuda_stream"):
        return False
    return hasattr(work, "cuda_event") or type(work).__name__ in _EVENT_HANDLES or type(work).__name__ == "Event"


def as_event(gpu: Gpu, event: Any) -> Event:
    """Give an event of our own, or any other that `is_event` knows, as one that streams take; it stays its owner's."""
    if isinstance(event, gpu.module.Event):
        ours: Event = event
        return ours
    for name in ("cuda_event", "ptr", "handle"):
        handle = getattr(event, name, None)
        if handle is not None:
            break
    number = int(event if handle is None else handle)
    if number == 0:  # torch makes its event when it is first recorded: waiting for this one would wait for nothing
        raise ConfigError(f"a {_kind(event)} was never recorded: record it behind the work that is to be waited for")
    return gpu.device.adopt_event(number)


def make_wait(gpu: Gpu, waiting: Stream, work: Any) -> None:
    """Let a stream wait for what others queued so far.

    Parameters
    ----------
    gpu : Gpu
    waiting : Stream
        Queues nothing that follows before that work is done; the calling thread does not wait.
    work : object
        A stream as for `stream_handle`: all that is queued on it by now. Or an event: what it was recorded after.

    Raises
    ------
    ConfigError
        It is neither, or an event that was never recorded.
    """
    if is_event(work):
        waiting.wait(as_event(gpu, work))
        return
    event = gpu.device.create_event()
    try:
        as_stream(gpu, work).record(event)
        waiting.wait(event)
    finally:  # the driver keeps what is still waited for
        event.close()


def _checked(handle: Any, stream: Any) -> int:
    if isinstance(handle, bool):
        raise ConfigError(f"{handle} is no stream, {_ADVICE}")
    try:
        number = int(handle)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a {_kind(stream)} gives {handle!r} as its handle, which is no integer") from error
    if not 0 <= number < 1 << 64:
        raise ConfigError(f"stream handle {number} is outside 0..2**64-1")
    return number


def _is_cuda_python(stream: Any) -> bool:
    return type(stream).__module__.partition(".")[0] == "cuda" and hasattr(stream, "__int__")


def _kind(stream: Any) -> str:
    return f"{type(stream).__module__}.{type(stream).__qualname__}"
