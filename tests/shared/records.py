"""Writes images and class ids as WebDataset tar, TFRecord or MXNet RecordIO, each with the index that DALI reads.

Needs the standard library only. All numbers in the binary formats are little-endian. Samples are pairs of the bytes of
an encoded image and its class id; they are written in the order in which they come.
"""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

Sample = tuple[bytes, int]


def write_tar(samples: Iterable[Sample], archive: str | Path, index: str | Path) -> None:
    """Write a WebDataset archive: ``00000000.jpg`` and ``00000000.cls`` for the first sample, and so on.

    Parameters
    ----------
    samples : iterable of (bytes, int)
        Encoded images and class ids.
    archive, index : path
        Files to write.

    Notes
    -----
    Files of one name up to its first dot are one sample. Class ids are decimal text. In a tar file a header of 512
    bytes comes before each file's data, which is filled up to a multiple of 512. The index: a line ``v1.2 COUNT``, then
    for each sample a line of extension, offset of the data, its size and the file's name, for one component after the
    other. (DALI's documentation leaves the name out; its reader refuses an index of this version without it.)
    """
    lines = []
    with open(archive, "wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (image, label) in enumerate(samples):
            components = []
            for extension, data in (("jpg", image), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:08d}.{extension}")
                entry.size = len(data)
                components.append(f"{extension} {tar.offset + tarfile.BLOCKSIZE} {len(data)} {entry.name}")
                tar.addfile(entry, io.BytesIO(data))
            lines.append(" ".join(components))
    _write_lines(index, [f"v1.2 {len(lines)}", *lines])


def write_tfrecord(samples: Iterable[Sample], path: str | Path, index: str | Path) -> None:
    """Write a TFRecord file of ``tf.train.Example`` messages: ``image/encoded`` and ``image/class/label``.

    Parameters
    ----------
    samples : iterable of (bytes, int)
        Encoded images and class ids, which must not be negative.
    path, index : path
        Files to write.

    Raises
    ------
    ValueError
        If a class id is negative.

    Notes
    -----
    A record is the length of its data (uint64), the masked CRC of these 8 bytes (uint32), the data, the masked CRC of
    the data (uint32). The data are a protocol buffer: a field is a varint of ``number << 3 | 2``, a varint of its
    length and its bytes. An Example has the field 1, features, which has a field 1 for each entry of a map: 1, its
    key, and 2, its feature, which holds in 1 a list of byte strings or in 3 one of int64. Both lists are fields 1:
    each byte string by itself, the integers as varints in one. The index: a line of offset and size for each record.
    """
    lines = []
    with open(path, "wb") as stream:
        for image, label in samples:
            if label < 0:
                msg = f"class ids must not be negative, got {label}"
                raise ValueError(msg)
            features = [
                ("image/class/label", _field(3, _field(1, _varint(label)))),
                ("image/encoded", _field(1, _field(1, image))),
            ]
            data = _field(1, b"".join(_field(1, _field(1, key.encode()) + _field(2, value)) for key, value in features))
            length = struct.pack("<Q", len(data))
            record = length + _masked_crc(length) + data + _masked_crc(data)
            lines.append(f"{stream.tell()} {len(record)}")
            stream.write(record)
    _write_lines(index, lines)


def write_recordio(samples: Iterable[Sample], path: str | Path, index: str | Path) -> None:
    """Write an MXNet RecordIO file, as ``im2rec`` does.

    Parameters
    ----------
    samples : iterable of (bytes, int)
        Encoded images and class ids, which the format keeps as float32: exact up to 2**24.
    path, index : path
        Files to write.

    Notes
    -----
    A record is a header and the image. The header: flag (uint32), 0 for one label, or else the number of float32 labels
    that follow the header; label (float32); two ids (uint64), here the number of the record and 0. A record lies in the
    file as chunks of: magic number, ``kind << 29 | length`` (uint32), that many bytes, zeros up to a multiple of 4.
    Kind 0 is a whole record. Where the magic number stands in a record, at a multiple of 4, it is left out and the
    record is parted there: kinds 1, 2 .., 3 are its first, middle and last chunks. The index: a line of number, tab and
    offset for each record.
    """
    lines = []
    with open(path, "wb") as stream:
        for number, (image, label) in enumerate(samples):
            lines.append(f"{number}\t{stream.tell()}")
            parts = _split_at_magic(struct.pack("<IfQQ", 0, label, number, 0) + image)
            for place, part in enumerate(parts):
                kind = 0 if len(parts) == 1 else 1 if place == 0 else 3 if place == len(parts) - 1 else 2
                stream.write(_MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4))
    _write_lines(index, lines)


_MAGIC = struct.pack("<I", 0xCED7230A)


def _split_at_magic(record: bytes) -> list[bytes]:
    parts, begin, found = [], 0, record.find(_MAGIC)
    while found >= 0:
        if found % 4 == 0:
            parts.append(record[begin:found])
            begin = found + 4
        found = record.find(_MAGIC, begin if found % 4 == 0 else found + 1)
    return [*parts, record[begin:]]


def _write_lines(path: str | Path, lines: list[str]) -> None:
    Path(path).write_bytes("".join(f"{line}\n" for line in lines).encode())


def _field(number: int, data: bytes) -> bytes:
    """Return one field of a protocol buffer, of the kind that says its length."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Return `value`, not negative, in groups of 7 bits, low ones first; a high bit says that more follow."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _masked_crc(data: bytes) -> bytes:
    """Return the CRC-32C turned by 15 bits plus a constant: what TFRecord keeps, as data may hold CRCs themselves."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`, by one table look-up a byte.

    Examples
    --------
    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc_of_a_byte(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_CRC_TABLE = [_crc_of_a_byte(byte) for byte in range(256)]
