"""
Which packets of a video stream begin a frame that is shown (of VP8 and H.264, not every one does), and which hold a
frame that no other refers to (of H.264, HEVC and AV1).
"""


def frame_counter(stream):
    """
    Counts frames without decoding.

    Args:
        stream (`av.VideoStream`).

    Returns:
        A function that says of each packet of the stream, in order, whether it begins a frame that is shown; `None`
        where each does.
    """
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata or b""
    if codec in ("vp8", "libvpx"):
        # A frame that is only referred to: its show_frame bit (RFC 6386, section 9.1) is 0.
        return lambda packet: bool(memoryview(packet)[0] & 0x10)
    if codec == "h264":
        counter = H264FieldCounter(extradata)
        return counter if counter.needed else None
    return None


def disposable_test(stream):
    """
    Tells what need not be decoded for the sake of other frames.

    Args:
        stream (`av.VideoStream`).

    Returns:
        A function that says of each packet that is decoded, in order, whether it holds one frame to which no other
        refers, and nothing else that others need; `None` where this is not known.
    """
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata or b""
    if codec == "h264" and extradata[:1] == b"\x01":
        return _DisposableH264(extradata)
    if codec == "hevc" and extradata[:1] == b"\x01" and len(extradata) > 22:
        return _DisposableHEVC(extradata)
    if codec in ("av1", "libdav1d") and extradata[:1] == b"\x81":
        return _DisposableAV1(extradata)
    return None


class _DisposableH264:
    """Pictures whose nal_ref_idc is 0 (ITU-T H.264, section 7.4.1), where no picture may be a field."""

    def __init__(self, extradata: bytes):
        self.sequence = H264FieldCounter(extradata)

    def __call__(self, packet) -> bool:
        for unit in _units(bytes(memoryview(packet)[:2048]), self.sequence.prefix):
            kind = unit[0] & 31
            if kind in (7, 8):
                self.sequence.read_sequence(unit)
                return False
            if kind in (1, 5):
                return unit[0] & 0x60 == 0 and not self.sequence.needed
        return False


class _DisposableHEVC:
    """Pictures of the highest sub-layer to which none of that sub-layer refers (ITU-T H.265, section 7.4.2.2)."""

    def __init__(self, extradata: bytes):
        self.prefix, self.layers = (extradata[21] & 3) + 1, extradata[21] >> 3 & 7

    def __call__(self, packet) -> bool:
        for unit in _units(bytes(memoryview(packet)[:2048]), self.prefix):
            kind = unit[0] >> 1 & 63
            if kind in (32, 33, 34):
                if kind == 33:
                    self.layers = (unit[2] >> 1 & 7) + 1
                return False
            if kind < 32:
                return kind < 16 and kind % 2 == 0 and unit[1] & 7 == self.layers
        return False


class _DisposableAV1:
    """Temporal units of one frame that is shown and stored nowhere (AV1's specification, sections 5.5 and 5.9)."""

    def __init__(self, extradata: bytes):
        self.options = None
        self(extradata[4:])

    def __call__(self, packet) -> bool:
        units = [(kind, payload) for kind, payload in _obus(memoryview(packet)) if kind in (1, 3, 6)]
        for kind, payload in units:
            if kind == 1:
                self.options = _read_av1_sequence(_Bits(payload, escaped=False))
        if self.options is None or len(units) != 1 or units[0][0] == 1:
            return False
        screen_content, integer_motion, bits_of_order = self.options
        bits = _Bits(units[0][1], escaped=False)
        if bits.read(4) != 0b0011:  # show_existing_frame, frame_type (a predicted one), show_frame
            return False
        error_resilient = bits.read(2) >> 1
        if (bits.read(1) if screen_content == 2 else screen_content) and integer_motion == 2:
            bits.read(1)
        bits.read(1 + bits_of_order)
        if not error_resilient:
            bits.read(3)
        return bits.read(8) == 0  # refresh_frame_flags


def _read_av1_sequence(bits) -> tuple[int, int, int] | None:
    """Whether tools for screen content and whole vectors are used (2: frames say), and the bits of order_hint."""
    bits.read(4)
    if bits.read(1) or bits.read(1):  # a reduced header, timing
        return None
    has_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        if bits.read(12):  # layers
            return None
        if bits.read(5) > 7:
            bits.read(1)
        if has_delay and bits.read(1):
            bits.read(4)
    width, height = bits.read(4) + 1, bits.read(4) + 1
    bits.read(width), bits.read(height)
    if bits.read(1):  # frames are numbered
        return None
    bits.read(7)
    has_order = bits.read(1)
    if has_order:
        bits.read(2)
    screen_content = 2 if bits.read(1) else bits.read(1)
    integer_motion = 2 if not screen_content or bits.read(1) else bits.read(1)
    return screen_content, integer_motion, bits.read(3) + 1 if has_order else 0


def _obus(data):
    """The types of the units of AV1 data, and the first 32 bytes of each payload."""
    position = 0
    while position < len(data):
        header = data[position]
        position += 1 + (header >> 2 & 1)
        if not header & 2:  # it goes to the end
            yield header >> 3 & 15, bytes(data[position : position + 32])
            return
        length = shift = 0
        while position < len(data):
            byte = data[position]
            length |= (byte & 127) << shift
            position, shift = position + 1, shift + 7
            if byte < 128:
                break
        yield header >> 3 & 15, bytes(data[position : position + min(length, 32)])
        position += length


class H264FieldCounter:
    """
    Where the fields of a frame are pictures of their own, each may be a packet: the second of two begins no frame.
    (ITU-T H.264, sections 7.3.2.1.1, 7.3.3 and 7.4.1.2.4.)
    """

    def __init__(self, extradata: bytes):
        self.prefix = (extradata[4] & 3) + 1 if extradata[:1] == b"\x01" and len(extradata) > 6 else None
        self.first_field, self.bits_of_frame_num, self.has_planes = None, None, False
        for unit in self._units_of_avcc(extradata) if self.prefix else _units(extradata, None):
            self.read_sequence(unit)

    @property
    def needed(self) -> bool:
        """Whether a sequence parameter set so far allows fields."""
        return self.bits_of_frame_num is not None

    def __call__(self, packet) -> bool:
        for unit in _units(bytes(memoryview(packet)[:2048]), self.prefix):
            self.read_sequence(unit)
            if unit[0] & 31 in (1, 5):
                return self._begins_frame(unit)
        return True

    def _begins_frame(self, unit: bytes) -> bool:
        bits = _Bits(unit[1:64])
        for _ in range(3):  # first_mb_in_slice, slice_type, pic_parameter_set_id
            bits.exp_golomb()
        if self.has_planes:
            bits.read(2)
        frame_num, is_field = bits.read(self.bits_of_frame_num), bits.read(1)
        field = (frame_num, bits.read(1)) if is_field else None
        if field is not None and self.first_field == (frame_num, 1 - field[1]):
            self.first_field = None
            return False
        self.first_field = field
        return True

    def read_sequence(self, unit: bytes) -> None:
        """Takes from a sequence parameter set what slices are read with; nothing if it allows no fields."""
        if not unit or unit[0] & 31 != 7:
            return
        bits = _Bits(unit[4:])
        bits.exp_golomb()
        has_planes = False
        if unit[1] in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
            chroma = bits.exp_golomb()
            has_planes = chroma == 3 and bool(bits.read(1))
            bits.exp_golomb(), bits.exp_golomb(), bits.read(1)
            if bits.read(1):  # scaling matrices
                for i in range(8 if chroma != 3 else 12):
                    if bits.read(1):
                        bits.skip_scaling_list(16 if i < 6 else 64)
        bits_of_frame_num = bits.exp_golomb() + 4
        order = bits.exp_golomb()
        if order == 0:
            bits.exp_golomb()
        elif order == 1:
            bits.read(1), bits.exp_golomb(), bits.exp_golomb()
            for _ in range(min(bits.exp_golomb(), 255)):
                bits.exp_golomb()
        bits.exp_golomb(), bits.read(1), bits.exp_golomb(), bits.exp_golomb()
        if not bits.read(1):  # frame_mbs_only_flag
            self.bits_of_frame_num, self.has_planes = bits_of_frame_num, has_planes

    def _units_of_avcc(self, extradata: bytes):
        position = 6
        for _ in range(extradata[5] & 31):
            length = int.from_bytes(extradata[position : position + 2], "big")
            yield extradata[position + 2 : position + 2 + length]
            position += 2 + length


def _units(data: bytes, prefix: int | None):
    """The NAL units of a packet; `prefix`: the bytes of their lengths, `None` where start codes part them."""
    if prefix is None:
        yield from (unit for unit in data.split(b"\0\0\1")[1:] if unit)
        return
    position = 0
    while position + prefix < len(data):
        length = int.from_bytes(data[position : position + prefix], "big")
        position += prefix
        if length:
            yield data[position : position + length]
        position += length


class _Bits:
    """Reads bits from the front of a unit, and zeros behind its end; those of H.264 and HEVC escape zeros."""

    def __init__(self, data: bytes, escaped: bool = True):
        data = data.replace(b"\0\0\3", b"\0\0") if escaped else data
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        self.left -= count
        return (self.value >> self.left if self.left >= 0 else self.value << -self.left) & ((1 << count) - 1)

    def exp_golomb(self) -> int:
        zeros = 0
        while zeros < 32 and not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)

    def skip_scaling_list(self, size: int) -> None:
        last, scale = 8, 8
        for _ in range(size):
            if scale:
                code = self.exp_golomb()
                scale = (last + (code + 1) // 2 * (1 if code % 2 else -1)) % 256
            last = scale or last


__all__ = ["H264FieldCounter", "disposable_test", "frame_counter"]
