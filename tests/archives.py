"""Recordings of noise, as bytes, and the folders, archives and tables that hold them."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import soundfile

PACK = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


def wav(samples=800, rate=16_000, channels=1, seed=0):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(0, 0.1, (samples, channels)), rate, format="WAV")
    return file.getvalue()


def sc09(count=6):
    """Two digits in SC09's layout: one recording for validation, two for the test."""
    files = {f"sc09/{d}/{i}.wav": wav(700 + 10 * i, seed=i) for d in ("zero", "one") for i in range(count)}
    return files | {"sc09/validation_list.txt": b"zero/0.wav\n", "sc09/testing_list.txt": b"one/0.wav\none/1.wav\n"}


def beethoven(count=20):
    return {f"beethoven/{i}.wav": wav(seed=i) for i in range(count)}


def mine(count=12):
    """Recordings of one's own: three folders, three sample rates, mono and stereo."""
    return {f"{i % 3}/{i}.wav": wav(2_000, 8_000 * (1 + i % 3), 1 + i % 2, i) for i in range(count)}


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zip_bytes(files, compression=zipfile.ZIP_STORED):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return packed.getvalue()


def write_zip(path, files, compression=zipfile.ZIP_STORED):
    path.write_bytes(zip_bytes(files, compression))
    return path


def tar_bytes(files, kind="tar", form=tarfile.PAX_FORMAT):
    """A tar of files, compressed as `kind` says; a value may be a TarInfo, which has no data."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form) as archive:
        for name, data in files.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info is not data:
                info.size = len(data)
            archive.addfile(info, None if info is data else io.BytesIO(data))
    return PACK[kind](packed.getvalue())


def parquet(numbers, rows=4, *, typed=True, column="audio", **options):
    """A Parquet file with one recording for each number, as `datasets` writes it, or as plain Arrow."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    audio = [{"bytes": wav(1000 + n, seed=n), "path": f"{n}.wav"} for n in numbers]
    columns = {"text": [str(n) for n in numbers], column: audio, "label": [n % 2 for n in numbers]}
    kinds = {
        "text": datasets.Value("string"),
        column: datasets.Audio(),
        "label": datasets.ClassLabel(names=["no", "yes"]),
    }
    table = pa.table(columns, schema=datasets.Features(kinds).arrow_schema) if typed else pa.table(columns)
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=rows, **options)
    return file.getvalue()
