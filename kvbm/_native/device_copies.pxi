# What device.pyx queues on streams: copies, permutes, checksums, fills.


cdef class _Copies:
    """The part of Device that queues work; not for use alone."""

    cdef readonly int index

    def scratch_nbytes(self, num_blocks, num_pieces, *, with_checksums=False):
        """Give the bytes of scratch, and of pinned memory, that a copy needs for its descriptors.

        Parameters
        ----------
        num_blocks, num_pieces : int
            Blocks, and pieces of each.
        with_checksums : bool

        Notes
        -----
        A permute needs as many for its regions instead of pieces.
        """
        cdef kvbm_cuda_plan plan
        memset(&plan, 0, sizeof(plan))
        plan.num_blocks = _positive("num_blocks", num_blocks, 0)
        plan.num_pieces = _positive("num_pieces", num_pieces, 0)
        return kvbm_cuda_scratch_nbytes(&plan, bool(with_checksums))

    def copy(self, Stream stream not None, source_blocks, destination_blocks, source_pieces, destination_pieces,
             piece_nbytes, *, path, source_on_device, destination_on_device, scratch=(0, 0), pinned=0, staging=(0, 0),
             num_thread_blocks=0, hashes=None, checksums=0, wait_for=(), Event fence=None, with_event=False):
        """Queue the copy of blocks that are all cut alike; piece j of block i lies at blocks[i] + pieces[j].

        Parameters
        ----------
        stream : Stream
        source_blocks, destination_blocks : ndarray
            (num_blocks,) uint64, host: addresses in device or pinned memory. Read before the call returns.
        source_pieces, destination_pieces : ndarray
            (num_pieces,) uint64, host: bytes to add, in the source's logical order.
        piece_nbytes : int
        path : {"memcpy", "batch", "kernel", "staged"}
            Plain copies, the batched copy, a kernel that works on both sides where they are, or a kernel that gathers
            or scatters between the device and `staging`.
        source_on_device, destination_on_device : bool
        scratch : tuple of (int, int)
            Address and bytes of device memory, `scratch_nbytes` or more: for kernels, and for checksums.
        pinned : int
            Address of as much pinned memory. Both belong to the copy until it is done.
        staging : tuple of (int, int)
            Address, a multiple of 256, and bytes of device memory for all blocks: for path "staged".
        num_thread_blocks : int
            Most thread blocks of a kernel; 0 for the default.
        hashes : HashArray, optional
            (num_blocks, 2) uint64, host: sequence hashes; checksums are computed where they are given.
        checksums : int
            Address of (num_blocks,) uint64, pinned memory, for the checksums; valid when the copy is done.
        wait_for : sequence of Stream
            Whose work, as queued by now, the copy waits for.
        fence : Event, optional
            To record on each of those, one after the other; nobody else may use it meanwhile.
        with_event : bool
            Make an event, and put it behind the copy.

        Returns
        -------
        Event or None
            The one that was asked for: all of it is one call, which takes the interpreter lock once.

        Raises
        ------
        ConfigError
            There is no such path, or there are streams to wait for and no fence.
        LayoutError, HashFormatError
            The arrays do not fit together.
        DeviceError
            What was given is impossible, or a call failed. What was queued before it still runs: wait for the stream
            before memory is used for other things.

        Notes
        -----
        Stream-ordered; takes no lock of ours.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef kvbm_cuda_plan plan
        cdef kvbm_cuda_options options
        cdef vector[uint64_t] others
        cdef uint64_t other, between = 0, behind = 0
        cdef bint makes_event = with_event
        cdef int code = 0
        sources, destinations = _pair("blocks", source_blocks, destination_blocks)
        from_pieces, to_pieces = _pair("pieces", source_pieces, destination_pieces)
        if path not in PATHS:
            raise ConfigError(f"path {path!r} is not known, use one of {', '.join(PATHS)}")
        if operator.index(piece_nbytes) < 1:
            raise wrong_piece_nbytes(piece_nbytes)
        _fill_plan(&plan, sources, from_pieces, piece_nbytes)
        plan.destination_blocks = _words(destinations)
        plan.destination_pieces = _words(to_pieces)
        _fill_options(&options, stream, scratch, pinned, num_thread_blocks)
        options.path = PATHS.index(path)
        options.source_on_device = bool(source_on_device)
        options.destination_on_device = bool(destination_on_device)
        options.staging, options.staging_nbytes = staging
        keys = None if hashes is None else _hashes(hashes, plan.num_blocks)
        if keys is not None:
            options.hashes = _words(keys)
            options.checksums = <uint64_t*><size_t>int(checksums)  # an address in pinned memory, as all addresses here
        for waited in wait_for:
            others.push_back(_open_handle(waited))
        if others.size() > 0:
            if fence is None:
                raise ConfigError(f"waiting for {others.size()} streams needs a fence to record on them")
            between = fence.open_handle()
        with nogil:
            for other in others:
                code = kvbm_cuda_event_record(self.index, between, other, &error)
                if code == 0:
                    code = kvbm_cuda_stream_wait(self.index, options.stream, between, &error)
                if code != 0:
                    break
            if code == 0:
                code = kvbm_cuda_copy(self.index, &plan, &options, &error)
            if code == 0 and makes_event:
                code = kvbm_cuda_event_create(self.index, 0, &behind, &error)
                if code == 0:
                    code = kvbm_cuda_event_record(self.index, behind, options.stream, &error)
        event = _event(self.index, behind, True) if behind != 0 else None  # given back where recording it failed
        _check(code, &error)
        return event

    def permute(self, Stream stream not None, source_blocks, destination_blocks, source_regions, destination_regions,
                *, num_tokens, num_heads, head_nbytes, source_strides, destination_strides, scratch=(0, 0), pinned=0,
                num_thread_blocks=0):
        """Queue a copy that lays (token, head) elements out anew in each region of each block.

        Parameters
        ----------
        stream : Stream
        source_blocks, destination_blocks : ndarray
            (num_blocks,) uint64, host: addresses in device or pinned memory. Read before the call returns.
        source_regions, destination_regions : ndarray
            (num_regions,) uint64, host: bytes to add for each layer and outer dim.
        num_tokens, num_heads, head_nbytes : int
            A region's elements, each head_nbytes contiguous bytes.
        source_strides, destination_strides : tuple of (int, int)
            Bytes from one token, and from one head, to the next.
        scratch, pinned, num_thread_blocks
            As for `copy`, with regions for pieces.

        Raises
        ------
        LayoutError
            The arrays do not fit together.
        DeviceError
            What was given is impossible, or a call failed; see `copy`.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef kvbm_cuda_permute permute
        cdef kvbm_cuda_options options
        cdef int code
        sources, destinations = _pair("blocks", source_blocks, destination_blocks)
        from_regions, to_regions = _pair("regions", source_regions, destination_regions)
        permute.source_blocks = _words(sources)
        permute.destination_blocks = _words(destinations)
        permute.source_regions = _words(from_regions)
        permute.destination_regions = _words(to_regions)
        permute.num_blocks = sources.size
        permute.num_regions = from_regions.size
        permute.num_tokens = num_tokens
        permute.num_heads = num_heads
        permute.head_nbytes = head_nbytes
        permute.source_token, permute.source_head = source_strides
        permute.destination_token, permute.destination_head = destination_strides
        _fill_options(&options, stream, scratch, pinned, num_thread_blocks)
        with nogil:
            code = kvbm_cuda_permute_copy(self.index, &permute, &options, &error)
        _check(code, &error)

    def checksum(self, Stream stream not None, blocks, pieces, piece_nbytes, hashes, *, scratch, pinned, checksums,
                 num_thread_blocks=0):
        """Queue the checksums of blocks where they lie, in device or pinned memory; equal to the CPU twins'.

        Parameters
        ----------
        stream : Stream
        blocks, pieces : ndarray
            (num_blocks,) and (num_pieces,) uint64, host, as the source's of `copy`.
        piece_nbytes : int
        hashes : HashArray
            (num_blocks, 2) uint64, host.
        scratch, pinned, checksums, num_thread_blocks
            As for `copy`, with checksums.

        Raises
        ------
        LayoutError, HashFormatError
            The arrays do not fit together.
        DeviceError
            What was given is impossible, or a call failed; see `copy`.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef kvbm_cuda_plan plan
        cdef kvbm_cuda_options options
        cdef int code
        sources = _addresses("blocks", blocks)
        from_pieces = _addresses("pieces", pieces)
        if operator.index(piece_nbytes) < 1:
            raise wrong_piece_nbytes(piece_nbytes)
        _fill_plan(&plan, sources, from_pieces, piece_nbytes)
        _fill_options(&options, stream, scratch, pinned, num_thread_blocks)
        options.source_on_device = 1
        keys = _hashes(hashes, plan.num_blocks)
        options.hashes = _words(keys)
        options.checksums = <uint64_t*><size_t>int(checksums)  # an address in pinned memory, as all addresses here
        with nogil:
            code = kvbm_cuda_checksum(self.index, &plan, &options, &error)
        _check(code, &error)

    def memcpy(self, Stream stream not None, destination, source, nbytes):
        """Queue one plain copy between any two places; with pageable memory it may wait for the stream.

        Raises
        ------
        DeviceError
            The addresses are wrong, or the call failed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t to = destination, at = source, size = _positive("nbytes", nbytes, 0)
        cdef int code
        stream.check_open()
        with nogil:
            code = kvbm_cuda_memcpy(self.index, to, at, size, stream._handle, &error)
        _check(code, &error)

    def fill(self, Stream stream not None, address, nbytes, seed):
        """Queue the filling of memory with bytes that follow from `seed`: the outputs of splitmix64, little-endian.

        Raises
        ------
        DeviceError
            The launch failed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t at = address, size = _positive("nbytes", nbytes, 0), start = seed
        cdef int code
        stream.check_open()
        with nogil:
            code = kvbm_cuda_fill(self.index, at, size, start, stream._handle, &error)
        _check(code, &error)

    def delay(self, Stream stream not None, seconds):
        """Keep the stream busy for so long, without the host.

        Raises
        ------
        ConfigError
            `seconds` is negative or more than a day.
        DeviceError
            The launch failed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t nanoseconds
        cdef int code
        if not 0 <= seconds <= 86400:
            raise ConfigError(f"a delay is 0 to 86400 seconds, got {seconds}")
        nanoseconds = int(seconds * 1e9)
        stream.check_open()
        with nogil:
            code = kvbm_cuda_delay(self.index, nanoseconds, stream._handle, &error)
        _check(code, &error)

    def read(self, address, nbytes):
        """Give the bytes at an address; waits for the copy, not for streams that still write there.

        Returns
        -------
        ndarray
            (nbytes,) uint8, host.

        Raises
        ------
        DeviceError
            The address is wrong, or the call failed.
        """
        data = np.empty(_positive("nbytes", nbytes, 0), dtype=np.uint8)
        self._copy_now(<uint64_t><size_t>cnp.PyArray_DATA(data), address, data.size)  # unified addressing: one number
        return data

    def write(self, address, data):
        """Put bytes at an address; waits for the copy, not for streams that still use what is there.

        Parameters
        ----------
        address : int
        data : ndarray
            Contiguous, host; any dtype.

        Raises
        ------
        LayoutError
            The array is not contiguous.
        DeviceError
            The address is wrong, or the call failed.
        """
        if not isinstance(data, np.ndarray) or not data.flags.c_contiguous:
            raise wrong_addresses("data", "something that is not a contiguous array")
        self._copy_now(address, <uint64_t><size_t>cnp.PyArray_DATA(data), data.nbytes)  # unified addressing: one number

    def _copy_now(self, destination, source, nbytes):
        default = self.adopt_stream(0)
        self.memcpy(default, destination, source, nbytes)
        default.synchronize()
