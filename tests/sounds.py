"""Compressed recordings as bytes, made in code: by libsndfile, or by FFmpeg where libsndfile has no encoder."""

import io

import av
import numpy as np
import soundfile


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def encoded(samples, rate=16_000, format="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def by_ffmpeg(samples, rate, format, codec, **options):
    """A file of one stream of mono sound; `options` are the container's and the codec's."""
    file = io.BytesIO()
    with av.open(file, "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono", options=options)
        resampler = av.AudioResampler(stream.format, stream.layout, rate, stream.frame_size or 1_024)
        frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
        frame.sample_rate = rate
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


def with_picture(data, size=300_000):
    """An MP3 file with a cover picture in front."""
    picture = b"\0image/jpeg\0\3\0" + b"\xff\xd8\xff" + bytes(size)
    frame = b"APIC" + len(picture).to_bytes(4, "big") + b"\0\0" + picture
    length = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + length + frame + data


def of_unknown_length(flac):
    """A FLAC file as an encoder writes it to a pipe: the 36 bits of its length, and its MD5, are 0."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + bytes(16) + flac[42:]
