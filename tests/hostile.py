"""What the fuzz tests are made of: how many cases, damage to bytes and to JSON, files with hostile heads."""

import collections
import io
import json
import os
import struct
import tarfile
import zipfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FULL = os.environ.get("HARMONIC_FUZZ") == "full"
CASES: collections.Counter[str] = collections.Counter()


def fuzz(full, quick=None):
    """Settings of a test: so many cases in full, fewer and always the same ones otherwise."""
    return settings(
        max_examples=full if FULL else quick or max(full // 30, 5),
        derandomize=not FULL,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw, data):
    """Bytes with a few of them changed, cut out, doubled, put in or moved; or cut short. Perhaps what they were."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("flip", "flip", "set", "cut", "remove", "double", "insert", "word")))
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        size = draw(st.integers(1, 40))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and changed:
            changed[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))
        elif kind == "cut":
            del changed[at:]
        elif kind == "remove":
            del changed[at : at + size]
        elif kind == "double":
            changed[at:at] = changed[at : at + size]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "word":
            word = draw(st.sampled_from((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)))
            changed[at : at + 4] = struct.pack("<I", word)
    return bytes(changed)


TEXT = st.text(max_size=12) | st.sampled_from(
    ("..", "/", "a/../../b", "/etc/passwd", "\0", "\ud800", "C:\\x", "a" * 5_000)
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70_000)
    | st.sampled_from((2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400))
    | st.floats()
    | TEXT
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)


@st.composite
def changed_json(draw, value):
    """A JSON value with one place in it replaced, removed or added to."""
    value = json.loads(json.dumps(value))
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        below = node[key]
        if isinstance(below, (dict, list)) and below and draw(st.integers(0, 4)):
            node = below
            continue
        what = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if what == "replace":
            node[key] = draw(JSON)
        elif what == "remove":
            del node[key]
        elif isinstance(node, dict):
            node[draw(TEXT)] = draw(JSON)
        else:
            node.append(draw(JSON))
        break
    return value


NUMBERS_16 = st.sampled_from((0, 1, 2, 6, 255, 1_024, 1_025, 65_535)) | st.integers(0, 65_535)
NUMBERS_32 = st.sampled_from((0, 1, 2, 100, 16_000, 768_001, 2**31 - 1, 2**31, 2**32 - 1)) | st.integers(0, 2**32 - 1)


@st.composite
def wav_with_any_head(draw):
    """A RIFF file whose sizes, rate, channels and format are whatever they are."""
    data = draw(st.binary(max_size=400))
    form = struct.pack(
        "<HHIIHH",
        draw(st.sampled_from((1, 2, 3, 6, 7, 0x11, 0x31, 0x55, 0xFFFE)) | NUMBERS_16),
        draw(NUMBERS_16),
        draw(NUMBERS_32),
        draw(NUMBERS_32),
        draw(NUMBERS_16),
        draw(st.sampled_from((0, 1, 8, 16, 24, 32, 64, 65_535))),
    ) + draw(st.binary(max_size=30))
    chunks = [
        (b"fmt ", len(form) if draw(st.booleans()) else draw(NUMBERS_32), form),
        (b"data", len(data) if draw(st.booleans()) else draw(NUMBERS_32), data),
    ]
    for _ in range(draw(st.integers(0, 2))):
        extra = draw(st.binary(max_size=30))
        name = draw(st.sampled_from((b"LIST", b"fact", b"ds64", b"cue ", b"PEAK", b"\0\0\0\0")))
        chunks.insert(draw(st.integers(0, 2)), (name, draw(st.just(len(extra)) | NUMBERS_32), extra))
    body = b"WAVE" + b"".join(name + struct.pack("<I", size) + content for name, size, content in chunks)
    magic = draw(st.sampled_from((b"RIFF", b"RIFF", b"RIFF", b"RIFX", b"RF64", b"FORM")))
    return magic + struct.pack("<I", len(body) if draw(st.booleans()) else draw(NUMBERS_32)) + body


NAMES = st.sampled_from(
    (
        *("a.wav", "b/c.wav", "../up.wav", "../../../../tmp/up.wav", "/absolute.wav", "x/../../y.wav", "./here.wav"),
        *("//d.wav", "nul\0.wav", "\ud800.wav", "C:\\windows.wav", "..\\up.wav", "a.wav/b.wav", "-rf.wav"),
        *("~/home.wav", ".wav", "\n.wav", "\u202egnp.wav", "a" * 300 + ".wav", "e\u0301.wav", "\u00e9.wav", "$(x).wav"),
        *("dir/", "", ".hidden/a.wav", "CON.wav"),
    )
) | st.text(min_size=1, max_size=8).map(lambda name: name + ".wav")  # fmt: skip


@st.composite
def zip_members(draw, recordings):
    """A zip of members of any name, some of the same one, some packed, some with sizes that lie."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("plain/0.wav", recordings[0])
        archive.writestr("plain/1.wav", recordings[1])
        for _ in range(draw(st.integers(1, 5))):
            info = zipfile.ZipInfo(draw(NAMES).encode("utf-8", "replace").decode().replace("\0", "0") or "0.wav")
            info.compress_type = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)))
            info.external_attr = draw(st.sampled_from((0o100644, 0o120777, 0o040755, 0o010644, 0o020644))) << 16
            archive.writestr(info, draw(st.sampled_from(recordings)))
        for info in archive.filelist:
            if not draw(st.integers(0, 3)):
                info.file_size = draw(st.sampled_from((0, 1, 2**31 - 1, 2**32 - 2)))
            if not draw(st.integers(0, 6)):
                info.header_offset = draw(st.integers(0, len(packed.getvalue())))
        archive._didModify = True
    data = packed.getvalue()
    if draw(st.booleans()):  # names that zipfile does not write
        data = data.replace(b".wav", draw(st.sampled_from((b"\0wav", b"/../", b"\xff.wa", b".wav"))))
    return data


@st.composite
def tar_members(draw, recordings):
    """A tar of files, links, devices and pipes of any name."""
    packed = io.BytesIO()
    form = draw(st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    with tarfile.open(fileobj=packed, mode="w", format=form, errors="surrogateescape") as archive:
        for _ in range(draw(st.integers(1, 6))):
            name = draw(NAMES).encode("utf-8", "replace").decode().replace("\0", "0")[: 90 if form == 0 else None]
            info = tarfile.TarInfo(name)
            info.type = draw(
                st.sampled_from(
                    (
                        *(tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE),
                        *(tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.AREGTYPE),
                    )
                )
            )
            info.linkname = draw(st.sampled_from(("", "a.wav", "/etc/passwd", "../../x", "b/c.wav")))
            data = draw(st.sampled_from(recordings))
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()
