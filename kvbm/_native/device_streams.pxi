# Events and streams of device.pyx: handles that are given back once, in any order, never by a forked child.


cdef class Event:
    """A point in a stream that others may wait for: `Device.create_event` makes one, `Device.adopt_event` takes one.

    Recorded again, it stands for the later point. One that was made is given back when it is closed or nobody holds it.
    """

    cdef uint64_t _handle
    cdef int _device
    cdef bint _is_owned

    def __init__(self):
        raise ConfigError("an event is made by Device.create_event or Device.adopt_event")

    def __dealloc__(self):
        if self._handle != 0 and self._is_owned:
            with nogil:
                kvbm_cuda_event_destroy(self._device, self._handle, NULL)

    @property
    def handle(self):
        """The runtime's handle; 0 when closed."""
        return self._handle

    cdef uint64_t open_handle(self) except 0:
        if self._handle == 0:
            raise _closed("an event", self._device)
        return self._handle

    def is_done(self):
        """Say whether the stream has passed the event; true for one that was never recorded.

        Raises
        ------
        DeviceError
            What the stream did before failed, or the event is closed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t handle = self.open_handle()
        cdef int is_done = 0
        cdef int code
        with nogil:
            code = kvbm_cuda_event_is_done(self._device, handle, &is_done, &error)
        _check(code, &error)
        return bool(is_done)

    def synchronize(self):
        """Sleep until the stream has passed the event.

        Raises
        ------
        DeviceError
            What the stream did before failed, or the event is closed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t handle = self.open_handle()
        cdef int code
        with nogil:
            code = kvbm_cuda_event_synchronize(self._device, handle, &error)
        _check(code, &error)

    def elapsed_s(self, Event end not None):
        """Give the seconds from this event to `end`; both made with timing, and passed.

        Raises
        ------
        DeviceError
            One of them has no timing, was not recorded, or is not passed yet.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t handle = self.open_handle()
        cdef uint64_t last = end.open_handle()
        cdef float milliseconds = 0
        cdef int code
        with nogil:
            code = kvbm_cuda_event_elapsed(self._device, handle, last, &milliseconds, &error)
        _check(code, &error)
        return milliseconds / 1000.0

    def close(self):
        """Give the event back now; what waits for it still does. Further calls do nothing."""
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t handle = self._handle
        cdef int code
        if handle == 0:
            return
        self._handle = 0
        if not self._is_owned:
            return
        with nogil:
            code = kvbm_cuda_event_destroy(self._device, handle, &error)
        _check(code, &error)


cdef class Stream:
    """A queue of work on a device: `Device.create_stream` makes one, `Device.adopt_stream` takes somebody else's.

    One that was made is given back when it is closed or nobody holds it; its work still runs. Others are left alone.
    """

    cdef uint64_t _handle
    cdef int _device
    cdef bint _is_owned
    cdef bint _is_closed

    def __init__(self):
        raise ConfigError("a stream is made by Device.create_stream or Device.adopt_stream")

    def __dealloc__(self):
        if self._is_owned and not self._is_closed:
            with nogil:
                kvbm_cuda_stream_destroy(self._device, self._handle, NULL)

    @property
    def handle(self):
        """The runtime's handle; 0 is the default stream, or one that is closed."""
        return 0 if self._is_closed else self._handle

    cdef int check_open(self) except -1:
        if self._is_closed:
            raise _closed("a stream", self._device)
        return 0

    def is_idle(self):
        """Say whether all work that was queued is done.

        Raises
        ------
        DeviceError
            The work failed, or the stream is closed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef int is_idle = 0
        cdef int code
        self.check_open()
        with nogil:
            code = kvbm_cuda_stream_is_idle(self._device, self._handle, &is_idle, &error)
        _check(code, &error)
        return bool(is_idle)

    def synchronize(self):
        """Wait until all work that was queued is done.

        Raises
        ------
        DeviceError
            The work failed, or the stream is closed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef int code
        self.check_open()
        with nogil:
            code = kvbm_cuda_stream_synchronize(self._device, self._handle, &error)
        _check(code, &error)

    def record(self, Event event not None):
        """Put the event behind all work that was queued.

        Raises
        ------
        DeviceError
            One of them is closed, they are of two devices, or the stream captures a graph.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t handle = event.open_handle()
        cdef int code
        self.check_open()
        with nogil:
            code = kvbm_cuda_event_record(self._device, handle, self._handle, &error)
        _check(code, &error)

    def wait(self, Event event not None):
        """Let work queued from now on wait for the latest record of `event`; nothing where there was none.

        Raises
        ------
        DeviceError
            One of them is closed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t handle = event.open_handle()
        cdef int code
        self.check_open()
        with nogil:
            code = kvbm_cuda_stream_wait(self._device, self._handle, handle, &error)
        _check(code, &error)

    def close(self):
        """Give the stream back now, where it is ours; its work still runs. Further calls do nothing."""
        cdef kvbm_cuda_error error = _no_error()
        cdef int code = 0
        if self._is_closed:
            return
        self._is_closed = True
        if self._is_owned:
            with nogil:
                code = kvbm_cuda_stream_destroy(self._device, self._handle, &error)
        _check(code, &error)

    def __cuda_stream__(self):
        """Give (0, handle): version 0 of the protocol by which libraries hand streams to each other."""
        self.check_open()
        return 0, self._handle
