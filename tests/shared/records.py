"""Write images and class ids as WebDataset tar, TFRecord or MXNet RecordIO, each with the index that DALI reads.

Only the standard library is needed. All numbers in the binary formats are little-endian. A sample is a pair of the
bytes of an encoded image and its class id; samples are written in the given order.
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
    Files whose names are equal up to the first dot are one sample. Class ids are decimal text. In a tar file, a header
    of 512 bytes precedes the data of each file, which are padded to a multiple of 512 bytes. The index has a line
    ``v1.2 COUNT``, then one line for each sample with extension, offset of the data, size and file name of each
    component. (DALI's documentation leaves out the name, but its reader refuses an index of this version without it.)
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
    A record has the length of its data (uint64), the masked CRC of these 8 bytes (uint32), the data, and the masked CRC
    of the data (uint32). The data are a protocol buffer: a field is a varint of ``number << 3 | 2``, a varint of its
    length, and its bytes. An Example has field 1, features, with a field 1 for each entry of a map. An entry has field
    1, the key, and field 2, the feature, which has a list of byte strings in field 1 or a list of int64 in field 3.
    These lists have a field 1 for each byte string, or a single field 1 with all integers as varints. The index has a
    line of offset and size for each record.
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
    A record is a header and the image. The header has: flag (uint32), 0 for one label, otherwise the number of float32
    labels that follow the header; label (float32); two ids (uint64), here the number of the record and 0. A record is
    stored in chunks of: magic number, ``kind << 29 | length`` (uint32), that many bytes, zeros up to a multiple of 4.
    Kind 0 is a whole record. If a record contains the magic number at a multiple of 4, the number is left out and the
    record is split there: kinds 1, 2 and 3 are its first, middle and last chunks. The index has a line of number, tab
    and offset for each record.
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
    """Return one length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Return a non-negative `value` in groups of 7 bits, low ones first; the high bit is set if more follow."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _masked_crc(data: bytes) -> bytes:
    """Return the CRC-32C rotated by 15 bits plus a constant, as TFRecord stores it."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`, with one table look-up per byte.

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
