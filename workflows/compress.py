"""Writes a clip by arithmetic coding under a model, and reads it back: what the model's likelihood is worth in bytes.

python -m workflows.compress --input=clip.wav --output=clip.hrnn                     # under the model in the box
python -m workflows.compress --workdir=runs/piano --lossless --input=clip.wav --output=clip.hrnn
python -m workflows.compress --workdir=runs/piano --decompress --input=clip.hrnn --output=again.wav
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from harmonic import audio, files
from harmonic.compress import compress, decompress
from harmonic.errors import UserError
from harmonic.sound.whole import read_channels
from workflows import cli

_MODEL = cli.define_model_flag()
_INPUT = flags.DEFINE_string("input", None, "a clip at the model's sample rate; with --decompress, what was written")
_OUTPUT = flags.DEFINE_string("output", None, "the file to write; with --decompress, a WAV file")
_LOSSLESS = flags.DEFINE_bool("lossless", False, "keep the clip's 16-bit samples, not only its tokens")
_DECOMPRESS = flags.DEFINE_bool("decompress", False, "read a compressed clip")
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Compresses or decompresses, and prints the sizes."""
    if not _INPUT.value or not _OUTPUT.value:
        raise UserError("give --input=FILE and --output=FILE")
    source, target = Path(_INPUT.value), Path(_OUTPUT.value)
    if source.resolve() == target.resolve():
        raise UserError(f"{target} would be written over its own input; give another --output")
    if _DECOMPRESS.value and _LOSSLESS.value:
        raise UserError("a compressed clip knows whether it is lossless: leave out --lossless")
    _, voice = cli.voice_from_flags(_MODEL.value)
    if _DECOMPRESS.value:
        with files.refusing(source, "give a compressed clip"):
            data = source.read_bytes()
        clip = decompress(voice, data, name=str(source), progress=True)
        audio.write_wav(target, clip.pcm, clip.sample_rate)
        kept = "the 16-bit samples that were compressed" if clip.lossless else "the middles of the tokens' levels"
        print(f"{target}  {len(clip.pcm) / clip.sample_rate:.2f} s, {kept}; tokens' SHA-256 {clip.sha256[:16]}")
        return
    samples = read_channels(source, voice.codec.sample_rate)
    packed = compress(voice, samples, lossless=_LOSSLESS.value, progress=True)
    files.write_whole(target, packed.data)
    for size in packed.sizes:
        print(f"{size.what:<36}{size.bytes:>14,.0f} bytes  {8 * size.bytes / packed.samples:8.4f} bits/sample")
    seconds = packed.samples / voice.codec.sample_rate
    print(f"{target}  {seconds:.2f} s; tokens' SHA-256 {packed.sha256[:16]}")


if __name__ == "__main__":
    cli.run(main)
