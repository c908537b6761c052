"""Compressed files to blocks of float samples, by FFmpeg's libraries through PyAV.

FFmpeg decodes what is there to its end: MP3 without a header, FLAC of unknown length, chained Ogg, joined files. It
also opens playlists and files that name other files, and pictures and films; none of that is wanted here. Only the
formats and codecs below are opened, and only the given file is read.
"""

from __future__ import annotations

import fractions
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from harmonic.errors import Unreadable, one_line
from harmonic.sound.bombs import MAX_RATIO, is_bomb
from harmonic.sound.header import Head, check_missing, mp3_samples
from harmonic.sound.interrupts import interrupts_held

_FORMATS = (
    "mp3 flac ogg aac mov,mp4,m4a,3gp,3g2,mj2 matroska,webm asf amr wv ape tta tak mpc mpc8 wav w64 aiff au caf voc "
    "nistsphere iff ircam"
).split()
_CODECS = (
    "mp1float mp1 mp2float mp2 mp3float mp3 flac vorbis opus speex aac alac ac3 eac3 amrnb amrwb wmav1 wmav2 wmapro "
    "wmalossless wmavoice wavpack ape tta tak mpc7 mpc8 adpcm_ms adpcm_ima_wav adpcm_ima_qt adpcm_yamaha adpcm_swf "
    "g722 g726 g726le gsm gsm_ms shorten pcm_alaw pcm_mulaw pcm_u8 pcm_s8 pcm_s16le pcm_s16be pcm_s24le pcm_s24be "
    "pcm_s32le pcm_s32be pcm_f32le pcm_f32be pcm_f64le pcm_f64be 8svx_exp 8svx_fib"
).split()
# Formats that store their length; of the others FFmpeg estimates it from the size and the bit rate.
_STORED = ("flac", "ogg", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "asf", "wv", "ape", "tta", "tak", "mpc", "mpc8")
_DELAY = 3 * 1_152  # samples; what encoders put before and after the sound, by which lengths differ
_OGG_BEGIN = re.compile(rb"OggS\0[\2\3\6\7]")  # a page that begins a stream
_SCALES = {"u1": 1 / 128, "i2": 1 / 32_768, "i4": 1 / 2_147_483_648}


class _Bytes:
    """The bytes of a file and nothing else of it: FFmpeg would take the name of a file for a hint at its format."""

    def __init__(self, file: BinaryIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


class _OtherFile(Exception):
    """A recording names another file."""


def _refuse(url: str, *_: object) -> None:
    raise _OtherFile("it names another file, which is not opened")


def open_ffmpeg(file: BinaryIO, head: Head, block_values: int, notes: list[str]) -> tuple[int, Iterator[np.ndarray]]:
    """The sample rate in Hz, and float32 blocks [time, channels] of a file's first audio stream.

    Args:
      file: seekable; read through its own methods alone.
      head: of the file.
      block_values: samples times channels of a block, about.
      notes: what is not as it should be is added while the blocks are taken.

    Raises:
      Unreadable: not audio that FFmpeg reads, damaged or cut short (now, or while the blocks are taken).
    """
    import av  # takes a tenth of a second, and most recordings are plain WAV files

    file.seek(0)
    options = {"format_whitelist": ",".join(_FORMATS), "codec_whitelist": ",".join(_CODECS)}
    try:
        with interrupts_held():
            # Tags may be in any encoding.
            container: Any = av.open(_Bytes(file), options=options, io_open=_refuse, metadata_errors="replace")
    except (av.FFmpegError, ValueError, _OtherFile) as error:
        raise Unreadable(f"is not audio that can be read: {_reason(error)}") from error
    decoder = _Decoder(container, head.size, block_values, notes)
    try:
        decoder.open(file, head)
        first = decoder.fill()
    except BaseException:
        container.close()
        raise
    return decoder.rate, decoder.blocks(first)


class _Decoder:
    """Decodes the first audio stream of an open container."""

    def __init__(self, container: Any, size: int, block_values: int, notes: list[str]):
        self._container, self._size, self._block_values, self._notes = container, size, block_values, notes
        self.rate = self._samples = self._packets = self._damaged = 0
        self._limit = 0
        self._changed = False

    def open(self, file: BinaryIO, head: Head) -> None:
        streams = self._container.streams.audio
        stream = next((s for s in streams if s.codec_context is not None and s.codec_context.name in _CODECS), None)
        if stream is None:
            raise Unreadable("is not audio that can be read: it holds no sound of a known kind")
        if len(streams) > 1:
            self._notes.append(f"holds {len(streams)} streams of sound, of which one is read")
        self._codec = stream.codec_context
        self._codec.thread_count = 1  # so that a worker for each core is not many for each
        if self._codec.name == "flac":
            self._codec.options = {"err_detect": "crccheck+explode"}  # else damaged frames would be noise
        self._claimed = _claimed_samples(file, head, self._container, stream)
        if (
            self._container.format.name == "ogg"
            and head.size <= len(head.data)
            and len(_OGG_BEGIN.findall(head.data)) == 1
        ):
            self._limit = self._claimed  # FFmpeg does not cut the last block of a file of a single page
        self._demuxed = self._container.demux(stream)

    def fill(self) -> list[np.ndarray]:
        """The next frames, about a block of them; none at the end."""
        import av

        held: list[np.ndarray] = []
        values = 0
        with interrupts_held():  # a KeyboardInterrupt in the middle of a callback would end the file
            while values < self._block_values and not self._changed:
                try:
                    packet = next(self._demuxed, None)
                except av.error.PatchWelcomeError:  # the next of joined Ogg streams is of another kind
                    self._changed = True
                    break
                except (av.FFmpegError, _OtherFile) as error:
                    raise Unreadable(f"cannot be decoded after {self._samples} samples: {_reason(error)}") from error
                if packet is None:
                    break
                self._packets += 1
                try:
                    frames = packet.decode()
                except av.FFmpegError:  # also what is between joined files, such as tags
                    self._damaged += 1
                    continue
                for frame in frames:
                    self.rate = self.rate or frame.sample_rate
                    if frame.sample_rate != self.rate:
                        self._changed = True
                        break
                    held.append(_float_samples(frame))
                    values += held[-1].size
        return held

    def blocks(self, held: list[np.ndarray]) -> Iterator[np.ndarray]:
        with self._container:
            while held:
                same = len({part.shape[1] for part in held}) == 1
                for block in [np.concatenate(held)] if same else held:
                    block = block[: max(self._limit - self._samples, 0)] if self._limit else block
                    self._samples += len(block)
                    if is_bomb(2 * self._samples * block.shape[1], self._size):
                        raise Unreadable(f"holds more than {MAX_RATIO:,} times its bytes: that is a decompression bomb")
                    # In one order in memory, so that the mean over channels does not depend on where blocks are cut.
                    yield np.ascontiguousarray(block)
                held = self.fill()
        self._judge()

    def _judge(self) -> None:
        """Says at the end what was not there, or could not be read."""
        found, damaged, packets, claimed = self._samples, self._damaged, self._packets, self._claimed
        missing = 0 if self._changed else claimed - found
        # ASF counts the time before the sound starts.
        slack = 0 if self._codec.name == "flac" else self.rate if self._container.format.name == "asf" else _DELAY
        if missing > slack:
            check_missing(missing, claimed, self.rate, f"{found} samples of {claimed}")
            self._notes.append(f"holds {found} samples of the {claimed} that its header counts")
        if 100 * damaged > packets or (damaged and not found):
            raise Unreadable(f"cannot be decoded: {damaged} of its {packets} packets are damaged")
        if damaged:
            self._notes.append(f"has {damaged} packets of {packets} that cannot be decoded and are left out")
        if self._changed:
            self._notes.append(f"changes its sample rate or codec after {found} samples, and is read up to there")


def _claimed_samples(file: BinaryIO, head: Head, container: Any, stream: Any) -> int:
    """How many samples the file says that it has; 0 if it does not."""
    name, rate = container.format.name, stream.rate or 0
    if name == "mp3":
        position = file.tell()
        samples = mp3_samples(file, head.data)
        file.seek(position)
        return samples
    if name in _STORED:
        if stream.duration is not None:
            return int(stream.duration * stream.time_base * rate)
        if container.duration is not None and len(container.streams) == 1:
            return int(fractions.Fraction(container.duration, 1_000_000) * rate)
    return 0


def _float_samples(frame: Any) -> np.ndarray:
    """float32 [time, channels] in [-1, 1] of a decoded frame."""
    try:
        raw = frame.to_ndarray()
    except ValueError as error:
        raise Unreadable(f"cannot be decoded: {one_line(error)}") from error
    raw = raw.T if frame.format.is_planar else raw.reshape(frame.samples, -1)
    kind = raw.dtype.str[1:]
    if kind == "u1":
        return (raw.astype(np.float32) - np.float32(128)) * np.float32(_SCALES[kind])
    # Whole numbers of 32 bits are rounded once, as libsndfile rounds them.
    return raw.astype(np.float32) * np.float32(_SCALES[kind]) if kind in _SCALES else raw.astype(np.float32)


def _reason(error: BaseException) -> str:
    return one_line(getattr(error, "strerror", None) or error)
