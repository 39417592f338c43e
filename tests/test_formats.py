"""Image files of all formats: all backends read the same pixels, or none reads the file and the scan says why."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from shared.batches import epoch, ids

from dali_saliencymix.datasets.damage import EXCLUDED, examine, why_unusable
from dali_saliencymix.datasets.formats import LOOKED_AT, find_refused
from dali_saliencymix.datasets.image_folder import EXTENSIONS, ImageFolder
from dali_saliencymix.loaders.base import LoaderError
from dali_saliencymix.loaders.folder import FolderData
from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

SIDE = 48
HERE = Processes(0, 0, 1, torch.device("cpu"))
Y, X = np.mgrid[:SIDE, :SIDE] / SIDE
PIXELS = np.stack([40 + 190 * X, 220 - 190 * Y, 90 + 60 * np.cos(7 * X * Y)], 2).astype(np.uint8)
ALPHA = np.tile(np.arange(SIDE, dtype=np.uint8) * 5, (SIDE, 1))
PICTURE = Image.fromarray(PIXELS)
GREY = np.asarray(PICTURE.convert("L"))
GREY16 = GREY.astype(np.uint16) * 256 + 99
TRANSPARENT = Image.fromarray(np.dstack([PIXELS, ALPHA]))
LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")


def encoded(form: str, picture: Image.Image = PICTURE, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(colour: int, bits: int, samples: np.ndarray, passes=((0, 0, 1, 1),)) -> bytes:
    """Write a PNG of samples (H, W, channels) without a filter; with Adam7 in seven passes."""
    rows = [row for y, x, down, right in passes for row in samples[y::down, x::right] if row.size]
    pixels = zlib.compress(b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour, 0, 0, len(passes) > 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def tiff(pixels: list[bytes], interpretation: int, bits: int, samples: int, **more: int | list[int]) -> bytes:
    """Write a TIFF of planes or full-height strips, with extra tags such as ``t338=2`` or ``t320=[1, 2, 3]``."""
    tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: interpretation, 277: samples, 278: SIDE}
    tags |= {int(name[1:]): value for name, value in more.items() if isinstance(value, int)}
    data = b"".join(pixels)
    offsets = [8 + sum(map(len, pixels[:number])) for number in range(len(pixels))]
    arrays = {258: [bits] * samples, 273: offsets, 279: [len(part) for part in pixels]}
    arrays |= {int(name[1:]): value for name, value in more.items() if isinstance(value, list)}
    tail = 8 + len(data)
    entries = b""
    extra = b""
    at = tail + 2 + 12 * len({*tags, *arrays}) + 4
    for tag in sorted({*tags, *arrays}):
        values = arrays.get(tag, [tags.get(tag)])
        kind = 4 if tag in (273, 279) else 3
        packed = struct.pack(f"<{len(values)}{'HI'[kind - 3]}", *values).ljust(4, b"\0")
        if len(packed) > 4:
            extra += packed
            packed = struct.pack("<I", at + len(extra) - len(packed))
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed
    count = struct.pack("<H", len(entries) // 12)
    return b"II*\0" + struct.pack("<I", tail) + data + count + entries + bytes(4) + extra


def bmp(bits: int, pixels: bytes, *, compression: int = 0, masks: tuple[int, ...] = (), height: int = SIDE) -> bytes:
    palette = b"".join(bytes([n, n, n, 0]) for n in range(256)) if bits == 8 else struct.pack(f"<{len(masks)}I", *masks)
    begin = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, SIDE, height, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", begin + len(pixels), 0, 0, begin) + header + palette + pixels


def with_segment(jpeg: bytes, *contents: bytes) -> bytes:
    return jpeg[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(c) + 2) + c for c in contents) + jpeg[2:]


def exif(*entries: tuple[int, int, int, int]) -> bytes:
    """Return a segment of EXIF data whose entries are tag, type, count and value."""
    directory = b"".join(struct.pack(">HHII", *entry) for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + directory + bytes(4)


def without_adobe(jpeg: bytes) -> bytes:
    begin = jpeg.index(b"\xff\xee")
    return jpeg[:begin] + jpeg[begin + 2 + int.from_bytes(jpeg[begin + 2 : begin + 4], "big") :]


def webp_of_odd_length() -> bytes:
    """Return lossless WebP data with EXIF data after a chunk of odd length."""
    for width in range(30, SIDE):
        data = encoded("WEBP", PICTURE.resize((width, SIDE)), lossless=True, exif=turned_by(1))
        if data[34] % 2:  # the chunk of the pixels starts after 30 bytes
            return data
    raise AssertionError


JPEG = encoded("JPEG", quality=95, subsampling=0)
XMP = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><x:d tiff:Orientation="6"/></x:xmpmeta>'
ORIENTED = (0x0112, 3, 1, 6 << 16)
FLOAT = Image.fromarray(GREY.astype(np.float32) / 255)
PNG = encoded("PNG")
PPM, PGM = encoded("PPM"), encoded("PPM", PICTURE.convert("L"))
SIZE = b"%d %d" % (SIDE, SIDE)
INK = PICTURE.convert("CMYK")
BGRA = np.dstack([PIXELS[..., ::-1], ALPHA])

COLOUR, GREY_ONLY, TURNED = PICTURE, PICTURE.convert("L").convert("RGB"), PICTURE.transpose(Image.Transpose.ROTATE_270)
BILEVEL = PICTURE.convert("1").convert("RGB")
READ = {  # file, content, what it shows
    "16.png": (png(0, 16, GREY16), GREY_ONLY),
    "16_interlaced.png": (png(0, 16, GREY16, ADAM7), GREY_ONLY),
    "interlaced.png": (png(2, 8, PIXELS, ADAM7), COLOUR),
    "16_rgb.png": (png(2, 16, PIXELS.astype(np.uint16) * 257), COLOUR),
    "16_alpha.png": (png(4, 16, np.dstack([GREY16, ALPHA.astype(np.uint16) * 257])), GREY_ONLY),
    "alpha.png": (encoded("PNG", TRANSPARENT), COLOUR),
    "palette.png": (encoded("PNG", PICTURE.quantize(256), transparency=bytes(range(256))), COLOUR),
    "1.png": (encoded("PNG", PICTURE.convert("1")), BILEVEL),
    "turned.png": (encoded("PNG", exif=turned_by(6)), TURNED),
    "xmp.png": (encoded("PNG", xmp=XMP), COLOUR),
    "print.jpg": (encoded("JPEG", INK, quality=95), COLOUR),
    "print_without_adobe.jpg": (
        without_adobe(encoded("JPEG", ImageOps.invert(PICTURE.convert("RGB")).convert("CMYK"))),
        None,
    ),
    "rgb.jpg": (encoded("JPEG", keep_rgb=True, quality=95), COLOUR),
    "progressive.jpg": (encoded("JPEG", progressive=True, quality=95, subsampling=0), COLOUR),
    "grey.jpg": (encoded("JPEG", PICTURE.convert("L"), quality=95), GREY_ONLY),
    "xmp.jpg": (with_segment(JPEG, b"http://ns.adobe.com/xap/1.0/\0" + XMP), COLOUR),
    "turned_short.jpg": (with_segment(JPEG, exif(ORIENTED)), TURNED),
    "turned_long.jpg": (with_segment(JPEG, exif((0x0112, 4, 1, 6))), COLOUR),
    "turned_twice.jpg": (with_segment(JPEG, exif(ORIENTED), exif(ORIENTED)), TURNED),
    "turned_late.jpg": (with_segment(JPEG, exif(), exif(ORIENTED)), TURNED),
    "turned_damaged.jpg": (with_segment(JPEG, exif(ORIENTED, (0x010F, 2, 100, 9000))), COLOUR),
    "turned_damaged_elsewhere.jpg": (with_segment(JPEG, exif(ORIENTED, (0x9999, 2, 100, 9000))), TURNED),
    **{f"turned_{n}.jpg": (encoded("JPEG", exif=turned_by(n), quality=95), None) for n in (2, 3, 4, 5, 7, 8)},
    "a_png.jpg": (encoded("PNG"), COLOUR),
    "a_webp.jpg": (encoded("WEBP", lossless=True), COLOUR),
    "a_jpeg.tif": (JPEG, COLOUR),
    "plain.tif": (encoded("TIFF"), COLOUR),
    "16.tif": (encoded("TIFF", Image.fromarray(GREY16)), GREY_ONLY),
    "16_rgb.tif": (tiff([(PIXELS.astype("<u2") * 257).tobytes()], 2, 16, 3), COLOUR),
    "white_is_0.tif": (tiff([(255 - GREY).tobytes()], 0, 8, 1), GREY_ONLY),
    "alpha.tif": (tiff([np.dstack([PIXELS, ALPHA]).tobytes()], 2, 8, 4, t338=2), COLOUR),
    "palette.tif": (encoded("TIFF", PICTURE.quantize(256)), COLOUR),
    "print.tif": (encoded("TIFF", INK), COLOUR),
    "pages.tif": (encoded("TIFF", save_all=True, append_images=[PICTURE.rotate(180)]), COLOUR),
    "xmp.tif": (encoded("TIFF", tiffinfo={700: XMP}), COLOUR),
    **{f"{c}.tif": (encoded("TIFF", compression=c), COLOUR) for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits")},
    "jpeg.tif": (encoded("TIFF", compression="jpeg", quality=95), COLOUR),
    "24.bmp": (encoded("BMP"), COLOUR),
    "8.bmp": (encoded("BMP", PICTURE.convert("L")), GREY_ONLY),
    "1.bmp": (encoded("BMP", PICTURE.convert("1")), BILEVEL),
    "32.bmp": (bmp(32, BGRA[::-1].tobytes()), COLOUR),
    "32_masks.bmp": (bmp(32, BGRA[::-1].tobytes(), compression=3, masks=(0xFF0000, 0xFF00, 0xFF)), COLOUR),
    "top_down.bmp": (bmp(24, PIXELS[..., ::-1].tobytes(), height=-SIDE), COLOUR),
    "binary.ppm": (PPM, COLOUR),
    "comment.pgm": (PGM.replace(b"P5", b"P5 # made by a program\n# of two lines", 1), GREY_ONLY),
    "bits.pgm": (encoded("PPM", PICTURE.convert("1")), BILEVEL),
    "lossy.webp": (encoded("WEBP", quality=95), COLOUR),
    "lossless.webp": (encoded("WEBP", lossless=True), COLOUR),
    "alpha.webp": (encoded("WEBP", TRANSPARENT, lossless=True, exact=True), COLOUR),
    "moving.webp": (encoded("WEBP", lossless=True, save_all=True, append_images=[PICTURE.rotate(180)]), COLOUR),
    "xmp.webp": (encoded("WEBP", lossless=True, xmp=XMP), COLOUR),
    "CAPITALS.JPG": (JPEG, COLOUR),
}
REFUSED = {  # file, content, what the scan says
    "float.tif": (encoded("TIFF", FLOAT), "and 32 bits"),
    "32.tif": (encoded("TIFF", Image.fromarray(GREY.astype(np.int32))), "and 32 bits"),
    "1.tif": (encoded("TIFF", PICTURE.convert("1")), "and 1 bits"),
    "grey_alpha.tif": (encoded("TIFF", TRANSPARENT.convert("LA")), "8+8 bits"),
    "lab.tif": (encoded("TIFF", ImageCms.applyTransform(PICTURE, LAB)), "interpretation 8"),
    "ycbcr.tif": (encoded("TIFF", PICTURE.convert("YCbCr")), "without JPEG"),
    "signed.tif": (tiff([GREY.tobytes()], 1, 8, 1, t339=2), "not unsigned"),
    "premultiplied.tif": (tiff([np.dstack([PIXELS, ALPHA]).tobytes()], 2, 8, 4, t338=1), "multiplied by alpha"),
    "planes.tif": (tiff([PIXELS[..., n].tobytes() for n in range(3)], 2, 8, 3, t284=2), "separate planes"),
    "turned.tif": (encoded("TIFF", tiffinfo={274: 6}), "orientation 6"),
    "white_is_0_16.tif": (tiff([(65535 - GREY16).tobytes()], 0, 16, 1), "16 bits"),
    "inks.tif": (tiff([np.asarray(INK).tobytes()], 5, 8, 4, t332=2), "inks other than"),
    "short_palette.tif": (tiff([GREY.tobytes()], 3, 8, 1, t320=list(range(600))), "palette that does not have"),
    "lzma.tif": (encoded("TIFF", compression="lzma"), "compression 34925"),
    "16.bmp": (bmp(16, (PIXELS[::-1, :, 0].astype("<u2") << 7).tobytes()), "16 bits"),
    "16_masks.bmp": (bmp(16, PIXELS[:, :, :2].tobytes(), compression=3, masks=(0xF800, 0x7E0, 0x1F)), "16 bits"),
    "other_masks.bmp": (bmp(32, BGRA.tobytes(), compression=3, masks=(0xFF000000, 0xFF0000, 0xFF00)), "compression 3"),
    "runs.bmp": (bmp(8, (bytes([SIDE, 200]) + b"\0\0") * SIDE + b"\0\1", compression=1), "compression 1"),
    "100.ppm": (PPM.replace(b"255", b"100", 1), "maximum value"),
    "16.pgm": (b"P5 %b 65535\n" % SIZE + GREY16.astype(">u2").tobytes(), "maximum value"),
    "plain.pgm": (b"P2 %b 255\n" % SIZE + b" ".join(b"%d" % value for value in GREY.ravel()) + b"\n", "not binary"),
    "comment.pgm": (PGM.replace(b"48 ", b"48#no blank\n ", 1), "comment"),
    "exif.webp": (webp_of_odd_length(), "odd length"),
    "two.jpg": (with_segment(JPEG, exif(ORIENTED), exif((0x0112, 3, 1, 8 << 16))), "more than one orientation"),
    "another_standard.png": (PNG[:33] + chunk(b"QQQQ", b"abc") + PNG[33:], "non-standard chunks"),
    "a_tiff.jpg": (encoded("TIFF"), "TIFF data in a .jpg file"),
    "a_float_tiff.JPEG": (encoded("TIFF", FLOAT), "TIFF data in a .jpeg file"),
    "a_bmp.png": (encoded("BMP"), "BMP data in a .png file"),
    "a_ppm.webp": (PPM, "PPM data in a .webp file"),
    "a_jpeg2000.jpg": (encoded("JPEG2000"), "JPEG2000 data"),
    "its_codestream.jpg": (encoded("JPEG2000", no_jp2=True), "JPEG2000 data"),
    "a_jpeg2000.tif": (encoded("JPEG2000"), "JPEG2000 data"),
    "a_gif.png": (encoded("GIF"), "GIF data"),
    "an_icon.png": (encoded("ICO"), "ICO data"),
    "a_gif.bmp": (encoded("GIF"), "GIF data"),
}
DAMAGED = {  # PNG files that Pillow reads and DALI does not: content, what the scan says
    "sum.png": (PNG[:-13] + bytes([PNG[-13] ^ 1]) + PNG[-12:], "its chunk 'IDAT' does not match its checksum"),
    "twice.png": (PNG[:33] + PNG[8:], "its chunk 'IHDR' appears twice"),
    "no_palette.png": (png(3, 8, GREY), "it has no palette"),
    "odd_palette.png": (PNG[:33] + chunk(b"PLTE", bytes(47)) + PNG[33:], "its chunk 'PLTE' has a wrong length"),
    "late_palette.png": (PNG[:-12] + chunk(b"PLTE", bytes(48)) + PNG[-12:], "follows the pixels"),
}


def written(folder: Path, contents: dict[str, bytes]) -> ImageFolder:
    files = [str(folder / name) for name in contents]
    for file, content in zip(files, contents.values(), strict=True):
        Path(file).write_bytes(content)
    return ImageFolder(folder, ["any", "other"], files, list(range(len(files))))


def val_loader(folder: ImageFolder, backend: str, **options):
    sizes = {"val_resize_size": SIDE, "val_crop_size": SIDE, "batch_size": 100, "workers": 1}
    wanted, count = DataOptions(data_backend=backend, device="cpu", **sizes, **options), len(folder)
    data = FolderData(folder.classes, count, count, folder.root, {}, wanted.mean, wanted.std, folder, folder)
    return data.val_loader(wanted, HERE)


def pixels_of(loader) -> np.ndarray:
    """Return the single batch as grey levels, (N, H, W, 3)."""
    ((images, _),) = epoch(loader)
    mean, std = (np.array(values) for values in IMAGENET_IN_GREY_LEVELS)
    return images.numpy().transpose(0, 2, 3, 1) * std + mean


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, np.ndarray]:
    """The pixels that each backend reads from the files in `READ`."""
    folder = written(tmp_path_factory.mktemp("read"), {name: content for name, (content, _) in READ.items()})
    return {backend: pixels_of(val_loader(folder, backend)) for backend in ("dali-cpu", "pytorch")}


@pytest.mark.parametrize("name", READ)
def test_every_backend_reads_the_same_pixels_and_the_right_ones(seen, name, tmp_path):
    content, shows = READ[name]
    number = list(READ).index(name)
    dali, pytorch = (seen[backend][number] for backend in ("dali-cpu", "pytorch"))
    assert np.abs(dali - pytorch).mean() < 1.5
    if shows is not None:
        assert np.abs(pytorch - np.asarray(shows)).mean() < 4
    folder = written(tmp_path, {name: content})
    assert why_unusable(folder.files[0]) is None
    assert find_refused(folder.files) == {}


def test_ink_without_the_mark_of_adobe_is_not_inverted(seen):
    number = list(READ).index("print_without_adobe.jpg")
    # The ink in the file is 255 minus that of the inverted picture, so black ink is full.
    assert all(pixels[number].max() < 3 for pixels in seen.values())


@pytest.mark.parametrize("name", REFUSED | DAMAGED)
def test_what_backends_read_differently_is_named_with_the_reason(tmp_path, name):
    content, words = (REFUSED | DAMAGED)[name]
    (file,) = written(tmp_path, {name: content}).files
    kind = "corrupt" if name in DAMAGED else "unsupported"
    assert [kind for kind in examine(file).findings if kind in EXCLUDED] == [kind]
    assert words in why_unusable(file)
    refused = find_refused([file])
    assert refused == ({0: why_unusable(file)} if name.lower().endswith(LOOKED_AT) else {})


@pytest.mark.parametrize("backend", ["dali-cpu", "pytorch"])
def test_every_backend_passes_over_what_the_scan_excludes(tmp_path, capfd, backend):
    good = {"good.png": encoded("PNG"), "good.tif": encoded("TIFF"), "good.jpg": JPEG}
    bad = {name: content for name, (content, _) in (REFUSED | DAMAGED).items()}
    folder = written(tmp_path, bad | good)
    loader = val_loader(folder, backend, max_bad_batches=len(bad))
    assert ids(epoch(loader)) == [len(bad) + number for number in range(3)]
    assert sorted(loader.bad_files) == sorted(folder.files[: len(bad)])
    said = capfd.readouterr().err
    assert all(f": {file}: {why_unusable(file)}; its image is left out\n" in said for file in loader.bad_files)
    assert said.count("a file is refused (") == sum(name.endswith(LOOKED_AT) for name in REFUSED)
    with pytest.raises(LoaderError, match=r"\.tif: unsupported: .*; 3 files are refused, at most 2 are allowed$"):
        val_loader(folder, backend, max_bad_batches=2)


def test_headers_are_read_of_no_other_files_than_those_with_rare_endings(tmp_path, monkeypatch):
    """The files of a folder with 1.28 million JPEG files on a network disk must not be opened one by one."""
    opened = []
    monkeypatch.setattr("builtins.open", lambda file, *_: opened.append(Path(file).suffix) or io.BytesIO(JPEG))
    find_refused([str(tmp_path / f"image{ending}") for ending in EXTENSIONS])
    assert sorted(opened) == sorted(LOOKED_AT)


def test_dali_tells_the_endings_apart_by_two_letters(tmp_path):
    """As in `image_shape`: DALI reads TIFF data with the extensions whose headers are checked, and with no other."""
    from nvidia.dali import fn, pipeline_def

    from dali_saliencymix.loaders.imagenet import image_shape

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def shape(file):
        return image_shape(fn.readers.file(files=[file])[0], [file])

    passed = set()
    for ending in (*EXTENSIONS, *(ending.upper() for ending in EXTENSIONS)):
        (file,) = written(tmp_path, {f"image{ending}": encoded("TIFF")}).files
        try:
            shape(file).run()
        except RuntimeError:
            continue
        passed.add(ending)
    assert passed == {*LOOKED_AT, *(ending.upper() for ending in LOOKED_AT)}
