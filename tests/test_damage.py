"""Findings in single image files, compared with how DALI decodes the same file."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dali_saliencymix.datasets.damage import EXCLUDED, NOTED, examine, find_unusable, why_unusable
from dali_saliencymix.datasets.image_folder import ImageFolder
from dali_saliencymix.datasets.sample_data import CLASSES, sample_jpeg
from dali_saliencymix.loaders.base import LoaderError
from dali_saliencymix.loaders.imagenet import validation_loader

JPEG = sample_jpeg("train", "red_square", 0)
PIXELS = JPEG.index(b"\xff\xda") + 14  # after the header of their segment
PICTURE = Image.open(io.BytesIO(JPEG)).convert("RGB")


def encoded(form: str, picture: Image.Image = PICTURE, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def changed(data: bytes, position: int, replacement: bytes) -> bytes:
    return data[:position] + replacement + data[position + len(replacement) :]


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("JPEG", exif=exif)


PNG = encoded("PNG")
FRAME = JPEG.index(b"\xff\xc0")  # the image size is five bytes later
TABLE = JPEG.index(b"\xff\xc4")
HEALTHY = {
    "plain.jpg": JPEG,
    "grey.jpeg": encoded("JPEG", PICTURE.convert("L")),
    "progressive.jpg": encoded("JPEG", progressive=True),
    "restarts.jpg": encoded("JPEG", restart_marker_blocks=4),
    "trailing_bytes.jpg": JPEG + b"\0\0 made by some camera",
    "fill_bytes.jpg": JPEG[:TABLE] + b"\xff\xff\xff" + JPEG[TABLE:],
    "two_pictures.jpg": encoded("MPO", save_all=True, append_images=[PICTURE.rotate(9)]),
    "alpha.png": encoded("PNG", PICTURE.convert("RGBA")),
    "palette.png": encoded("PNG", PICTURE.quantize(16)),
    "16_bits.png": encoded("PNG", Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80) * 16)),
    "moving.webp": encoded("WEBP", save_all=True, append_images=[PICTURE.rotate(9)]),
    "packed.tif": encoded("TIFF", compression="tiff_lzw"),
    "plain.bmp": encoded("BMP"),
    "plain.ppm": encoded("PPM"),
    "grey.pgm": encoded("PPM", PICTURE.convert("L")),
}
NOTABLE = {
    "half_black.jpg": (JPEG[: len(JPEG) // 2] + b"\xff\xd9", "bit_rot", "premature end of data segment"),
    "lost_sector.jpg": (changed(JPEG, PIXELS + 500, bytes(512)), "bit_rot", "Corrupt JPEG data"),
    "a_png.jpg": (PNG, "other_format", "PNG data in a .jpg file"),
    "a_jpeg.png": (JPEG, "other_format", "JPEG data in a .png file"),
    "print.jpg": (encoded("JPEG", PICTURE.convert("CMYK")), "cmyk", "RGB"),
    "print.tif": (encoded("TIFF", PICTURE.convert("CMYK")), "cmyk", "RGB"),
    "turned.jpg": (turned(6), "exif_rotation", "orientation 6"),
}
BAD = {
    "empty.jpg": (b"", "empty", "zero bytes"),
    "text.jpg": (b"<html>404 not found</html>", "not_an_image", "begins with b'<html>40'"),
    "zeros.jpg": (bytes(5000), "not_an_image", "begins with"),
    "late.jpg": (b"\0\0" + JPEG, "not_an_image", "begins with"),
    "a_gif.jpg": (encoded("GIF"), "unsupported", "GIF data"),
    "an_avif.jpg": (encoded("AVIF"), "unsupported", "AVIF data"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated", "Premature end"),
    "without_its_end.jpg": (JPEG[:-1], "truncated", "Premature end"),
    "zeros_to_the_end.jpg": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "truncated", "Premature end"),
    "half.png": (PNG[: len(PNG) // 2], "truncated", "IEND"),
    "without_its_end.png": (PNG[:-12], "truncated", "IEND"),
    "half.bmp": (encoded("BMP")[:5000], "truncated", "truncated"),
    "half.ppm": (encoded("PPM")[:5000], "truncated", "truncated"),
    "half.tif": (encoded("TIFF")[:5000], "truncated", "truncated"),
    "cut_in_the_header.jpg": (JPEG[:200], "truncated", "Truncated"),
    "three_bytes.jpg": (JPEG[:3], "corrupt", "header"),
    "half.webp": (encoded("WEBP")[:500], "corrupt", ""),
    "changed.png": (changed(PNG, len(PNG) // 2, b"\0\0\0\0\0"), "corrupt", "checksum"),
    "changed_end.png": (changed(PNG, len(PNG) - 5, b"\0"), "corrupt", "checksum"),
    "no_size.jpg": (changed(JPEG, FRAME + 5, bytes(4)), "corrupt", "header"),
    "12_bits.jpg": (changed(JPEG, FRAME + 4, b"\x0c"), "corrupt", "header"),
    "bad_table.jpg": (changed(JPEG, TABLE + 8, b"\xc8"), "corrupt", "broken data stream"),
    "junk_in_the_header.jpg": (JPEG[:TABLE] + b"junk" + JPEG[TABLE:], "corrupt", "between segments"),
    "huge.jpg": (changed(JPEG, FRAME + 5, b"\xff\xdc\xff\xdc"), "too_large", "4290250000 pixels"),
}


def written(tmp_path: Path, name: str, data: bytes) -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def dali_decodes(file: Path) -> bool:
    """Return whether a validation pipeline decodes a file; it decodes the whole image."""
    folder = ImageFolder(file.parent, ["one", "two"], [str(file)], [0])
    sizes = {"resize_size": 32, "crop_size": 32}
    try:
        loader = validation_loader(folder, batch_size=1, num_threads=1, device="cpu", **sizes)
        ((images, _),) = loader
    except LoaderError:
        return False
    assert images.shape == (1, 3, 32, 32)
    return True


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_files_are_not_accused_and_train(tmp_path, name):
    file = written(tmp_path, name, HEALTHY[name])
    found = examine(file)
    assert found.findings == {}
    with Image.open(file) as image:
        assert (found.size, found.mode) == (image.size, image.mode)
    assert found.file_bytes == len(HEALTHY[name])
    assert why_unusable(file) is None
    assert dali_decodes(file)


@pytest.mark.parametrize("name", NOTABLE)
def test_what_dali_decodes_all_the_same_is_noted(tmp_path, name):
    data, kind, words = NOTABLE[name]
    file = written(tmp_path, name, data)
    found = examine(file)
    assert list(found.findings) == [kind]
    assert kind in NOTED
    assert words in found.findings[kind]
    assert why_unusable(file) is None
    assert dali_decodes(file)


@pytest.mark.parametrize("name", BAD)
def test_what_stops_a_pipeline_is_excluded(tmp_path, name):
    data, kind, words = BAD[name]
    file = written(tmp_path, name, data)
    found = examine(file).findings
    assert [finding for finding in found if finding in EXCLUDED] == [kind]
    assert words in found[kind]
    assert "\n" not in found[kind]
    assert why_unusable(file) == f"{kind.replace('_', ' ')}: {found[kind]}"
    assert not dali_decodes(file)


def test_a_file_whose_bytes_cannot_be_had_is_a_finding(tmp_path):
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "folder.jpg").mkdir()
    assert examine(tmp_path / "dangling.jpg").findings == {"unreadable": "No such file or directory"}
    assert examine(tmp_path / "folder.jpg").findings == {"unreadable": "Is a directory"}
    assert why_unusable(tmp_path / "dangling.jpg") == "unreadable: No such file or directory"


def test_the_least_size_is_of_the_shorter_side(tmp_path):
    file = written(tmp_path, "thin.png", encoded("PNG", PICTURE.resize((300, 7))))
    assert examine(file, min_size=7).findings == {}
    assert examine(file, min_size=8).findings == {"too_small": "300x7 pixels, less than 8"}


def test_a_file_can_have_several_findings(tmp_path):
    file = written(tmp_path, "a.png", changed(encoded("JPEG", PICTURE.convert("CMYK")), 3000, bytes(512)))
    assert set(examine(file).findings) == {"bit_rot", "cmyk", "other_format"}


def test_most_lost_sectors_are_found_and_no_undamaged_file_is_accused(tmp_path):
    """A lost sector, 512 bytes that read as zeros, leads to a warning in nearly all cases."""
    draw = random.Random(0)
    found = 0
    for number in range(40):
        data = sample_jpeg("train", CLASSES[number % len(CLASSES)], number)
        assert examine(written(tmp_path, "whole.jpg", data)).findings == {}
        begin = draw.randrange(data.index(b"\xff\xda") + 14, len(data) - 514)
        found += "bit_rot" in examine(written(tmp_path, "rotten.jpg", changed(data, begin, bytes(512)))).findings
    assert found >= 30


def test_bad_files_are_found_among_others_in_their_order_without_a_trace_in_a_log(tmp_path, capfd):
    """A progress bar in a log file would precede the error on the same line."""
    contents = HEALTHY | {name: data for name, (data, _, _) in (BAD | NOTABLE).items()}
    files = [str(written(tmp_path, name, data)) for name, data in sorted(contents.items())]
    files.insert(5, str(tmp_path / "gone.jpg"))
    filters = list(warnings.filters)
    found = find_unusable(files)
    assert list(found) == [file for file in files if Path(file).name in {*BAD, "gone.jpg"}]
    assert found == {file: why_unusable(file) for file in found}
    assert warnings.filters == filters
    assert capfd.readouterr().err == ""
