"""Find damage in image files, by decoding them in full with libraries other than DALI.

Files that training cannot use are excluded: those that stop a DALI pipeline, and those that the backends would decode
to different pixels (`dali_saliencymix.datasets.formats`). Other findings are noted. `EXCLUDED` and `NOTED` list the
kinds of findings. The scan of a data set, the loaders and the programs that open single files all use `examine`.
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

# Kinds of findings that make a file unusable for training, with their meaning.
EXCLUDED = {
    "empty": "zero bytes",
    "unreadable": "the system cannot read it",
    "not_an_image": "does not begin like any supported image format",
    "unsupported": "an image of an unsupported kind, see docs/scan.md",
    "truncated": "ends before the image is complete",
    "corrupt": "too damaged to be decoded",
    "too_small": "a side is shorter than the minimum size",
    "too_large": "claims so many pixels that decoding it would exhaust the memory",
    "crashed": "the process that decoded it died",
    "timed_out": "reading or decoding it timed out",
    "unlistable": "its name has a line break, which a list of files cannot hold",
}
# Kinds of findings in files that are usable for training.
NOTED = {
    "bit_rot": "decoded, but the decoder warned of damage: part of the image may be wrong",
    "other_format": "its format does not match its file name extension",
    "cmyk": "a CMYK image, which DALI converts to RGB",
    "exif_rotation": "has an EXIF orientation, which DALI's decoders apply and torchvision's ImageFolder does not",
}

_FORMAT_OF_ENDING = {".png": "PNG", ".ppm": "PPM", ".pgm": "PPM", ".bmp": "BMP", ".webp": "WEBP"}
_FORMAT_OF_ENDING |= {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}


@dataclass(frozen=True)
class Examined:
    """The result of `examine`.

    Attributes
    ----------
    findings : dict from str to str
        Maps kinds of findings, from `EXCLUDED` and `NOTED`, to descriptions. At most one kind is from `EXCLUDED`.
    size : tuple of int, optional
        Width and height in pixels, as stored; None if the header could not be read.
    format : str
        Format as Pillow names it, such as JPEG; empty if the header could not be read.
    mode : str
        Mode as Pillow names it, such as RGB; empty if the header could not be read.
    file_bytes : int
        Size of the file in bytes.
    """

    findings: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    format: str = ""
    mode: str = ""
    file_bytes: int = 0


def examine(file: str | Path, *, min_size: int = 1) -> Examined:
    """Decode an image file in full and report what is wrong with it.

    Parameters
    ----------
    file : path
        The file. A file that cannot be read is a finding, not an error.
    min_size : int
        Minimum width and height in pixels.

    Returns
    -------
    Examined

    Notes
    -----
    libjpeg-turbo reads every byte of JPEG data and warns of invalid data. It does not compute the pixels at full size,
    which would find nothing more. A changed bit often decodes to other valid pixels, which no decoder can detect.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        return Examined({"unreadable": error.strerror or str(error)})
    if not data:
        return Examined({"empty": EXCLUDED["empty"]})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd metadata and many pixels
            return _examine_data(data, Path(file).suffix.lower(), min_size)
    except Unusable as why:
        return Examined({why.kind: why.words}, file_bytes=len(data))


def why_unusable(file: str | Path) -> str | None:
    """Return why a pipeline fails at an image file, such as ``"empty: zero bytes"``, or None if it can decode the file.

    The file is decoded in full. The text is the kind of finding, one of `EXCLUDED`, and its description.
    """
    for kind, words in examine(file).findings.items():
        if kind in EXCLUDED:
            return f"{kind.replace('_', ' ')}: {words}"
    return None


def find_unusable(files: Sequence[str]) -> dict[str, str]:
    """Return path and reason (see `why_unusable`) of each file at which a pipeline fails, in the order of `files`.

    Call it when a decoder has failed without naming a file. The files are decoded in threads. On a terminal, stderr
    shows a progress bar if the search takes long.
    """
    from tqdm import tqdm  # not in the extra preview, which examines single files

    # Warning filters are global: a thread that sets and resets them would interfere with the other threads.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        reasons = pool.map(why_unusable, files)
        bar = tqdm(reasons, "looking for bad files", len(files), leave=False, unit="file", delay=2, disable=None)
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
    """Decode the whole content, and return the decoder's warning, if there is one."""
    warning = None
    if image.format in ("JPEG", "MPO"):
        import simplejpeg  # type: ignore[import-untyped]  # training needs it only after a file has failed

        try:
            # At an eighth of the size, all data are still read, but fewer pixels are computed.
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
        except ValueError as error:
            warning = str(error)
        else:
            return None
        if "Premature end of JPEG file" in warning:
            raise Unusable(kind="truncated", words=warning)
    try:
        if image.format == "PNG":
            Image.open(io.BytesIO(data)).verify()  # all checksums; `load` checks only some of them
        image.load()
    except Exception as error:
        raise cannot_decode(error, warning) from error
    return warning
