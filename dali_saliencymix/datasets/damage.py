"""What is wrong with an image file: its content is decoded in full, by libraries other than the one that trains.

What a training cannot use is excluded: files that stop a DALI pipeline, and those of which the backends would see
other pixels (`dali_saliencymix.datasets.formats`). The rest is noted. Which of the two a kind of finding belongs to is
written in `EXCLUDED` and `NOTED`. The scan of a data set, the loaders and the programs that open single files all go by
`examine`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dali_saliencymix.datasets.formats import Unusable, cannot_decode, open_image, orientation

# Kinds of findings that stop a training, with their meaning.
EXCLUDED = {
    "empty": "zero bytes",
    "unreadable": "the system does not give its bytes",
    "not_an_image": "begins like no image format",
    "unsupported": "an image of a kind that is not read, see docs/scan.md",
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
    except Unusable as why:
        return Examined({why.kind: why.words}, file_bytes=len(data))


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
    image = open_image(io.BytesIO(data), ending)
    form = "JPEG" if image.format == "MPO" else str(image.format)
    findings = {}
    try:
        if warning := _decode(data, image):
            findings["bit_rot"] = warning
        if min(image.size) < min_size:
            findings["too_small"] = f"{image.width}x{image.height} pixels, less than {min_size}"
    except Unusable as why:
        findings[why.kind] = why.words
    if form != _FORMAT_OF_ENDING.get(ending, form):
        findings["other_format"] = f"{form} data in a {ending} file"
    if image.mode == "CMYK":
        findings["cmyk"] = NOTED["cmyk"]
    turned = orientation(image)
    if turned != 1:
        findings["exif_rotation"] = f"EXIF orientation {turned}"
    return Examined(findings, image.size, form, image.mode, len(data))


def _decode(data: bytes, image: Image.Image) -> str | None:
    """Decode all of the content; return what the decoder warns of."""
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
            raise Unusable(kind="truncated", words=warning)
    try:
        if image.format == "PNG":
            Image.open(io.BytesIO(data)).verify()  # all checksums; loading checks some of them
        image.load()
    except Exception as error:
        raise cannot_decode(error, warning) from error
    return warning
