"""Which packets of a video stream begin a frame that is shown: of VP8 and H.264, not every one does."""


def frame_counter(stream):
    """
    Counts frames without decoding.

    Args:
        stream (`av.VideoStream`).

    Returns:
        A function that says of each packet of the stream, in order, whether it begins a frame that is shown.
    """
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata or b""
    if codec in ("vp8", "libvpx"):
        # A frame that is only referred to: its show_frame bit (RFC 6386, section 9.1) is 0.
        return lambda packet: bool(memoryview(packet)[0] & 0x10)
    if codec == "h264":
        return H264FieldCounter(extradata)
    return lambda packet: True


class H264FieldCounter:
    """
    Where the fields of a frame are pictures of their own, each may be a packet: the second of two begins no frame.
    (ITU-T H.264, sections 7.3.2.1.1, 7.3.3 and 7.4.1.2.4.)
    """

    def __init__(self, extradata: bytes):
        self.prefix = (extradata[4] & 3) + 1 if extradata[:1] == b"\x01" and len(extradata) > 6 else None
        self.first_field, self.bits_of_frame_num, self.has_planes = None, None, False
        for unit in self._units_of_avcc(extradata) if self.prefix else self._units(extradata):
            self._read_sequence(unit)
        self.needed = self.bits_of_frame_num is not None

    def __call__(self, packet) -> bool:
        if not self.needed:
            return True
        for unit in self._units(bytes(memoryview(packet)[:2048])):
            self._read_sequence(unit)
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

    def _read_sequence(self, unit: bytes) -> None:
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

    def _units(self, data: bytes):
        """The NAL units of a packet."""
        if self.prefix is None:
            yield from (unit for unit in data.split(b"\0\0\1")[1:] if unit)
            return
        position = 0
        while position + self.prefix < len(data):
            length = int.from_bytes(data[position : position + self.prefix], "big")
            position += self.prefix
            if length:
                yield data[position : position + length]
            position += length

    def _units_of_avcc(self, extradata: bytes):
        position = 6
        for _ in range(extradata[5] & 31):
            length = int.from_bytes(extradata[position : position + 2], "big")
            yield extradata[position + 2 : position + 2 + length]
            position += 2 + length


class _Bits:
    """Reads bits from the front of a NAL unit, and zeros behind its end."""

    def __init__(self, data: bytes):
        data = data.replace(b"\0\0\3", b"\0\0")
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


__all__ = ["H264FieldCounter", "frame_counter"]
