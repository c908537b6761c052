"""Sound written by arithmetic coding under a model, and read back to the bit: the strictest test of a likelihood.

    samples = read_channels("clip.wav", voice.codec.sample_rate)
    packed = compress(voice, samples, lossless=True)
    again = decompress(voice, packed.data)  # again.pcm is the clip, again.tokens what the model saw of it

A token costs -log2 of its probability, so a clip's size is its likelihood, and no likelihood is too good by mistake.
The coder counts probabilities in 2^-24: a token that the model holds for less likely costs 24 bits.

Reading needs the very probabilities that were written with, to the last bit. That rests on three things. Both ways
call one compiled program with arrays of the same shapes, a loop over single steps: a reader asks it for one step at a
time, a writer for as many as it likes, once a probe has given the same bits either way. That program gives the same
bits each time on one machine with the same libraries: so it does on a CPU, where every sum is taken in one order; on
other devices only the checks say so. And it must be that program: a stream names its weights, libraries and machine,
and has a digest of the probe. A reader with others is refused before it begins, and what it has read must have the
checksum of what was written.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from harmonic.audio import token_dtype
from harmonic.data import EvaluationBatch
from harmonic.errors import UserError, one_line
from harmonic.evaluate import segment_nats
from harmonic.generate import CPU_OPTIONS, LONGEST, prefill_piece
from harmonic.kernels.cpu import ffi
from harmonic.kernels.target import platform
from harmonic.metrics import Progress
from harmonic.models.base import Model, in_precision
from harmonic.voice import Codec, Scale, Voice

FORMAT = 1
_MAGIC = b"HRNNCLIP"
_HELD = 1 << 14  # the most probabilities that the program gives at a call, unless a single token has more
_REPORT = 4_000  # samples between two reports of progress
_LIBRARIES = ("jax", "jaxlib", "llvmlite", "numpy", "constriction")


class Size(NamedTuple):
    """Bytes that some way of writing takes, whole or not."""

    what: str
    bytes: float


@dataclasses.dataclass(frozen=True)
class Packed:
    """A written clip.

    Attributes:
      data: the whole file.
      samples: how many it holds.
      sizes: of its parts, and of other ways to write the same.
      sha256: of the tokens, in hexadecimal.
    """

    data: bytes
    samples: int
    sizes: list[Size]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """A clip that was read.

    Attributes:
      tokens: [time, 1], those that were written.
      pcm: int16 [time]: the clip's own samples if it was written with `lossless`; if not, the middles of the levels.
      lossless: which of both.
      sample_rate: Hz.
      sha256: of the tokens, in hexadecimal.
    """

    tokens: np.ndarray
    pcm: np.ndarray
    lossless: bool
    sample_rate: int
    sha256: str


def compress(voice: Voice, samples: np.ndarray, *, lossless: bool = False, progress: bool = False) -> Packed:
    """Writes a clip: its tokens, scaled whole as the data set's recordings are, and perhaps what they leave out.

    Args:
      voice: the model, and the codec whose sample rate the clip has.
      samples: float32 [time, channels]; several channels are mixed, as prepare does.
      lossless: also write where each sample is among the 16-bit values that have its token.
      progress: show it.

    Raises:
      UserError: with `lossless`, samples that are not 16-bit ones of one channel; a model that cannot be coded with.
    """
    length, codec = len(samples), voice.codec
    if not 1 <= length <= LONGEST:
        raise UserError(f"a clip of {length:,} samples cannot be compressed: it must have between 1 and {LONGEST:,}")
    if not np.isfinite(samples).all():
        raise UserError("the clip holds samples that are not finite (NaN or infinity); give another recording")
    wave = samples.mean(axis=1, dtype=np.float32) if samples.shape[1] > 1 else samples[:, 0]
    nearest = np.clip(np.rint(wave * np.float32(2**15)), -(2**15), 2**15 - 1).astype(np.int16)
    pcm = _sixteen_bits(samples) if lossless else nearest
    extent, scale = [int(pcm.min()), int(pcm.max())], codec.scale(wave)
    cells = _Cells(codec, scale, *extent)
    tokens = cells.tokens(pcm) if lossless else codec.quantise(wave, scale)[:, 0]
    coder = Coder(voice.model, voice.params)
    stream = coder.encode(tokens, _progress("compress", length) if progress else None)
    difference = cells.encode(tokens, pcm) if lossless else b""
    header = {
        "format": FORMAT,
        **coder.identity,
        "codec": dataclasses.asdict(codec),
        "scale": scale._asdict(),
        "extent": extent,
        "samples": length,
        "lossless": lossless,
        "bytes": [len(stream), len(difference)],
        "sha256": [_sha256(tokens), _sha256(pcm) if lossless else ""],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    body = _MAGIC + struct.pack("<I", len(text)) + text + stream + difference
    data = body + hashlib.sha256(body).digest()
    bits = likelihood(voice.model, voice.params, tokens) / math.log(2)
    sizes = [
        Size("tokens, under the model", len(stream)),
        Size("tokens, by the model's likelihood", bits / 8),
        Size("tokens, by how often each occurs", _histogram_bytes(tokens, codec.num_levels)),
        Size(
            "tokens, as FLAC", _flac_bytes(_centred(tokens, codec.num_levels), bits=8 if tokens.itemsize == 1 else 16)
        ),
        *([Size("difference to 16 bits", len(difference))] if lossless else []),
        Size("header and checksum", len(data) - len(stream) - len(difference)),
        Size("whole file", len(data)),
        Size("16-bit samples, as FLAC", _flac_bytes(pcm, bits=16)),
        Size("16-bit samples, as they are", 2 * length),
    ]
    return Packed(data, length, sizes, _sha256(tokens))


def decompress(voice: Voice, data: bytes, *, name: str = "the file", progress: bool = False) -> Unpacked:
    """Reads what `compress` wrote.

    Args:
      voice: the model that it was written with.
      data: the whole file.
      name: of the file, for errors.
      progress: show it.

    Raises:
      UserError: it is no such file, damaged or cut short, or was written with another model, codec, library or machine.
    """
    header, parts = _read(data, name)
    coder = Coder(voice.model, voice.params)
    _check_identity(name, header, {**coder.identity, "codec": dataclasses.asdict(voice.codec)})
    length, (stream, difference) = header["samples"], parts
    try:
        tokens = coder.decode(stream, length, _progress("decompress", length) if progress else None)
        cells = _Cells(voice.codec, Scale(**header["scale"]), *header["extent"])
        pcm = cells.decode(tokens, difference) if header["lossless"] else cells.middles(tokens)
    except AssertionError as error:  # how constriction refuses words that no encoder writes
        raise _strayed(name) from error
    if _sha256(tokens) != header["sha256"][0] or (header["lossless"] and _sha256(pcm) != header["sha256"][1]):
        raise _strayed(name)
    return Unpacked(tokens[:, None], pcm, header["lossless"], voice.codec.sample_rate, _sha256(tokens))


def _strayed(name: str) -> UserError:
    return UserError(
        f"{name} does not decode to the sound that was written: this machine computes other probabilities; "
        "decompress it where it was compressed"
    )


class Coder:
    """A model's probabilities, a sample at a time, and a range coder.

    Args:
      model, params: the model and its parameters.

    Attributes:
      identity: what a reader must share with the writer: digests of the weights and of some probabilities, and names
        of libraries and machine.

    Raises:
      UserError: there is no range coder here, or the model has labels or several channels.
    """

    def __init__(self, model: Model, params: Any):
        self._constriction = _constriction()
        if model.labels or model.channels != 1:
            what = "is conditioned on labels" if model.labels else f"has {model.channels} channels"
            raise UserError(f"a model that {what} cannot be compressed with; take one of plain mono sound")
        self._model, self._dtype = model, token_dtype(model.num_levels)
        self._start, self._step = _functions(model, platform())
        self._weights, self._first = self._start(params)
        probe, most = self._probe(1), _block(model)
        self._block = most if self._probe(most) == probe else 1
        self.identity = {"model": _digest(model, params), "machine": _machine(), "probe": probe}

    def encode(self, tokens: np.ndarray, progress: Progress | None = None) -> bytes:
        """The stream of tokens [time]: little-endian words of 32 bits."""
        encoder = self._constriction.stream.queue.RangeEncoder()
        family = self._constriction.stream.model.Categorical(perfect=False)
        start = 0
        for probabilities in self._probabilities(tokens, self._block):
            piece = tokens[start : start + len(probabilities)]
            encoder.encode(piece.astype(np.int32), family, probabilities)
            start += len(piece)
            if progress:
                progress.update(len(piece))
        if progress:
            progress.close()
        return encoder.get_compressed().astype("<u4").tobytes()

    def decode(self, stream: bytes, length: int, progress: Progress | None = None) -> np.ndarray:
        """The tokens [length] of a stream.

        Raises:
          AssertionError: no encoder writes such a stream with these probabilities.
        """
        decoder = self._constriction.stream.queue.RangeDecoder(np.frombuffer(stream, "<u4").astype(np.uint32))
        family = self._constriction.stream.model.Categorical(perfect=False)
        tokens = np.zeros(length, self._dtype)
        # The program asks for a token only after it was filled in.
        for i, probabilities in enumerate(self._probabilities(tokens, 1)):
            tokens[i] = decoder.decode(family, probabilities)[0]
            if progress and (i + 1) % _REPORT == 0:
                progress.update(_REPORT)
        if progress:
            progress.update(length % _REPORT)
            progress.close()
        return tokens

    def _probabilities(self, tokens: np.ndarray, block: int) -> Iterator[np.ndarray]:
        """Of each token [time] after those before it, `block` of them at a time: float64 [<= block, num_levels].

        With a block of 1, a token is read after its probabilities were given.
        """
        carry = jax.tree.map(jnp.copy, self._first)  # the program takes the arrays it is given
        for start in range(0, len(tokens), block):
            steps = min(block, len(tokens) - start)
            before = np.zeros(_block(self._model), np.int32)
            before[int(start == 0) : steps] = tokens[max(start - 1, 0) : start + steps - 1]
            carry, given = self._step(self._weights, carry, before, np.int32(steps), np.bool_(start > 0))
            # In float64: constriction adds them up in the type that they have.
            probabilities = np.asarray(given)[:steps].astype(np.float64)
            if not ((sums := probabilities.sum(1)) > 0).all() or not np.isfinite(sums).all():
                raise UserError("the model's probabilities are not finite: the weights are broken; take other ones")
            yield probabilities

    def _probe(self, block: int) -> str:
        """A digest of the probabilities of some tokens."""
        length = min(2 * self._model.multiple + 64, 1_000)  # every level of pooling runs, and more than once
        tokens = (np.arange(length) ** 2 * 31 % self._model.num_levels).astype(self._dtype)
        digest = hashlib.sha256()
        for probabilities in self._probabilities(tokens, block):
            digest.update(probabilities.astype("<f8").tobytes())
        return digest.hexdigest()


def _block(model: Model) -> int:
    """The most samples that the program runs at a call."""
    return max(_HELD // model.num_levels, 1)


@functools.lru_cache(maxsize=8)
def _functions(model: Model, platform: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(parameters -> (weights, carry), and the one program that gives probabilities), compiled."""
    sampler = model.sampler()

    def start(params):
        return sampler.prepare(params), sampler.enter(model.init_state(1))

    def step(weights, carry, before, steps, seen):
        """(carry, probabilities [block, num_levels] of `steps` tokens), where `before` [block] are the ones before
        each. Unless `seen`, nothing is before the first."""
        levels = jnp.arange(model.num_levels, dtype=jnp.int32)[:, None, None, None]

        def body(i, loop):
            carry, found = loop
            known = model.observe(carry, jax.lax.dynamic_slice(before, (i,), (1,))[None])
            carry = jax.tree.map(functools.partial(jnp.where, seen | (i > 0)), known, carry)
            outputs, carry = model.step(weights, {}, carry)
            row = jnp.exp(jax.vmap(lambda level: model.log_prob(outputs, level)[0, 0])(levels))
            return carry, jax.lax.dynamic_update_index_in_dim(found, row.astype(found.dtype), i, 0)

        return jax.lax.fori_loop(0, steps, body, (carry, jnp.zeros((len(before), model.num_levels))))

    options = CPU_OPTIONS if platform == "cpu" else None
    start, step = in_precision(model, start), in_precision(model, step)
    return jax.jit(start), jax.jit(step, donate_argnums=1, compiler_options=options)


def likelihood(model: Model, params: Any, tokens: np.ndarray) -> float:
    """The negative log-likelihood in nats of tokens [time], as evaluation reckons it: by `apply` over segments."""
    length, multiple = len(tokens), model.multiple
    size = min(prefill_piece(model), -(-length // multiple) * multiple)
    padded = np.zeros(-(-length // size) * size, tokens.dtype)
    padded[:length] = tokens
    pieces = (piece[None, :, None] for piece in padded.reshape(-1, size))
    batch = EvaluationBatch(np.array([length], np.int32), np.array([-1], np.int32), pieces)
    return sum(float(nats.sum()) for nats, _ in segment_nats(model, params, batch))


class _Cells:
    """Which 16-bit values have which token, in a recording of some scale: for each token a run of neighbours.

    Args:
      codec, scale: of the recording.
      low, high: its extremes, as 16-bit values: there are no others.
    """

    def __init__(self, codec: Codec, scale: Scale, low: int, high: int):
        self._low = low
        self._tokens = codec.quantise(np.arange(low, high + 1, dtype=np.float32) / np.float32(2**15), scale)[:, 0]
        self._first = np.searchsorted(self._tokens, np.arange(codec.num_levels + 1)).astype(np.int32)
        self._size = np.diff(self._first)

    def tokens(self, pcm: np.ndarray) -> np.ndarray:
        """The tokens [time] of 16-bit samples."""
        return self._tokens[pcm.astype(np.int32) - self._low]

    def encode(self, tokens: np.ndarray, pcm: np.ndarray) -> bytes:
        """Where each 16-bit sample is in the run of its token: all places are taken for equally likely."""
        place, size = pcm.astype(np.int32) - self._low - self._first[tokens], self._size[tokens]
        assert ((place >= 0) & (place < size)).all(), "a quantiser that does not rise"
        constriction = _constriction()
        encoder, several = constriction.stream.queue.RangeEncoder(), size > 1
        encoder.encode(place[several], constriction.stream.model.Uniform(), size[several])
        return encoder.get_compressed().astype("<u4").tobytes()

    def decode(self, tokens: np.ndarray, difference: bytes) -> np.ndarray:
        """The 16-bit samples, int16 [time]."""
        constriction = _constriction()
        decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(difference, "<u4").astype(np.uint32))
        size = self._size[tokens]
        place, several = np.zeros(len(tokens), np.int32), size > 1
        place[several] = decoder.decode(constriction.stream.model.Uniform(), size[several])
        return self._values(self._first[tokens] + place)

    def middles(self, tokens: np.ndarray) -> np.ndarray:
        """The middle of each token's run, int16 [time], or the value beside it where 16 bits have none."""
        return self._values(self._first[tokens] + np.maximum(self._size[tokens] - 1, 0) // 2)

    def _values(self, places: np.ndarray) -> np.ndarray:
        return (np.minimum(places, len(self._tokens) - 1) + self._low).astype(np.int16)


def _sixteen_bits(samples: np.ndarray) -> np.ndarray:
    """float32 [time, channels] as int16 [time].

    Raises:
      UserError: that would lose something.
    """
    if samples.shape[1] != 1:
        raise UserError(
            f"the clip has {samples.shape[1]} channels, and the model has one: mix it, or leave out --lossless"
        )
    whole = samples[:, 0].astype(np.float64) * 2**15
    if (whole != np.rint(whole)).any() or whole.min() < -(2**15) or whole.max() >= 2**15:
        raise UserError("the clip's samples are not 16-bit ones: convert it to 16 bits, or leave out --lossless")
    return whole.astype(np.int16)


def _read(data: bytes, name: str) -> tuple[dict[str, Any], tuple[bytes, bytes]]:
    """The header, and the streams of the tokens and of the difference."""
    if not data.startswith(_MAGIC):
        raise UserError(f"{name} is not a compressed clip; make one with python -m workflows.compress")
    at = len(_MAGIC) + 4
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise UserError(f"{name} is damaged or cut short; get it again")
    try:
        (size,) = struct.unpack("<I", data[len(_MAGIC) : at])
        header = json.loads(data[at : at + size])
        if header["format"] != FORMAT:
            raise UserError(
                f"{name} is of format {one_line(header['format'])}; this version reads {FORMAT}: take the version that "
                "wrote it"
            )
        tokens, difference = header["bytes"]
        at += size
        parts = data[at : at + tokens], data[at + tokens : -32]
        lossless = header["lossless"]
        ok = len(parts[1]) == difference and tokens % 4 == difference % 4 == 0
        ok &= type(header["samples"]) is int and 1 <= header["samples"] <= LONGEST
        ok &= type(lossless) is bool and set(header["scale"]) == set(Scale._fields)
        ok &= all(math.isfinite(value) for value in header["scale"].values())
        low, high = header["extent"]
        ok &= type(low) is type(high) is int and -(2**15) <= low <= high < 2**15
        ok &= len(header["sha256"]) == 2 and isinstance(header["machine"], dict)
        ok &= all(name in header for name in ("model", "probe", "codec"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        ok = False
    if not ok:
        raise UserError(f"{name} is damaged: its header is not one that compress writes; get it again")
    return header, parts


def _check_identity(name: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuses what was written with something else, and says what."""
    if there["model"] != here["model"]:
        raise UserError(f"{name} was written with other weights than these; give the model that it was compressed with")
    if there["codec"] != here["codec"]:
        raise UserError(f"{name} was written with another codec than this; give the model that it was compressed with")
    theirs, ours = there["machine"], here["machine"]
    differing = [
        f"{key} was {one_line(theirs.get(key))} there and is {one_line(ours.get(key))} here"
        for key in dict.fromkeys([*ours, *theirs])
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise UserError(f"{name} needs the machine and the versions that wrote it: {'; '.join(differing)}")
    if there["probe"] != here["probe"]:
        raise UserError(
            f"{name} needs the program that wrote it, and this one computes other probabilities; take the same version "
            "of harmonic-rnn on the same machine"
        )


def _machine() -> dict[str, str]:
    """What decides, besides model and weights, the bits of a program's results."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    on_cpu = {"processor": ffi.processor(), "machine code": "on" if ffi.available() else "off"}
    return {
        **versions,
        "device": f"{platform()}, {device.device_kind}",
        "driver": " ".join(device.client.platform_version.split()),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **(on_cpu if platform() == "cpu" else {}),
    }


def _digest(model: Model, params: Any) -> str:
    """Of the parameters, and of how the model computes with them."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(model.config), model.num_levels]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise UserError(
            f"compressing needs the range coder constriction ({error}): pip install 'harmonic-rnn[compress]'"
        ) from None
    return constriction


def _sha256(array: np.ndarray) -> str:
    little = array.astype(array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


def _histogram_bytes(tokens: np.ndarray, num_levels: int) -> int:
    """What the range coder makes of tokens [time] if it knows how often each occurs and nothing else."""
    constriction = _constriction()
    counts = np.bincount(tokens, minlength=num_levels).astype(np.float64)
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(tokens.astype(np.int32), constriction.stream.model.Categorical(counts, perfect=False))
    return 4 * encoder.num_words()


def _centred(tokens: np.ndarray, num_levels: int) -> np.ndarray:
    """Tokens [time] as int16 around zero; those of a byte in its upper half, where FLAC of 8 bits takes them from."""
    centred = tokens.astype(np.int32) - num_levels // 2
    return (centred * 256 if tokens.itemsize == 1 else centred).astype(np.int16)


def _flac_bytes(samples: np.ndarray, *, bits: int) -> int:
    written = io.BytesIO()
    subtype = "PCM_S8" if bits == 8 else "PCM_16"
    soundfile.write(written, samples, 16_000, format="FLAC", subtype=subtype, compression_level=1.0)
    return len(written.getvalue())


def _progress(title: str, length: int) -> Progress:
    return Progress(title, length, unit="sample")
