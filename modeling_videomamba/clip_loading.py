"""
Many clips from files to results: processes decode, and the device does not wait for the host.

A worker of a `DataLoader` decodes a clip and leaves its frames, as bytes, in a slot of shared memory; only their place
goes through its pipe. A GPU copies the page-locked slot, resizes and normalises on a stream of its own, beside the
model on the caller's. `predict_clips` fetches results while the next batches run.
"""

import contextlib
import mmap
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.heap import BufferWrapper
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from .video_decoding import decode_video


logger = logging.get_logger(__name__)

SLOT_BYTES = 2**24  # of a clip that is handed over as it was decoded: 16 frames of up to 720 x 480 pixels, say
PREFETCH = 2  # clips that each worker has been given
SPARE_SLOTS = 4  # from which the GPU may still copy while the workers fill the others
TOGETHER = 4  # clips of one size that a device resizes at once


@dataclass
class ClipBatch:
    """One batch of a [`ClipLoader`]."""

    index: int  # the batch's own number, from 0
    clips: list[int] = field(default_factory=list)  # the numbers of those that could be read
    pixel_values: torch.Tensor | None = None  # (B, T, C, H, W) float32 of these; None if there are none
    errors: dict[int, str] = field(default_factory=dict)  # why each of the others could not be read, by its number
    seconds: float = 0.0  # that the workers took for all of them, in sum


class ClipLoader:
    """
    Batches of clips from files. Each iteration goes through all of them.

    A batch consists of the same clips in every run. Batches come when they are complete, in about their order: a clip
    that takes long holds up its own batch, and that of the clip that waits for the same worker, and no other. Clips
    that cannot be read are left out of their batch, with the reason. Pixels are those that the processor makes of the
    file; where a GPU resizes, some differ by one level of 255, and whether pictures repeat (`sampling_fps`) is seen in
    frames as they were decoded.

    Memory is bounded: `2 * num_workers + 5` slots, and the clips of batches that are not complete, resized but for up
    to four.

    Args:
        clips: paths, URLs, bytes of files, or rows of datasets: a list, or a column or other object with `len` that a
            worker asks for one by its number.
        processor ([`VideoMambaVideoProcessor`]): samples, resizes and normalises, with the values saved in it.
        batch_size: clips in a batch.
        batch_sampler: the numbers of the clips of each batch, instead.
        num_workers: processes that decode, each with one thread. 0: this process does, with all threads.
        device: where the pixels are to be.
        slot_bytes: the frames of clips of at most this size are resized on the device, those of larger ones by the
            worker that decodes them. By default 16 MiB on a GPU, and 0 on a CPU.
        multiprocessing_context: how workers start: `"fork"`, `"spawn"`, `"forkserver"` or `None`, Python's default.
    """

    def __init__(
        self,
        clips: Sequence,
        processor,
        batch_size: int = 8,
        *,
        batch_sampler: Sequence[Sequence[int]] | None = None,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        slot_bytes: int | None = None,
        multiprocessing_context: str | None = None,
    ):
        self.num_workers, self.device = num_workers, torch.device(device)
        if slot_bytes is None:
            slot_bytes = SLOT_BYTES if self.device.type == "cuda" else 0
        if batch_size < 1 or num_workers < 0 or slot_bytes < 0:
            raise ValueError(
                f"`batch_size` is {batch_size}, `num_workers` {num_workers} and `slot_bytes` {slot_bytes}, but they "
                "must be at least 1, 0 and 0."
            )
        if batch_sampler is None:
            batch_sampler = [range(i, min(i + batch_size, len(clips))) for i in range(0, len(clips), batch_size)]
        self.clips, self.processor, self.batches, self.slot_bytes = clips, processor, batch_sampler, slot_bytes
        self.context = multiprocessing.get_context(multiprocessing_context)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ClipBatch]:
        crop = self.processor.crop_size if self.processor.do_center_crop else {"height": 0, "width": 0}
        resized = (self.processor.num_frames or 0) * 3 * crop["height"] * crop["width"]
        slots = PREFETCH * self.num_workers + 1 + SPARE_SLOTS
        ring = _Ring(slots, max(1, resized, self.slot_bytes))
        workers = DataLoader(
            _Reader(self.clips, self.processor, ring, self.slot_bytes),
            batch_size=None,
            sampler=_tasks(self.batches, ring),
            collate_fn=tuple,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH if self.num_workers else None,
            in_order=False,
            multiprocessing_context=self.context if self.num_workers else None,
        )
        with torch.device("cpu"):  # in the workers, too, whatever the default is here
            arrivals = iter(workers)  # starts the processes
        device = _Device(self.device, self.processor, ring)
        begun: dict[int, tuple[ClipBatch, dict[int, _Clip | None]]] = {}  # by place; None: it cannot be read
        try:
            for (index, place, slot), found, seconds in arrivals:
                batch, clips = begun.setdefault(index, (ClipBatch(index), {}))
                numbers, clips[place], copied = self.batches[index], None, None
                batch.seconds += seconds
                if isinstance(found, str):
                    batch.errors[numbers[place]] = found
                else:
                    clips[place], copied = device.take(slot, found)
                ring.free.append((slot, copied))
                if len(clips) == len(numbers):
                    del begun[index]
                    places = [place for place in sorted(clips) if clips[place] is not None]
                    batch.clips = [numbers[place] for place in places]
                    if places:
                        batch.pixel_values = device.finish([clips.pop(place) for place in places])
                    yield batch
        finally:
            del arrivals
            device.close()


class _Frames(NamedTuple):
    """Frames that a worker left in its slot, channels last; or, if they did not fit, the frames themselves."""

    shape: tuple[int, ...]  # (T, H, W, C)
    is_resized: bool
    too_large: torch.Tensor | None = None


class _Ring:
    """
    Slots of shared memory, as bytes: (slots, size); and those that are free, once an event has happened.

    (The memory is that of arrays of `multiprocessing`, which is shared however processes start, and lies in a file
    where /dev/shm is too small. An array would be filled with zeros first, half a second for 500 MB. Pages are taken
    at their first use; but where they may run out, all at once: without, a worker would die of a bus error.)
    """

    def __init__(self, count: int, size: int):
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE  # two slots never share a page that is locked
        try:
            self.memory = _reserved(count * self.size + mmap.PAGESIZE)
        except OSError:  # another process was faster; now `multiprocessing` sees that too little is free
            self.memory = _reserved(count * self.size + mmap.PAGESIZE)
        whole = torch.frombuffer(self.memory.create_memoryview(), dtype=torch.uint8)
        self.start = -whole.data_ptr() % mmap.PAGESIZE
        self.bytes = whole[self.start :][: count * self.size].view(count, self.size)
        self.free: deque = deque((slot, None) for slot in range(count))

    def take(self) -> int:
        slot, copied = self.free.popleft()
        if copied is not None:
            copied.synchronize()
        return slot

    def read(self, slot: int, found: _Frames) -> torch.Tensor:
        """(T, C, H, W), a view."""
        if found.too_large is not None:
            return found.too_large
        count = torch.Size(found.shape).numel()
        return self.bytes[slot, :count].view(found.shape).permute(0, 3, 1, 2)


def _reserved(size: int) -> BufferWrapper:
    """So many bytes, which nobody else may take if 16 loaders like this one would use up what is free."""
    memory = BufferWrapper(size)
    arena = memory._state[0][0]
    if hasattr(os, "posix_fallocate"):
        free = os.fstatvfs(arena.fd)
        if free.f_bavail * free.f_frsize < 16 * size:
            os.posix_fallocate(arena.fd, 0, arena.size)
    return memory


def _tasks(batches, ring: _Ring) -> Iterator[tuple]:
    """What the workers are told: which clip, its batch and place there, and the slot for its frames."""
    for index, numbers in enumerate(batches):
        for place, number in enumerate(numbers):
            yield number, (index, place, ring.take())


class _Reader(Dataset):
    """Decodes a clip, in a worker, and resizes its frames if they would take more than `slot_bytes`."""

    def __init__(self, clips, processor, ring: _Ring, slot_bytes: int):
        self.clips, self.processor, self.slot_bytes = clips, processor, slot_bytes
        self.memory, self.size, self.start = ring.memory, ring.size, ring.start

    def __getitem__(self, task) -> tuple:
        """The batch, place and slot; what was read, as `_Frames`, or the reason why not; and the seconds it took."""
        number, where = task
        start = time.perf_counter()
        try:
            found = self.read(self.clips[number], self.start + self.size * where[-1])
        except Exception as error:  # whatever is wrong with one clip must not stop the others
            found = " ".join(f"{error}".split()) or type(error).__name__
        return where, found, time.perf_counter() - start

    def read(self, file, offset: int) -> _Frames:
        processor, count, is_resized, fits = self.processor, 0, False, False
        resize_and_crop = processor.frame_transform()

        def sample(metadata):
            nonlocal count
            indices = processor.sample_frames(metadata)
            count = len(indices)
            return indices

        def shrink(frame):
            nonlocal is_resized
            is_resized = count * frame.nbytes > self.slot_bytes
            return resize_and_crop(frame) if is_resized else frame

        def empty(shape):
            """In the slot, if it has room: not of a processor that does not crop, or whose number of frames varies."""
            nonlocal fits
            size = torch.Size(shape).numel()
            fits = size <= self.size
            if not fits:
                return torch.empty(shape, dtype=torch.uint8)
            memory = self.memory.create_memoryview()
            return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(shape)

        start, stop = processor.start_seconds, processor.stop_seconds
        section = None if start is None and stop is None else (start or 0, stop)
        frames, _ = decode_video(file, sample, processor.decoder, shrink, section, empty)
        return _Frames(tuple(frames.permute(0, 2, 3, 1).shape), is_resized, None if fits else frames)


@dataclass
class _Clip:
    """Frames (T, C, H, W) uint8 on the device, perhaps not resized yet."""

    frames: torch.Tensor


class _Device:
    """Copies frames out of the ring and makes `pixel_values` of them: on a GPU, on a stream of its own."""

    def __init__(self, device: torch.device, processor, ring: _Ring):
        self.device, self.processor, self.ring = device, processor, ring
        self.resize_and_crop = processor.frame_transform(device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.locked: dict[int, bool] = {}  # of each slot that has been used: whether its memory is page-locked
        self.large: list[_Clip] = []  # clips that are to be resized

    def take(self, slot: int, found: _Frames) -> tuple:
        """The clip in a slot, on the device; and the event that frees the slot."""
        if self.stream is not None and slot not in self.locked:
            self.lock(slot)
        with torch.cuda.stream(self.stream):  # of a CPU, None: nothing
            clip = _Clip(self.ring.read(slot, found).to(self.device, non_blocking=True, copy=True))
            copied = self.stream and self.stream.record_event()
            if not found.is_resized:
                self.large.append(clip)
            if len(self.large) == TOGETHER:
                self.resize()
        return clip, copied

    def resize(self) -> None:
        """Clips of one size at once: for each alone, the host takes longer than the GPU."""
        by_shape: dict[torch.Size, list[_Clip]] = {}
        for clip in self.large:
            by_shape.setdefault(clip.frames.shape, []).append(clip)
        for shape, clips in by_shape.items():
            resized = self.resize_and_crop(torch.cat([clip.frames for clip in clips]))
            for clip, frames in zip(clips, resized.split(shape[0]), strict=True):
                clip.frames = frames
        self.large.clear()

    def lock(self, slot: int) -> None:
        """Of one slot at its first use, while workers fill others: of all at the beginning, they would wait for it."""
        memory = self.ring.bytes[slot]
        self.locked[slot] = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 1)) == 0
        if not self.locked[slot]:
            logger.warning_once(f"{memory.nbytes} bytes could not be page-locked: the GPU waits for each such copy.")
            with contextlib.suppress(RuntimeError):  # the next kernel would report it as its own error
                torch.zeros(1, device=self.device).add_(1)

    def finish(self, clips: list[_Clip]) -> torch.Tensor:
        """`pixel_values` that the caller's stream may use."""
        options = {"do_sample_frames": False, "do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        options |= {"start_seconds": None, "stop_seconds": None}  # of files, which these were
        options |= {"input_data_format": "channels_first", "device": self.device}
        with torch.cuda.stream(self.stream):
            self.resize()
            pixel_values = self.processor([clip.frames for clip in clips], **options)["pixel_values"]
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            pixel_values.record_stream(current)
        return pixel_values

    def close(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
            for slot in (slot for slot, is_locked in self.locked.items() if is_locked):
                torch.cuda.cudart().cudaHostUnregister(self.ring.bytes[slot].data_ptr())


def predict_clips(
    function: Callable[[torch.Tensor], dict[str, torch.Tensor]], batches: Iterable[ClipBatch], in_flight: int = 2
) -> Iterator[tuple[ClipBatch, dict[str, torch.Tensor]]]:
    """
    Runs a model on batches and fetches its results, while the device goes on with the next ones.

    Args:
        function: takes `pixel_values` and returns tensors by name.
        batches: a [`ClipLoader`].
        in_flight: batches that may have been given to the device before the results of the first are waited for.

    Yields:
        Each batch, without its `pixel_values`, and what the function returned for it, on the CPU; nothing where no
        clip could be read.
    """
    running: deque = deque()
    for batch in batches:
        pixel_values, batch.pixel_values = batch.pixel_values, None
        with torch.inference_mode():
            running.append((batch, *_fetch({} if pixel_values is None else function(pixel_values))))
        del pixel_values
        while running and (len(running) > in_flight or running[0][-1] is None or running[0][-1].query()):
            yield _result(*running.popleft())
    while running:
        yield _result(*running.popleft())


def _fetch(outputs: dict[str, torch.Tensor]) -> tuple:
    """Begins to copy tensors to page-locked memory. Returns the copies, and the event after which they are whole."""
    copies, stream = dict(outputs), None
    for name, tensor in outputs.items():
        if tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device)
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            copies[name].copy_(tensor, non_blocking=True)
    return copies, stream and stream.record_event()


def _result(batch: ClipBatch, outputs: dict[str, torch.Tensor], copied) -> tuple:
    if copied is not None:
        copied.synchronize()
        outputs = {name: tensor.clone() for name, tensor in outputs.items()}  # the page-locked memory is used again
    return batch, outputs


__all__ = ["ClipBatch", "ClipLoader", "predict_clips"]
