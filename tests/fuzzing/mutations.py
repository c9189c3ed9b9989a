"""Ways in which files of other people are wrong: by accident, by other programs, and on purpose."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "0",
    "none", "../x", "../../../etc/passwd", "/etc/passwd", "a\0b", "a/b", "\ud800", "os.system",
    "torch.nn.functional.torch", "canary_module.Canary", "subprocess.Popen", "x" * 5000, [], {}, [[]], [None],
    [0], [1, 2, 3], ["a"], {"": None}, {"0": {}}, [float("nan")] * 3, [[[0]]],
]  # fmt: skip
"""Values that have another type, another size or another meaning than what they replace."""

_TEXTS = [b"", b"null", b"[]", b"{}", b"0", b'"text"', b"nan", b"{", b"\xff\xfe{\x00}\x00", b"\x00" * 100]
_DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900]


def paths(document: Any, here: tuple = ()) -> Iterator[tuple]:
    """Yield the way to every value inside a JSON document."""
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        yield (*here, key)
        if isinstance(value, (dict, list)):
            yield from paths(value, (*here, key))


@st.composite
def changed_document(draw: st.DrawFn, document: Any) -> Any:
    """A document with one to three values replaced, removed, renamed, doubled or wrapped."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        ways = list(paths(changed))
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        place = changed
        for key in way:
            place = place[key]
        kind = draw(st.sampled_from(["replace"] * 4 + ["remove", "rename", "wrap", "copy"]))
        if kind == "remove":
            del place[last]
        elif kind == "rename" and isinstance(place, dict):
            place[draw(st.sampled_from(["", "../x", "a\0b", last.upper(), last + " ", "-1", "é"]))] = place.pop(last)
        elif kind == "wrap":
            place[last] = draw(st.sampled_from([[place[last]], {"value": place[last]}, str(place[last])]))
        elif kind == "copy":
            place[last] = copy.deepcopy(_at(changed, draw(st.sampled_from(ways))))
        else:
            place[last] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    return changed


def _at(document: Any, way: tuple) -> Any:
    for key in way:
        try:
            document = document[key]
        except (LookupError, TypeError):
            return None
    return document


@st.composite
def json_bytes(draw: st.DrawFn, document: Any) -> bytes:
    """The bytes of a JSON file: mostly a changed document, else damaged as text."""
    kind = draw(st.sampled_from(["document"] * 7 + ["damage", "text", "deep", "inside"]))
    whole = json.dumps(document).encode()
    if kind == "document":
        return json.dumps(draw(changed_document(document))).encode()
    if kind == "damage":
        return draw(damaged(whole))
    if kind == "text":
        return draw(st.sampled_from(_TEXTS))
    if kind == "deep":
        return draw(st.sampled_from(_DEEP))
    place = draw(st.integers(0, len(whole)))
    insert = draw(st.sampled_from([b"9" * 5000, b"NaN", b"-", b"\xc3\x28", b"\\u0000", b"1e999", *_DEEP]))
    return whole[:place] + insert + whole[place:]


@st.composite
def damaged(draw: st.DrawFn, content: bytes, front: int = 0) -> bytes:
    """Bytes that were cut off, flipped, overwritten, doubled or lengthened; half of the time in the first `front`."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "overwrite", "remove", "append"]))
    last = max(len(content) - 1, 0)
    place = draw(st.integers(0, last) | st.integers(0, min(front or last, last)))
    if kind == "cut":
        return content[:place]
    if kind == "remove":
        return content[:place] + content[place + draw(st.integers(1, 64)) :]
    if kind == "append":
        return content + draw(st.binary(min_size=1, max_size=64))
    changed = bytearray(content)
    if not changed:
        return b""
    if kind == "flip":
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, last) | st.integers(0, min(front or last, last)))] ^= 1 << draw(
                st.integers(0, 7)
            )
    else:
        new = draw(st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", struct.pack("<d", float("nan"))]))
        changed[place : place + len(new)] = new
    return bytes(changed)


NIFTI_FIELDS: dict[str, tuple[int, str]] = {
    "sizeof_hdr": (0, "i"),
    **{f"dim[{i}]": (40 + 2 * i, "h") for i in range(8)},
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    **{f"pixdim[{i}]": (76 + 4 * i, "f") for i in range(8)},
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "b"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    **{f"quatern+qoffset[{i}]": (256 + 4 * i, "f") for i in range(6)},
    **{f"srow[{i}]": (280 + 4 * i, "f") for i in range(12)},
    "magic": (344, "4s"),
    "extension": (348, "4s"),
}
_WHOLE = [-32768, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 255, 512, 1024, 32767]
_REAL = [0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e-30, 1e-3, 0.5, 7.0, 1e3, 1e30, 3e38]
_NIFTI_TEXT = [b"n+1\0", b"ni1\0", b"n+2\0", b"\0\0\0\0", b"\1\0\0\0", b"XXXX"]


@st.composite
def nifti(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a compressed NIfTI file that was changed before or after it was compressed."""
    kind = draw(st.sampled_from(["field"] * 6 + ["raw", "raw", "packed", "packed", "length", "not packed", "twice"]))
    if kind == "field":
        changed = bytearray(content)
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
            place, form = NIFTI_FIELDS[draw(st.sampled_from(sorted(NIFTI_FIELDS)))]
            values = _REAL if form == "f" else _NIFTI_TEXT if form == "4s" else _WHOLE
            value = draw(st.sampled_from([v for v in values if form != "b" or abs(v) < 128]))
            struct.pack_into(f"<{form}", changed, place, value)
        return gzip.compress(bytes(changed), 1)
    packed = gzip.compress(content, 1)
    if kind == "raw":
        return gzip.compress(draw(damaged(content, front=352)), 1)
    if kind == "packed":
        return draw(damaged(packed, front=20))
    if kind == "length":
        return packed[:-4] + struct.pack("<I", draw(st.sampled_from([0, 1, len(content) + 1, 2**32 - 1])))
    return content if kind == "not packed" else gzip.compress(packed, 1)


@st.composite
def archive(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a zip archive that was damaged as a whole, or whose members were damaged and packed again."""
    if draw(st.sampled_from([True, False])):
        return draw(damaged(content))
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        members = [(entry, source.read(entry)) for entry in source.infolist()]
    chosen = draw(st.integers(0, len(members) - 1))
    kind = draw(st.sampled_from(["damage"] * 4 + ["drop", "double", "rename", "compress"]))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for number, (entry, data) in enumerate(members):
            here = number == chosen
            if here and kind == "drop":
                continue
            name = entry.filename + ("x" if here and kind == "rename" else "")
            data = draw(damaged(data, front=200)) if here and kind == "damage" else data
            packing = zipfile.ZIP_DEFLATED if kind == "compress" else entry.compress_type
            for _ in range(2 if here and kind == "double" else 1):
                target.writestr(zipfile.ZipInfo(name), data, packing)
    return stream.getvalue()


class Calls:
    """Something that is called when it is unpickled."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple:
        return self.called


def hostile(canary: Path) -> list[Any]:
    """Objects that make the canary when they are unpickled."""
    return [
        Calls(os.system, f"touch {canary}"),
        Calls(exec, f"open({str(canary)!r}, 'w').close()"),
        Calls(subprocess.call, ["touch", str(canary)]),
        Calls(os.mkdir, str(canary)),
        Calls(Path(canary).touch),
        Calls(torch.save, {}, str(canary)),
    ]


def write(file: Path, content: bytes) -> Path:
    """Write a file, with its folder, and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file
