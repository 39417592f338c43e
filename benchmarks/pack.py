"""Pack a folder into archives of bounded size, for a machine that accepts small transfers only.

    python -m benchmarks.pack FOLDER OUT --megabytes 55    writes OUT/NAME-1.tar, OUT/NAME-2.tar, ...

Each archive can be unpacked by itself. Unpacked in one place, in any order, they restore FOLDER. They are not
compressed, because photographs would not get smaller.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from benchmarks import program

_FORMAT = tarfile.GNU_FORMAT


def pack(folder: Path, out: Path, limit: int) -> list[Path]:
    """Write the files of a folder into archives of at most `limit` bytes; return their paths."""
    folder = folder.resolve()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        msg = f"FOLDER must be a folder with files, got {folder}"
        raise ValueError(msg)
    out.mkdir(parents=True, exist_ok=True)
    if earlier := sorted(out.glob(f"{folder.name}-*.tar")):
        msg = f"OUT must have no archives of {folder.name}, got {earlier[0]}"
        raise ValueError(msg)
    # An archive is a whole number of records, and two blocks end it.
    room = limit // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE
    parts: list[dict[Path, str]] = []  # for each archive, the files and their names in it
    left = 0
    for path in files:
        name = str(Path(folder.name, path.relative_to(folder)))
        blocks = -(-path.stat().st_size // tarfile.BLOCKSIZE)
        taken = len(tarfile.TarInfo(name).tobuf(_FORMAT)) + blocks * tarfile.BLOCKSIZE
        if taken > room:
            msg = f"--megabytes must be enough for each file, got {limit / 1e6:g} with {path}"
            raise ValueError(msg)
        if taken > left:
            parts.append({})
            left = room
        parts[-1][path] = name
        left -= taken
    paths = [out / f"{folder.name}-{number}.tar" for number in range(1, len(parts) + 1)]
    for archive_path, part in zip(paths, parts, strict=True):
        with tarfile.open(archive_path, "w", format=_FORMAT) as archive:
            for path, name in part.items():
                archive.add(path, name)
    return paths


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to pack, with its subfolders")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the archives")
    parser.add_argument(
        "--megabytes", type=program.positive_number, default=55, help="size limit of an archive (default: %(default)s)"
    )
    options = parser.parse_args()
    for path in pack(options.folder, options.out, int(options.megabytes * 1e6)):
        program.say(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    program.run(main)
