# Errors, and the checks of what device.pyx is given.


cdef int _check(int code, kvbm_cuda_error* error) except -1:
    """Raise what a call told; the one place that does."""
    if code == 0:
        return 0
    raise DeviceError(error.call.decode(), error.name.decode(), error.code, error.text.decode(), error.device,
                      error.nbytes)


cdef kvbm_cuda_error _no_error() noexcept nogil:
    cdef kvbm_cuda_error error
    memset(&error, 0, sizeof(error))
    return error


def _closed(what, device):
    return DeviceError("use", "cudaErrorInvalidResourceHandle", 400, f"{what} is used after close()", device)


cdef Event _event(int device, uint64_t handle, bint is_owned):
    cdef Event event = Event.__new__(Event)
    event._handle = handle
    event._device = device
    event._is_owned = is_owned
    return event


cdef Stream _stream(int device, uint64_t handle, bint is_owned):
    cdef Stream stream = Stream.__new__(Stream)
    stream._handle = handle
    stream._device = device
    stream._is_owned = is_owned
    stream._is_closed = False
    return stream


cdef uint64_t _open_handle(Stream stream) except? 0:
    if stream is None:
        raise ConfigError("None is no stream, adopt the default stream by its handle 0")
    stream.check_open()
    return stream._handle


cdef object _positive(name, value, least=1):
    if operator.index(value) < least:
        raise ConfigError(f"{name} is {value}, give {least} or more")
    return value


cdef cnp.ndarray _addresses(name, array):
    if not isinstance(array, np.ndarray):
        raise wrong_addresses(name, type(array).__name__)
    if array.ndim != 1 or array.dtype != np.uint64:
        raise wrong_addresses(name, f"shape {array.shape} and dtype {array.dtype}")
    return np.ascontiguousarray(array)


cdef tuple _pair(what, sources, destinations):
    cdef cnp.ndarray first = _addresses(f"source_{what}", sources)
    cdef cnp.ndarray second = _addresses(f"destination_{what}", destinations)
    if first.size != second.size:
        raise wrong_addresses(f"destination_{what}", f"{second.size} entries for {first.size} source_{what}")
    return first, second


cdef cnp.ndarray _hashes(hashes, int64_t num_blocks):
    keys = hash_array(hashes)
    if len(keys) != num_blocks:
        raise length_mismatch("hashes", len(keys), num_blocks)
    return keys


cdef const uint64_t* _words(cnp.ndarray array) noexcept:
    return <const uint64_t*>cnp.PyArray_DATA(array)


cdef int _fill_plan(kvbm_cuda_plan* plan, cnp.ndarray blocks, cnp.ndarray pieces, piece_nbytes) except -1:
    plan.source_blocks = _words(blocks)
    plan.destination_blocks = NULL
    plan.source_pieces = _words(pieces)
    plan.destination_pieces = NULL
    plan.num_blocks = blocks.size
    plan.num_pieces = pieces.size
    plan.piece_nbytes = piece_nbytes
    return 0


cdef int _fill_options(kvbm_cuda_options* options, Stream stream, scratch, pinned, num_thread_blocks) except -1:
    stream.check_open()
    memset(options, 0, sizeof(options[0]))
    options.stream = stream._handle
    options.num_thread_blocks = num_thread_blocks
    options.scratch, options.scratch_nbytes = scratch
    options.pinned = pinned
    return 0
