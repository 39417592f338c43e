"""What is wrong with an image file: its content is decoded in full, by libraries other than the one that trains.

The verdicts are about training with DALI: what stops a DALI pipeline is excluded, what it decodes is noted. Which of
the two a kind of finding belongs to is written in `EXCLUDED` and `NOTED`. The scan of a data set, the loaders and the
programs that open single files all go by `examine`.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

# Kinds of findings that stop a training, with their meaning.
EXCLUDED = {
    "empty": "zero bytes",
    "unreadable": "the system does not give its bytes",
    "not_an_image": "begins like no image format",
    "unsupported": "an image in a format that DALI does not decode",
    "truncated": "ends before its image does",
    "corrupt": "damaged so much that it cannot be decoded",
    "too_small": "a side is shorter than the smallest size asked for",
    "too_large": "claims so many pixels that decoding it would take all memory",
    "crashed": "the process that decoded it died",
    "timed_out": "reading or decoding it did not end in time",
    "unlistable": "its name has a line break, which a list of files cannot hold",
}
# Kinds that a training can use.
NOTED = {
    "bit_rot": "decoded, but the decoder warned of damage: part of the picture may be wrong",
    "other_format": "its format is not the one that its ending says",
    "cmyk": "has the four colours of print; DALI turns them into RGB",
    "exif_rotation": "is turned by its EXIF data, which DALI's decoders obey and torchvision's ImageFolder does not",
}

# The first bytes of the formats that training reads.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"P2", b"P3", b"P5", b"P6", b"BM", b"II*\0", b"MM\0*", b"RIFF")

# Pillow's names of formats that DALI's decoders read whatever the file is called.
_DECODED_BY_DALI = {"JPEG", "MPO", "PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"}
_FORMAT_OF_ENDING = {".png": "PNG", ".ppm": "PPM", ".pgm": "PPM", ".bmp": "BMP", ".webp": "WEBP"}
_FORMAT_OF_ENDING |= {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}


@dataclass(frozen=True)
class Examined:
    """What an examination found.

    Attributes
    ----------
    findings : dict from str to str
        Kinds, of `EXCLUDED` and `NOTED`, with what was found in words. At most one is of `EXCLUDED`.
    size : tuple of int, optional
        Width and height in pixels, as stored; None if the header could not be read.
    format, mode : str
        Pillow's names of format and pixels, such as JPEG and RGB; empty if the header could not be read.
    file_bytes : int
        Length of the file.
    """

    findings: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    format: str = ""
    mode: str = ""
    file_bytes: int = 0


class _Fault(Exception):
    """Ends the examination, with a finding."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind, self.words = kind, words


def examine(file: str | Path, *, min_size: int = 1) -> Examined:
    """Decode an image file in full and say what is wrong with it.

    Parameters
    ----------
    file : path
        A file. One that cannot be read is a finding, not an error.
    min_size : int
        Smallest width and height in pixels.

    Returns
    -------
    Examined

    Notes
    -----
    JPEG data go through libjpeg-turbo, which reads every byte of them and tells of what it could not make sense of.
    Their pixels are not computed at full size, since that finds nothing more. A changed bit often leads to other
    pixels that are as valid as the right ones: no decoder can tell.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        return Examined({"unreadable": error.strerror or str(error)})
    if not data:
        return Examined({"empty": EXCLUDED["empty"]})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata and of many pixels
            return _examine_data(data, Path(file).suffix.lower(), min_size)
    except _Fault as fault:
        return Examined({fault.kind: fault.words}, file_bytes=len(data))


def why_unusable(file: str | Path) -> str | None:
    """Return why a pipeline fails at an image file, such as ``"empty: zero bytes"``, or None if it decodes the file.

    The file is decoded in full; the text is the finding of `EXCLUDED` and what was found.
    """
    for kind, words in examine(file).findings.items():
        if kind in EXCLUDED:
            return f"{kind.replace('_', ' ')}: {words}"
    return None


def find_unusable(files: Sequence[str]) -> dict[str, str]:
    """Return path and reason (`why_unusable`) of each file that a pipeline fails at, in the order of `files`.

    For a decoder that has failed without naming a file. The files are decoded in threads. On a terminal, a progress bar
    on stderr shows a search that takes long.
    """
    from tqdm import tqdm  # not in the extra preview, which examines single files

    # The filters of warnings belong to all threads: those of one would end, or come back, in the middle of another.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        reasons = pool.map(why_unusable, files)
        bar = tqdm(reasons, "looking for it", len(files), leave=False, unit="file", delay=2, disable=None)
        return {file: why for file, why in zip(files, bar, strict=True) if why}


def _examine_data(data: bytes, ending: str, min_size: int) -> Examined:
    image = _opened(data)
    form = "JPEG" if image.format == "MPO" else str(image.format)
    findings = {}
    fault = _fault_of_content(data, image)
    if fault is None and min(image.size) < min_size:
        fault = ("too_small", f"{image.width}x{image.height} pixels, less than {min_size}")
    if fault is not None:
        findings[fault[0]] = fault[1]
    if form != _FORMAT_OF_ENDING.get(ending, form):
        findings["other_format"] = f"{form} data in a {ending} file"
    if image.mode == "CMYK":
        findings["cmyk"] = NOTED["cmyk"]
    turned = _orientation(image)
    if turned != 1:
        findings["exif_rotation"] = f"EXIF orientation {turned}"
    return Examined(findings, image.size, form, image.mode, len(data))


def _opened(data: bytes) -> Image.Image:
    """Return the image with its header read."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise _Fault(kind="too_large", words=str(error).partition(" exceeds")[0]) from error
    except Exception as error:  # Pillow raises errors of many types over damaged headers
        if not data.startswith(_SIGNATURES):
            raise _Fault(kind="not_an_image", words=f"begins with {data[:8]!r}") from error
        raise _Fault(*_cannot_decode(error, "its header cannot be read")) from error
    if image.format not in _DECODED_BY_DALI:
        raise _Fault(kind="unsupported", words=f"{image.format} data")
    return image


def _fault_of_content(data: bytes, image: Image.Image) -> tuple[str, str] | None:
    """Decode all of the content and return what is wrong with it: kind and words."""
    warning = None
    if image.format in ("JPEG", "MPO"):
        import simplejpeg  # type: ignore[import-untyped]  # a training does without it until a file has failed

        try:
            # An eighth of the size: everything is read, and only the pixels are fewer.
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
        except ValueError as error:
            warning = str(error)
        else:
            return None
        if "Premature end of JPEG file" in warning:
            return "truncated", warning
        if not _has_unbroken_header(data):
            return "corrupt", f"{warning}, which DALI's reader of headers does not skip"
    try:
        if image.format == "PNG":
            Image.open(io.BytesIO(data)).verify()  # all checksums; loading checks some of them
        image.load()
    except Exception as error:
        return _cannot_decode(error, warning)
    return ("bit_rot", warning) if warning else None


def _has_unbroken_header(data: bytes) -> bool:
    """Whether each segment of a JPEG file begins where the one before ends, up to the first that holds pixels."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return True
        fill = marker == 0xFF  # any number of these bytes may stand before a marker
        position += 1 if fill else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _cannot_decode(error: Exception, warning: str | None) -> tuple[str, str]:
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError) and warning:
        words = warning  # Pillow names an object in memory
    return ("truncated" if "truncated" in words.lower() else "corrupt"), words


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # damaged metadata turn nothing
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in range(1, 9):
            return int(orientation)
    return 1
