"""Supported image formats and their conversion to RGB, the same for all backends.

DALI's decoders and Pillow decode most files to the same pixels, and a few to different ones. `to_rgb` converts as DALI
does where DALI is right. `open_image` refuses the other files before it decodes any pixel. docs/scan.md has the table.

DALI pipelines do not run Python code for each image. They accept any JPEG, PNG and WebP file, and refuse other contents
unless the file name has an extension in `LOOKED_AT`. The loaders check the headers of files with these extensions
before the first batch.
"""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

# Extensions of the formats with kinds of pixels on which DALI and Pillow disagree.
LOOKED_AT = (".bmp", ".ppm", ".pgm", ".tif", ".tiff")

# The first bytes of the supported formats.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"P2", b"P3", b"P5", b"P6", b"BM", b"II*\0", b"MM\0*", b"RIFF")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
# Further tags that DALI reads; if one is invalid, DALI ignores the orientation. Texts, and counts of rational numbers.
_EXIF_TEXTS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298)
_EXIF_RATIONALS = {0x011A: 1, 0x011B: 1, 0x013E: 2, 0x013F: 6, 0x0211: 3, 0x0214: 6}


class Unusable(Exception):
    """A file cannot be used: `kind` is one of `dali_saliencymix.datasets.damage.EXCLUDED`, `words` describe why."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(f"{kind.replace('_', ' ')}: {words}")
        self.kind, self.words = kind, words


def open_image(stream: IO[bytes], ending: str) -> Image.Image:
    """Read and check the header of an image, and all chunks of a PNG file; raise `Unusable` if it is refused.

    Parameters
    ----------
    stream : binary file
        The file, at its beginning. It must stay open as long as the image is used.
    ending : str
        Extension of the file name in lower case, such as ``".jpg"``.

    Returns
    -------
    PIL.Image.Image
        The image, whose pixels are not decoded yet.
    """
    start = stream.read(8)
    stream.seek(0)
    try:
        image = Image.open(stream)
    except Image.DecompressionBombError as error:
        raise Unusable(kind="too_large", words=str(error).partition(" exceeds")[0]) from error
    except Exception as error:  # Pillow raises errors of many types for damaged headers
        if not start.startswith(_SIGNATURES):
            raise Unusable(kind="not_an_image", words=f"begins with {start!r}") from error
        raise cannot_decode(error, "its header cannot be read") from error
    if image.format not in _CHECKS:
        raise Unusable(kind="unsupported", words=f"{image.format} data")
    if image.format in ("BMP", "PPM", "TIFF") and ending not in LOOKED_AT:
        raise Unusable(kind="unsupported", words=f"{image.format} data in a {ending} file")
    place = stream.tell()
    try:
        words = _CHECKS[image.format](image, stream)
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:  # invalid values
        raise Unusable(kind="corrupt", words="its header cannot be read") from error
    if words:
        raise Unusable(kind="unsupported", words=words)
    stream.seek(place)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image from `open_image` as DALI does: to 8-bit RGB, with the EXIF orientation applied.

    Alpha is dropped, and 16-bit samples keep their upper 8 bits.
    """
    if image.format == "TIFF":
        image.info.pop("xmp", None)  # Pillow would apply its orientation while loading
    image.load()
    turn = _TURNS.get(orientation(image))
    if image.mode.startswith("I"):  # one channel of 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow assumes Adobe's inverted values in all of them
    image.info.pop("transparency", None)  # Pillow would warn that it drops this
    image = image.convert("RGB")
    return image.transpose(turn) if turn is not None else image


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image from `open_image`, 1 to 8. For a PNG file, load the pixels first.

    Pillow's own function also reads XMP and text chunks, which DALI does not.
    """
    found = [value for block in _exif_blocks(image) if (value := _orientation_in(block)) is not None]
    return found[0] if found and found[0] in _TURNS else 1


def _exif_blocks(image: Any) -> list[bytes]:
    if image.format in ("JPEG", "MPO"):
        segments = [segment for marker, segment in image.applist if marker == "APP1"]
        return [segment[len(_EXIF) :] for segment in segments if segment.startswith(_EXIF)]
    if image.format == "PNG":
        return [image.info.get("exif", b"").removeprefix(_EXIF)]
    return [image.info.get("exif", b"")] if image.format == "WEBP" else []


def _orientation_in(block: bytes) -> int | None:
    """Return the orientation in the first directory of EXIF data; None if it is absent or the data are invalid."""
    order, found = "<" if block[:2] == b"II" else ">", None
    try:
        mark, start = struct.unpack_from(order + "HI", block, 2)
        if mark != 42:
            return None
        (count,) = struct.unpack_from(order + "H", block, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            (tag,) = struct.unpack_from(order + "H", block, place)
            if tag == _ORIENTATION and found is None:
                (found,) = struct.unpack_from(order + "H", block, place + 8)
            elif tag in _EXIF_TEXTS or tag in _EXIF_RATIONALS:
                length, begin = struct.unpack_from(order + "II", block, place + 4)
                length = length if tag in _EXIF_TEXTS else 8 * _EXIF_RATIONALS[tag]
                if length > 4 and begin + length > len(block):
                    return None
    except struct.error:
        return None
    return found


def cannot_decode(error: Exception, instead: str | None = None) -> Unusable:
    """Convert an error of Pillow to `Unusable`; `instead` replaces a message that names an object in memory."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError) and instead:
        words = instead
    return Unusable("truncated" if "truncated" in words.lower() else "corrupt", words)


def is_looked_at(file: str) -> bool:
    """Tell whether a file name has an extension in `LOOKED_AT`."""
    return file.lower().endswith(LOOKED_AT)


def find_refused(files: Sequence[str]) -> dict[int, str]:
    """Check the headers of files with an extension in `LOOKED_AT`; return index and reason of each refused file.

    Missing files are not refused here.
    """
    looked_at = [index for index, file in enumerate(files) if is_looked_at(file)]
    if not looked_at:
        return {}
    # Threads, since the files may be on a network. Warning filters are global to all of them.
    with warnings.catch_warnings(), ThreadPoolExecutor(32) as pool:
        warnings.simplefilter("ignore")
        reasons = pool.map(lambda index: _why_refused(files[index]), looked_at)
        return {index: why for index, why in zip(looked_at, reasons, strict=True) if why}


def _why_refused(file: str) -> str | None:
    try:
        with open(file, "rb") as stream:
            open_image(stream, Path(file).suffix.lower())
    except OSError:
        return None
    except Unusable as why:
        return str(why)
    return None


# Each of these functions returns why a file is unsupported, or None, and raises `Unusable` if the file is damaged.
def _jpeg(image: Any, stream: IO[bytes]) -> str | None:
    # Each segment must begin where the previous one ends, up to the first that holds pixels.
    stream.seek(2)
    while (marker := stream.read(2)) != b"\xff\xda":
        if marker == b"\xff\xff":  # any number of fill bytes may precede a marker
            stream.seek(-1, 1)
            continue
        (length,) = struct.unpack(">H", stream.read(2).rjust(2, b"\0"))
        if marker[:1] != b"\xff" or length < 2:
            raise Unusable(kind="corrupt", words="its header has bytes between segments, which DALI does not skip")
        stream.seek(length - 2, 1)
    orientations = {_orientation_in(block) for block in _exif_blocks(image)} - {None}
    return "EXIF data with more than one orientation" if len(orientations) > 1 else None


def _png(image: Any, stream: IO[bytes]) -> str | None:
    # DALI's decoders look for EXIF data in all chunks, and check the chunks more strictly than Pillow.
    stream.seek(8)
    seen: set[bytes] = set()
    colours = b""
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        content, check = stream.read(length), stream.read(4)
        if not kind[:1].isupper():  # ancillary chunks, which a decoder may ignore
            continue
        if len(check) < 4:
            break
        fault = None
        if zlib.crc32(kind + content) != int.from_bytes(check, "big"):
            fault = "does not match its checksum"
        elif kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            return "PNG with non-standard chunks"
        elif kind in seen and kind != b"IDAT":
            fault = "appears twice"
        elif kind == b"IHDR" and content[10:11] != b"\0":
            fault = "names an unknown compression"
        elif kind == b"PLTE" and (length % 3 or b"IDAT" in seen):
            fault = "has a wrong length, or follows the pixels"
        if fault:
            raise Unusable(kind="corrupt", words=f"its chunk {kind.decode('latin-1')!r} {fault}")
        if kind == b"IHDR":
            colours = content[9:10]
        seen.add(kind)
        if kind == b"IEND":
            if colours == b"\x03" and b"PLTE" not in seen:
                raise Unusable(kind="corrupt", words="it has no palette")
            return None
    raise Unusable(kind="truncated", words="it has no complete IEND chunk")


def _webp(image: Any, stream: IO[bytes]) -> str | None:
    # DALI looks for EXIF data if the header announces them. It does not skip the padding byte after a chunk of odd
    # length, and so reaches the end of the file.
    stream.seek(12)
    kind, length, flags = struct.unpack("<4sIB", stream.read(9))
    if kind != b"VP8X" or not flags & 8:
        return None
    while kind != b"EXIF":
        stream.seek(length - (kind == b"VP8X"), 1)
        header = stream.read(8)
        if len(header) < 8:
            return "EXIF data missing, or after a chunk of odd length"
        kind, length = struct.unpack("<4sI", header)
    return None


def _bmp(image: Any, stream: IO[bytes]) -> str | None:
    stream.seek(14)
    header = stream.read(52)
    (length,) = struct.unpack_from("<I", header)
    if length == 12:
        bits, compression = struct.unpack_from("<H", header, 10)[0], 0
    else:
        bits, compression = struct.unpack_from("<HI", header, 14)
    if bits == 16:
        return "BMP with 16 bits per pixel"
    if compression == 3 and bits == 32 and header[40:52] == struct.pack("<III", 0xFF0000, 0xFF00, 0xFF):
        return None
    return f"BMP with compression {compression}" if compression else None


_GAP = rb"\s(?:\s|#[^\n]*\n)*"
_NUMBERS = _GAP + rb"\d+" + _GAP + rb"\d+"
_PNM_HEADER = re.compile(rb"P4" + _NUMBERS + rb"\s|P[56]" + _NUMBERS + _GAP + rb"0*255\s")


def _ppm(image: Any, stream: IO[bytes]) -> str | None:
    stream.seek(0)
    if _PNM_HEADER.match(stream.read(4096)):
        return None
    return "PPM that is not binary, has a maximum value other than 255, or has a comment right after a number"


# Photometric interpretation and bits of each sample.
_TIFF_PIXELS = {
    (0, (8,)): "grey, white is 0",
    (1, (8,)): "grey",
    (1, (16,)): "grey",
    (2, (8, 8, 8)): "RGB",
    (2, (16, 16, 16)): "RGB",
    (2, (8, 8, 8, 8)): "RGB and alpha",
    (2, (16, 16, 16, 16)): "RGB and alpha",
    (3, (8,)): "palette",
    (5, (8, 8, 8, 8)): "CMYK",
    (6, (8, 8, 8)): "YCbCr",
}
# DALI reads these tags as 16-bit integers only: bits, compression, interpretation, samples, planes, extra samples,
# sample format.
_TIFF_16_BIT_TAGS = (258, 259, 262, 277, 284, 338, 339)
# None, LZW, JPEG, deflate, PackBits, deflate with its old number, Zstandard.
_TIFF_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946, 50000)


def _tiff(image: Any, stream: IO[bytes]) -> str | None:
    tags = image.tag_v2
    if any(tags.tagtype.get(tag, 3) != 3 for tag in _TIFF_16_BIT_TAGS):
        return "TIFF with a tag of a non-standard type"
    samples, bits, interpretation = tags.get(277, 1), tags.get(258, (1,)), tags.get(262)
    compression = tags.get(259, 1)
    if len(bits) == 1:
        bits *= samples
    if (interpretation, bits) not in _TIFF_PIXELS:
        return f"TIFF with photometric interpretation {interpretation} and {'+'.join(map(str, bits))} bits"
    if set(tags.get(339, (1,))) != {1}:
        return "TIFF with samples that are not unsigned integers"
    if compression not in _TIFF_COMPRESSIONS:
        return f"TIFF with compression {compression}"
    if interpretation == 6 and compression != 7:
        return "TIFF with YCbCr colours without JPEG compression"
    if 1 in tags.get(338, ()):
        return "TIFF with colours premultiplied by alpha"
    if samples > 1 and tags.get(284, 1) != 1:
        return "TIFF with colours in separate planes"
    if interpretation == 3 and len(tags.get(320, ())) != 3 * 256:
        return "TIFF with a palette that does not have 256 entries"
    if interpretation == 5 and tags.get(332, 1) != 1:
        return "TIFF with inks other than CMYK"
    if tags.get(266, 1) != 1:
        return "TIFF with bits in reverse order"
    if tags.get(274, 1) in _TURNS:
        return f"TIFF with orientation {tags[274]}"
    return None


_CHECKS: dict[str | None, Callable[[Any, IO[bytes]], str | None]] = {
    "JPEG": _jpeg,
    "MPO": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "BMP": _bmp,
    "PPM": _ppm,
    "TIFF": _tiff,
}
