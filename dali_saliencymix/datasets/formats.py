"""Which image files are read, how their pixels are converted, and which are refused: the same for every backend.

DALI's decoders and Pillow read the same pixels from most files, and other ones from a few. `to_rgb` converts as DALI
does where that is right. The rest is refused by `open_image`, before any pixel is decoded. docs/scan.md has the table.

DALI's pipelines do not run Python for each image. They take any JPEG, PNG and WebP file, and refuse other contents
unless the name has one of the endings in `LOOKED_AT`. The loaders look at the headers of these files beforehand.
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

# Endings of the formats that hold more kinds of pixels than DALI and Pillow agree on.
LOOKED_AT = (".bmp", ".ppm", ".pgm", ".tif", ".tiff")

# The first bytes of the formats that are read.
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
# Further tags that DALI reads, and without which it takes no orientation: texts, and how many rational numbers.
_EXIF_TEXTS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298)
_EXIF_RATIONALS = {0x011A: 1, 0x011B: 1, 0x013E: 2, 0x013F: 6, 0x0211: 3, 0x0214: 6}


class Unusable(Exception):
    """A file that is not used: `kind` is one of `dali_saliencymix.datasets.damage.EXCLUDED`, `words` say more."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(f"{kind.replace('_', ' ')}: {words}")
        self.kind, self.words = kind, words


def open_image(stream: IO[bytes], ending: str) -> Image.Image:
    """Read the header of an image, of a PNG file also the frame of its chunks, or raise `Unusable`.

    Parameters
    ----------
    stream : binary file
        At its beginning, and open for as long as the image is used.
    ending : str
        The ending of the file's name, such as ``".jpg"``, in lower case.

    Returns
    -------
    PIL.Image.Image
        With its pixels not decoded yet.
    """
    start = stream.read(8)
    stream.seek(0)
    try:
        image = Image.open(stream)
    except Image.DecompressionBombError as error:
        raise Unusable(kind="too_large", words=str(error).partition(" exceeds")[0]) from error
    except Exception as error:  # Pillow raises errors of many types over damaged headers
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
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:  # of values that cannot be
        raise Unusable(kind="corrupt", words="its header cannot be read") from error
    if words:
        raise Unusable(kind="unsupported", words=words)
    stream.seek(place)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image of `open_image` as DALI does: 8-bit RGB, turned by its EXIF orientation.

    Transparency is dropped, and 16-bit samples keep their upper 8 bits.
    """
    if image.format == "TIFF":
        image.info.pop("xmp", None)  # by which Pillow turns these while it loads them
    image.load()
    turn = _TURNS.get(orientation(image))
    if image.mode.startswith("I"):  # one channel of 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes all of them for Adobe's, whose values are inverted
    image.info.pop("transparency", None)  # over which Pillow warns when it drops it
    image = image.convert("RGB")
    return image.transpose(turn) if turn is not None else image


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image of `open_image`, 1 to 8; of a PNG file once its pixels are loaded.

    Pillow's own function takes it from XMP and text chunks as well, which DALI does not read.
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
    """Return what the first directory of EXIF data says; None if it says nothing, or a value lies behind their end."""
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
    """Return what an error of Pillow says about a file; `instead` replaces text that names an object in memory."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError) and instead:
        words = instead
    return Unusable("truncated" if "truncated" in words.lower() else "corrupt", words)


def find_refused(files: Sequence[str]) -> dict[int, str]:
    """Look at the headers of those `files` whose endings are in `LOOKED_AT`; return index and reason of the refused.

    A file that is not there is not refused here.
    """
    looked_at = [index for index, file in enumerate(files) if file.lower().endswith(LOOKED_AT)]
    if not looked_at:
        return {}
    # Threads, since the files may be far away. Filters of warnings belong to all of them.
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


# Each of these returns what makes a file unsupported, and raises `Unusable` where it is damaged.
def _jpeg(image: Any, stream: IO[bytes]) -> str | None:
    # Each segment has to begin where the one before ends, up to the first that holds pixels.
    stream.seek(2)
    while (marker := stream.read(2)) != b"\xff\xda":
        if marker == b"\xff\xff":  # any number of these bytes may stand before a marker
            stream.seek(-1, 1)
            continue
        (length,) = struct.unpack(">H", stream.read(2).rjust(2, b"\0"))
        if marker[:1] != b"\xff" or length < 2:
            raise Unusable(kind="corrupt", words="its header has bytes between segments, which DALI does not skip")
        stream.seek(length - 2, 1)
    orientations = {_orientation_in(block) for block in _exif_blocks(image)} - {None}
    return "EXIF data with more than one orientation" if len(orientations) > 1 else None


def _png(image: Any, stream: IO[bytes]) -> str | None:
    # What the reader of DALI's decoders insists on, and Pillow does not. They look for EXIF data in all chunks.
    stream.seek(8)
    seen: set[bytes] = set()
    colours = b""
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        content, check = stream.read(length), stream.read(4)
        if not kind[:1].isupper():  # nobody has to know these
            continue
        if len(check) < 4:
            break
        fault = None
        if zlib.crc32(kind + content) != int.from_bytes(check, "big"):
            fault = "does not agree with its check sum"
        elif kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            return "PNG with chunks of another standard"
        elif kind in seen and kind != b"IDAT":
            fault = "comes twice"
        elif kind == b"IHDR" and content[10:11] != b"\0":
            fault = "names an unknown compression"
        elif kind == b"PLTE" and (length % 3 or b"IDAT" in seen):
            fault = "has a wrong length, or comes behind the pixels"
        if fault:
            raise Unusable(kind="corrupt", words=f"its chunk {kind.decode('latin-1')!r} {fault}")
        if kind == b"IHDR":
            colours = content[9:10]
        seen.add(kind)
        if kind == b"IEND":
            if colours == b"\x03" and b"PLTE" not in seen:
                raise Unusable(kind="corrupt", words="it has no palette")
            return None
    raise Unusable(kind="truncated", words="it has no whole IEND chunk")


def _webp(image: Any, stream: IO[bytes]) -> str | None:
    # DALI looks for EXIF data where the header says that there are some. It does not skip the byte behind a chunk of
    # odd length, and comes to the end of the file.
    stream.seek(12)
    kind, length, flags = struct.unpack("<4sIB", stream.read(9))
    if kind != b"VP8X" or not flags & 8:
        return None
    while kind != b"EXIF":
        stream.seek(length - (kind == b"VP8X"), 1)
        header = stream.read(8)
        if len(header) < 8:
            return "EXIF data missing, or behind a chunk of odd length"
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
        return "BMP with 16 bits a pixel"
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
    return "PPM that is not binary, has a largest value other than 255, or a comment right behind a number"


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
# Of these DALI reads no other type: bits, compression, interpretation, samples, planes, extra samples, sample format.
_TIFF_16_BIT_TAGS = (258, 259, 262, 277, 284, 338, 339)
# None, LZW, JPEG, deflate, PackBits, deflate under its old number, Zstandard.
_TIFF_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946, 50000)


def _tiff(image: Any, stream: IO[bytes]) -> str | None:
    tags = image.tag_v2
    if any(tags.tagtype.get(tag, 3) != 3 for tag in _TIFF_16_BIT_TAGS):
        return "TIFF with a tag of another type than in the standard"
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
        return "TIFF of YCbCr without JPEG compression"
    if 1 in tags.get(338, ()):
        return "TIFF with colours that are multiplied by alpha"
    if samples > 1 and tags.get(284, 1) != 1:
        return "TIFF with its colours in separate planes"
    if interpretation == 3 and len(tags.get(320, ())) != 3 * 256:
        return "TIFF with a palette of another size"
    if interpretation == 5 and tags.get(332, 1) != 1:
        return "TIFF with other inks than CMYK"
    if tags.get(266, 1) != 1:
        return "TIFF with its bits in reverse order"
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
