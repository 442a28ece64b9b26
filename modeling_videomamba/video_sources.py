"""Where a video file comes from: a path, URL, bytes or open file in, a path or bytes out, and what is said of them."""

import asyncio
import io
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor


# Code that travels with a checkpoint must import inside `try` what may be absent.
try:
    from huggingface_hub.utils import httpx
except ImportError:
    import httpx
try:
    import fsspec
except ImportError:
    fsspec = None


# What is refused, so that a server cannot take all memory or all time; docs/limits.md lists it. Environment variables
# of the same names, or assignments to these, raise it.
VIDEO_MAX_DOWNLOAD_BYTES = int(os.environ.get("VIDEO_MAX_DOWNLOAD_BYTES", 2**31))
VIDEO_MAX_DOWNLOAD_SECONDS = float(os.environ.get("VIDEO_MAX_DOWNLOAD_SECONDS", 900))
DOWNLOAD_TIMEOUT = 30  # seconds without an answer or without a byte


def is_decoder(value) -> bool:
    """Whether it is a decoder of a video, as torchcodec's `VideoDecoder` (and no array of frames)."""
    return hasattr(value, "get_frames_at") and hasattr(value, "metadata")


def is_source(value) -> bool:
    """Whether it is a file in a form that `decode_video` takes, or a decoder of one: no decoded frames."""
    is_row = isinstance(value, Mapping) and ("path" in value or "bytes" in value)
    return (
        isinstance(value, str | os.PathLike | bytes | bytearray)
        or hasattr(value, "read")
        or is_row
        or is_decoder(value)
    )


def open_source(file) -> tuple[str | bytes, str]:
    """A path, or the bytes of a file; and its name for messages. `file`: a path, URL, bytes, open file, or a row."""
    if isinstance(file, Mapping):
        source, name = _open_row(file)
    elif isinstance(file, bytes | bytearray):
        source, name = bytes(file), f"<{len(file)} bytes>"
    elif hasattr(file, "read"):
        name = str(getattr(file, "name", f"<{type(file).__name__}>"))
        source = _read_open_file(file, name)
    elif isinstance(file, str) and file.lower().startswith(("http://", "https://")):
        source, name = _download(file), file
    else:
        source = name = os.fspath(file)
        if os.path.isdir(source):
            raise IsADirectoryError(f"{name} is a folder, but a video file was expected.")
        if not os.path.exists(source):
            raise FileNotFoundError(f"There is no file {name} (looked in {os.getcwd()}).")
        if not os.path.isfile(source):
            raise ValueError(f"{name} is a device or a pipe, not a file. Copy the video to a file first.")
    if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
        raise ValueError(f"{name} is empty (0 bytes). Copy or download the video again.")
    return source, name


def _open_row(row: Mapping) -> tuple[str | bytes, str]:
    """A row of a video column of datasets, not decoded: {"path": ..., "bytes": ...}, one of which may be None."""
    path, data = row.get("path"), row.get("bytes")
    if path is None and data is None:
        raise ValueError(f"A row {dict(row)} names no video: its 'path' or its 'bytes' must be there.")
    if data is not None:
        return open_source(data)[0], str(path) if path else f"<{len(data)} bytes>"
    is_local = "://" not in str(path) or str(path).lower().startswith(("http://", "https://"))
    if is_local or fsspec is None:
        return open_source(path)
    with fsspec.open(path, "rb") as file:  # of a streamed data set: hf://, or a file in an archive
        return open_source(_read_open_file(file, path))[0], path


def _read_open_file(file, name: str) -> bytes:
    try:
        mode = os.fstat(file.fileno()).st_mode
    except (AttributeError, OSError, TypeError, ValueError):  # one that lives in memory, or in another library
        mode = stat.S_IFREG
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise ValueError(f"{name} is a device, not a file. Copy the video to a file first.")
    if file.seekable():
        file.seek(0)
    source = file.read(VIDEO_MAX_DOWNLOAD_BYTES + 1)
    if not isinstance(source, bytes):
        raise ValueError(f"{name} was opened in text mode; open it with mode 'rb'.")
    if len(source) > VIDEO_MAX_DOWNLOAD_BYTES:
        raise ValueError(
            f"{name} has more than {VIDEO_MAX_DOWNLOAD_BYTES} bytes, and an open file is read into memory. Give its "
            "path, or raise VIDEO_MAX_DOWNLOAD_BYTES."
        )
    return source


def _download(url: str) -> bytes:
    # A thread with an event loop of its own: the deadline then holds whatever the server does, byte by byte or not at
    # all, and a notebook, whose own loop is running, can download as well.
    loop = asyncio.new_event_loop()
    task = loop.create_task(asyncio.wait_for(_stream(url), VIDEO_MAX_DOWNLOAD_SECONDS))
    try:
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(loop.run_until_complete, task)
            try:
                return future.result()
            except BaseException:  # Ctrl-C, too, ends the download
                if not future.done():
                    loop.call_soon_threadsafe(task.cancel)
                raise
    except TimeoutError as error:
        raise _endless(url) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise ConnectionError(f"{url} could not be downloaded ({problem}). Check address and network.") from error
    finally:
        loop.close()


async def _stream(url: str) -> bytes:
    data = io.BytesIO()
    headers = {"Accept-Encoding": "identity"}  # a few bytes of gzip can grow to gigabytes, and video does not shrink
    async with (
        httpx.AsyncClient(follow_redirects=True, timeout=DOWNLOAD_TIMEOUT) as client,
        client.stream("GET", url, headers=headers) as response,
    ):
        response.raise_for_status()
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise ConnectionError(
                f"{url} was sent with the content encoding {encoding!r}, although none was asked for. Download and "
                "unpack it yourself, and give the path."
            )
        if int(response.headers.get("Content-Length", 0)) > VIDEO_MAX_DOWNLOAD_BYTES:
            raise _endless(url)
        async for chunk in response.aiter_raw():
            data.write(chunk)
            if data.tell() > VIDEO_MAX_DOWNLOAD_BYTES:
                raise _endless(url)
    return data.getvalue()


def _endless(url: str) -> ConnectionError:
    return ConnectionError(
        f"{url} did not end within {VIDEO_MAX_DOWNLOAD_BYTES} bytes and {VIDEO_MAX_DOWNLOAD_SECONDS:g} seconds. If it "
        "is a live stream, save the part that you need and give the path; else raise VIDEO_MAX_DOWNLOAD_BYTES or "
        "VIDEO_MAX_DOWNLOAD_SECONDS."
    )


class _QuietSeek:
    """A seek to where no file can be, which damaged files ask for, fails without an exception: PyAV would print it."""

    def seek(self, offset, whence=0):
        try:
            return super().seek(offset, whence)
        except (OSError, ValueError):
            return -1


class _File(_QuietSeek, io.FileIO):
    pass


class _Bytes(_QuietSeek, io.BytesIO):
    pass


def as_file(source: str | bytes):
    return _Bytes(source) if isinstance(source, bytes) else _File(source)


def first_line(error) -> str:
    """What went wrong, in one line: libav's errors repeat a number and a name, torchcodec's have thirty lines."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().split("\n")[0]
