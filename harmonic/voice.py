"""From tokens to sound and back: prompts, generated sound, WAV files and streams. Every command generates through it.

    voice = Voice(trained.model, trained.params, Codec.of(run.manifest))
    prompt = voice.codec.prompt("beginning.wav")                # tokens [time, 1]
    for piece in voice.pieces(16_000 * 60, prompt=prompt):      # as it is made, the prompt first
        play(piece.sound[0])

What a stream sounds like depends on the weights, the seed and the stream's number, not on how it is handed out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile

from harmonic import audio, files, loudness
from harmonic.errors import UserError
from harmonic.generate import LONGEST, generate
from harmonic.metrics import Progress
from harmonic.models.base import Model
from harmonic.records import Manifest
from harmonic.sound.whole import read_sound

_OPEN_FILES = 256  # streams that `Voice.write` makes side by side: systems allow some 1,000 open files


class Scale(NamedTuple):
    """A recording's samples are multiplied by `factor`, and [low, high] is cut into levels."""

    factor: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Codec:
    """A data set's way from sound to tokens, and back.

    Attributes:
      encoding, num_levels: of the quantiser; see `harmonic.audio`.
      sample_rate: Hz.
      loudness: LUFS that its recordings were brought to, all on one scale; None where each was scaled to its own
        minimum and maximum.
      trim_silence: silence at both ends that was cut off, in dB below the loudest frame; None where it was left.
      published: whether recordings without sound were scaled to their own extremes, as the published data sets do.
    """

    encoding: str
    num_levels: int
    sample_rate: int
    loudness: float | None = None
    trim_silence: float | None = None
    published: bool = False

    @classmethod
    def of(cls, manifest: Manifest) -> Codec:
        """The codec of a prepared data set."""
        m = manifest
        published = m.dataset in audio.PUBLISHED
        return cls(m.encoding, m.num_levels, m.sample_rate, m.loudness, m.trim_silence, published)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [..., time] in [-1, 1] of tokens [..., time, 1]."""
        return audio.decode(tokens[..., 0], self.encoding, num_levels=self.num_levels)

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Tokens [time, 1] of a whole recording, floats [time], scaled as the data set's recordings are."""
        return self.quantise(waveform, self.scale(waveform))

    def scale(self, waveform: np.ndarray) -> Scale:
        """How a whole recording, floats [time], is scaled."""
        sound = np.asarray(waveform, np.float32)
        low, high = float(sound.min()), float(sound.max())
        if audio.no_sound(low, high) and not self.published:
            return Scale(0.0, -1.0, 1.0)
        if self.loudness is not None:
            factor = loudness.gain(lambda: _blocks(sound), max(abs(low), abs(high)), self.loudness)
            return Scale(factor, -1.0, 1.0)
        return Scale(1.0, low, high)

    def quantise(self, waveform: np.ndarray, scale: Scale) -> np.ndarray:
        """Tokens [time, 1] of floats [time] from a recording of that scale."""
        sound = np.asarray(waveform, np.float32) * np.float32(scale.factor)
        bounds = {"low": scale.low, "high": scale.high}
        return audio.encode(sound, self.encoding, **bounds, num_levels=self.num_levels)[:, None]

    def prompt(
        self,
        prompt: np.ndarray | str | os.PathLike[str],
        *,
        num_samples: int = 1,
        seconds: float | None = None,
        resample: bool = False,
    ) -> np.ndarray:
        """Tokens of a prompt: those that it would have as a recording of the data set.

        Args:
          prompt: a whole recording: an audio file, or floats [samples] or [num_samples, samples] at `sample_rate`.
            Silence is trimmed where the data set's was, but not of several prompts side by side.
          num_samples: streams that continue it.
          seconds: use only the first tokens of it: the scale is that of the whole.
          resample: convert a file that has another sample rate.

        Returns:
          [time, 1] for all streams, or [num_samples, time, 1].

        Raises:
          UserError: the prompt cannot be read, or has another sample rate or shape.
        """
        if isinstance(prompt, (str, os.PathLike)):
            waveform = read_sound(prompt, self.sample_rate, resample=resample)
        else:
            waveform = np.asarray(prompt)
        shapes = (waveform.shape[-1:], (num_samples, *waveform.shape[-1:]))
        if waveform.shape not in shapes or not waveform.size or waveform.dtype.kind != "f":
            got = f"{waveform.dtype}{list(waveform.shape)}"
            raise UserError(f"a prompt must be floats [samples] or [{num_samples}, samples], not {got}")
        if not np.isfinite(waveform).all():
            raise UserError("the prompt holds samples that are not finite (NaN or infinity)")
        if waveform.ndim == 1 and self.trim_silence is not None:
            sound = np.asarray(waveform, np.float32)
            waveform = sound[slice(*loudness.trim(lambda: _blocks(sound), len(sound), self.trim_silence))]
        # The scale is found first: of a part, such as the silence before the sound, it would be another.
        tokens = np.stack([self.encode(row) for row in np.atleast_2d(waveform)]).reshape(*waveform.shape, 1)
        tokens = tokens if seconds is None else tokens[..., : int(seconds * self.sample_rate), :]
        if not tokens.size:
            raise UserError(f"{seconds} seconds of a prompt are less than a sample; give more")
        return tokens


def _blocks(sound: np.ndarray) -> Iterator[np.ndarray]:
    return (sound[start : start + loudness.BLOCK] for start in range(0, len(sound), loudness.BLOCK))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a stream continues: tokens [time, 1], the recording or file that they come from, and its label."""

    tokens: np.ndarray
    source: str
    label: str | None = None


class Piece(NamedTuple):
    """A piece of several streams: float32 [streams, time] in [-1, 1], and their negative log-likelihood [streams]."""

    sound: np.ndarray
    nats: np.ndarray


@dataclasses.dataclass(frozen=True)
class Voice:
    """A model together with its codec: it generates sound.

    Attributes:
      model, params: the model and its parameters, as `model.init` names them.
      codec: of the data set that it was trained on.
    """

    model: Model
    params: Any = dataclasses.field(repr=False)
    codec: Codec

    def length(self, seconds: float, prompt: np.ndarray | None = None) -> int:
        """Samples in `seconds` of sound, of which a prompt is a part.

        Raises:
          UserError: no sound has that length, or the prompt leaves nothing to generate.
        """
        rate = self.codec.sample_rate
        if not 0 < seconds * rate <= LONGEST:
            raise UserError(f"seconds={seconds} is impossible: it must be above 0 and at most {LONGEST // rate:,}")
        length, given = round(seconds * rate), 0 if prompt is None else prompt.shape[-2]
        if length <= given:
            raise UserError(
                f"the prompt has {given / rate:.2f} s, but seconds={seconds:g} counts prompt and continuation "
                "together; give more seconds, or a shorter prompt"
            )
        return length

    def pieces(
        self,
        length: int,
        *,
        num_samples: int = 1,
        prompt: np.ndarray | None = None,
        chunk: int = 4_000,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Iterator[Piece]:
        """Generates streams side by side, handed out as they are made: first the prompt, which counts no nats.

        Args:
          length: samples of each stream, its prompt included.
          num_samples: streams.
          prompt: tokens [time, 1] that all continue, or [num_samples, time, 1].
          chunk: samples of a piece.
          progress: told of the samples of all streams.
          settings: `seed`, `temperature`, `top_p` and what else `harmonic.generate.generate` takes.

        Raises:
          UserError: a setting is impossible.
        """
        if prompt is not None:
            length -= prompt.shape[-2]
            yield Piece(
                self.codec.decode(np.broadcast_to(prompt, (num_samples, *prompt.shape[-2:]))), np.zeros(num_samples)
            )
        for made in generate(
            self.model, self.params, batch=num_samples, length=length, prompt=prompt, chunk=chunk, **settings
        ):
            yield Piece(self.codec.decode(made.tokens), made.nats)
            if progress:
                progress.update(made.tokens.shape[0] * made.tokens.shape[1])

    def write(
        self,
        folder: Path,
        *,
        kind: str,
        num_samples: int,
        seconds: float,
        prompts: list[Prompt] | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Generates WAV files `<kind>_NNNN.wav`, each whole or absent, written as they are made.

        Args:
          folder: made if it is missing.
          kind: `sample` or `continuation`.
          num_samples: files.
          seconds: of each file, its prompt included.
          prompts: one for all files, or one for each, all of one length.
          settings: as for `pieces`.

        Returns:
          A description of each file for samples.json.

        Raises:
          UserError: a setting is impossible, or a file cannot be written.
        """
        tokens = None
        if prompts:
            tokens = prompts[0].tokens if len(prompts) == 1 else np.stack([prompt.tokens for prompt in prompts])
        length, given = self.length(seconds, tokens), 0 if tokens is None else tokens.shape[-2]
        with files.write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{kind}_*.wav.partial"):  # after a kill
                left.unlink()
        paths = [folder / f"{kind}_{i:04d}.wav" for i in range(num_samples)]
        partial = [path.with_name(f"{path.name}.partial") for path in paths]
        nats, rate, first = np.zeros(num_samples), self.codec.sample_rate, settings.pop("first_stream", 0)
        with audio.wav_errors(folder), _progress(kind, (length - given) * num_samples) as progress:
            for start in range(0, num_samples, _OPEN_FILES):
                group = slice(start, min(start + _OPEN_FILES, num_samples))
                settings |= {"num_samples": group.stop - start, "first_stream": first + start, "progress": progress}
                begun = tokens[group] if tokens is not None and tokens.ndim == 3 else tokens
                with contextlib.ExitStack() as stack:
                    sounds = [
                        stack.enter_context(soundfile.SoundFile(path, "w", rate, 1, subtype="PCM_16", format="WAV"))
                        for path in partial[group]
                    ]
                    for piece in self.pieces(length, prompt=begun, **settings):
                        for sound, waveform in zip(sounds, piece.sound, strict=True):
                            sound.write(waveform)
                        nats[group] += piece.nats
        with files.write_errors(folder):
            for source, path in zip(partial, paths, strict=True):
                os.replace(source, path)
        rows = []
        for i, path in enumerate(paths):
            row = {
                "kind": kind,
                "file": path.name,
                "seconds": length / rate,
                "bits_per_sample": float(nats[i] / math.log(2) / (length - given)),
                "prompt_seconds": given / rate,
            }
            if prompts:
                prompt = prompts[i % len(prompts)]
                row |= {"source": prompt.source, "label": prompt.label}
            rows.append(row)
        return rows

    def stream(self, out: BinaryIO, *, seconds: float, prompt: np.ndarray | None = None, **settings: Any) -> float:
        """Writes one stream as it is made: raw 16-bit little-endian PCM, flushed ten times a second of audio.

        The bytes are those of the first WAV file that `write` makes with the same settings.

        Returns:
          Bits per sample of the generated part.

        Raises:
          UserError: a setting is impossible.
          BrokenPipeError: nobody reads any more.
        """
        length, given, rate = self.length(seconds, prompt), 0 if prompt is None else len(prompt), self.codec.sample_rate
        nats = 0.0
        with _progress("sample", length - given) as progress:
            for piece in self.pieces(length, prompt=prompt, chunk=max(rate // 10, 1), progress=progress, **settings):
                out.write(audio.pcm16(piece.sound[0]))
                out.flush()
                nats += float(piece.nats[0])
        return nats / math.log(2) / (length - given)


@contextlib.contextmanager
def _progress(kind: str, total: int) -> Iterator[Progress]:
    progress = Progress(f"generate {kind}s", total, unit="sample")
    yield progress
    progress.close()
