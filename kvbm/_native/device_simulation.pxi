# The steering of the simulated device, included by device.pyx; nothing of it can be reached in the real build.

cdef extern from "steering.h" nogil:
    ctypedef struct kvbm_simulated_operation:
        char[64] kind
        uint64_t stream
        uint64_t nbytes
        uint64_t source
        uint64_t destination

    ctypedef struct kvbm_simulated_counts:
        uint64_t num_allocations
        uint64_t num_registrations
        uint64_t num_streams
        uint64_t num_events
        uint64_t allocated_nbytes
        uint64_t num_waiting

    void kvbm_simulated_set_mode(int mode)
    int kvbm_simulated_mode()
    void kvbm_simulated_set_num_devices(int num_devices)
    int kvbm_simulated_num_devices()
    int kvbm_simulated_current_device()
    int kvbm_simulated_has_context(int device)
    int kvbm_simulated_capture_mode()
    void kvbm_simulated_set_capturing(int is_capturing, uint64_t stream)
    int kvbm_simulated_capturing()
    void kvbm_simulated_set_total_nbytes(uint64_t nbytes)
    uint64_t kvbm_simulated_total_nbytes()
    void kvbm_simulated_set_batch_copy(int version)
    int kvbm_simulated_batch_copy()
    void kvbm_simulated_set_reversed(int is_reversed)
    int kvbm_simulated_reversed()
    int kvbm_simulated_advance(uint64_t stream, int is_any, int n)
    int kvbm_simulated_code(const char* name)
    void kvbm_simulated_fail_call(const char* name, int code, uint64_t after)
    void kvbm_simulated_fail_operation(int code, uint64_t after)
    uint64_t kvbm_simulated_num_operations()
    uint64_t kvbm_simulated_operations(uint64_t first, uint64_t n, kvbm_simulated_operation* operations)
    void kvbm_simulated_counts_now(kvbm_simulated_counts* counts)
    void kvbm_simulated_reset()

_MODES = ("running", "stepped", "held")
_CAPTURE_MODES = ("global", "thread_local", "relaxed")


cdef class _Simulation:
    """Steers the simulated devices of this process: what tests set, step, break and read.

    Attributes
    ----------
    total_nbytes : int
        Memory of each device, bytes, 2 GiB at first; what is taken already stays taken.
    has_batch_copy : bool
        Whether the driver knows the batched copy.
    is_reversed : bool
        Whether threads, thread blocks and the copies of a batch start with the last: they have no order of their own.

    Notes
    -----
    Modes: "running", operations run in the background; "stepped", nothing runs but by `advance`, `run_all` or whoever
    waits for it, who then runs what is needed; "held", who waits sleeps until another thread steps. Memory that is
    freed, and copies with pageable memory, run what they must wait for in each mode.
    """

    @property
    def mode(self):
        """"running", "stepped" or "held"."""
        return _MODES[kvbm_simulated_mode()]

    def set_mode(self, mode):
        """Set how operations come to run.

        Raises
        ------
        ConfigError
            There is no such mode.
        """
        if mode not in _MODES:
            raise ConfigError(f"mode {mode!r} is not known, use one of {', '.join(_MODES)}")
        kvbm_simulated_set_mode(_MODES.index(mode))

    @property
    def num_devices(self):
        """How many devices there are."""
        return kvbm_simulated_num_devices()

    @property
    def current_device(self):
        """The device that is current in this thread: what other users of CUDA in the process find."""
        return kvbm_simulated_current_device()

    def set_num_devices(self, num_devices):
        """Set how many devices there are, 0 to 16; before anything is made on them."""
        if not 0 <= operator.index(num_devices) <= 16:
            raise ConfigError(f"the simulation has 0 to 16 devices, got {num_devices}")
        kvbm_simulated_set_num_devices(num_devices)

    def has_context(self, device):
        """Say whether a device was made current or worked on by anybody: a real one keeps memory for that."""
        return bool(kvbm_simulated_has_context(device))

    @property
    def capture_mode(self):
        """The thread's mode towards captures of others: "global", "thread_local" or "relaxed"."""
        return _CAPTURE_MODES[kvbm_simulated_capture_mode()]

    @property
    def is_capturing(self):
        """Whether some other thread captures a graph."""
        return bool(kvbm_simulated_capturing())

    def begin_capture(self, stream=None):
        """Let some other thread capture a graph, on a stream of ours or on one that nobody sees.

        Calls that would spoil the capture fail, but in a thread whose mode is relaxed.
        """
        kvbm_simulated_set_capturing(True, 0 if stream is None else stream.handle)

    def end_capture(self):
        """Let the capture end."""
        kvbm_simulated_set_capturing(False, 0)

    @property
    def total_nbytes(self):
        """Memory of each device, bytes."""
        return kvbm_simulated_total_nbytes()

    @total_nbytes.setter
    def total_nbytes(self, nbytes):
        kvbm_simulated_set_total_nbytes(_positive("total_nbytes", nbytes, 0))

    @property
    def has_batch_copy(self):
        """Whether the driver knows the batched copy."""
        return bool(kvbm_simulated_batch_copy())

    @has_batch_copy.setter
    def has_batch_copy(self, has):
        kvbm_simulated_set_batch_copy(13 if has else 0)

    def set_driver(self, version):
        """Let the driver be that of CUDA 11, which has no batched copy, of 12 or 13, which name it differently."""
        if version not in (11, 12, 13):
            raise ConfigError(f"the simulation has drivers of CUDA 11, 12 and 13, got {version}")
        kvbm_simulated_set_batch_copy(0 if version == 11 else version)

    @property
    def is_reversed(self):
        """Whether what has no order starts with the last."""
        return bool(kvbm_simulated_reversed())

    @is_reversed.setter
    def is_reversed(self, is_reversed):
        kvbm_simulated_set_reversed(bool(is_reversed))

    def advance(self, stream=None, n=1):
        """Run up to `n` operations that may run now, of one stream or of any, and give how many ran.

        Parameters
        ----------
        stream : Stream or int, optional
        n : int
        """
        cdef int is_any = stream is None
        cdef uint64_t handle = 0 if stream is None else stream if isinstance(stream, int) else stream.handle
        cdef int most = n
        cdef int num_run
        with nogil:
            num_run = kvbm_simulated_advance(handle, is_any, most)
        return num_run

    def run_all(self):
        """Run every operation that may run, and give how many ran."""
        cdef int num_run
        with nogil:
            num_run = kvbm_simulated_advance(0, 1, 0x7fffffff)
        return num_run

    def fail_call(self, name, code, after=0):
        """Let a call of the runtime fail once, after `after` that pass.

        Parameters
        ----------
        name : str
            ``cudaMalloc``; a launch is ``cudaLaunchKernel``, the batched copy ``cuMemcpyBatchAsync``.
        code : int or str
            ``cudaErrorMemoryAllocation``, or 2.
        after : int
        """
        kvbm_simulated_fail_call(name.encode(), _code(code), after)

    def fail_operation(self, code, after=0):
        """Let a copy, fill or kernel fail when it runs, after `after` that pass; its device is lost from then on."""
        kvbm_simulated_fail_operation(_code(code), after)

    def operations(self):
        """Give what ran, in order, the last 65,536: (kind, stream, nbytes, source, destination).

        Kinds are memcpy, memcpy2d, memcpy3d, batch, memset, kernel:<name>, delay, record and wait; a copy with
        pageable memory ends in ``:pageable``. Of a batch the addresses are those of its first copy, of record and wait
        the source is the event.
        """
        cdef kvbm_simulated_operation one
        cdef uint64_t n = kvbm_simulated_num_operations()
        found = []
        for i in range(n):
            if kvbm_simulated_operations(i, 1, &one) == 1:
                found.append((one.kind.decode(), one.stream, one.nbytes, one.source, one.destination))
        return found

    def counts(self):
        """Give how many allocations, registrations, streams, events, bytes and waiting operations there are."""
        cdef kvbm_simulated_counts now
        memset(&now, 0, sizeof(now))
        kvbm_simulated_counts_now(&now)
        return {
            "allocations": now.num_allocations,
            "registrations": now.num_registrations,
            "streams": now.num_streams,
            "events": now.num_events,
            "nbytes": now.allocated_nbytes,
            "waiting": now.num_waiting,
        }

    def reset(self):
        """Forget memory, streams, events, faults, errors, the log and all settings; what is running ends first.

        Handles and addresses from before are unknown afterwards; streams and events that still live close quietly.
        """
        with nogil:
            kvbm_simulated_reset()


cdef int _code(code) except -1:
    cdef int number
    if isinstance(code, int):
        return code
    number = kvbm_simulated_code(code.encode())
    if number < 0:
        raise ConfigError(f"{code!r} is not an error of the simulation, use CUDA's name or number")
    return number
