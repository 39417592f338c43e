"""Unreadable files of a folder: each is reported and counted, and is replaced or left out."""

from __future__ import annotations

import sys

from dali_saliencymix.datasets.damage import why_unusable
from dali_saliencymix.datasets.formats import find_refused, is_looked_at
from dali_saliencymix.datasets.image_folder import ImageFolder
from dali_saliencymix.loaders.base import LoaderError

_CANDIDATES = 1000  # files to try as a replacement for a bad one


class BadFiles:
    """The bad files of a folder and their replacements.

    The constructor finds the files whose headers are refused; `leave_out` adds others later.

    Parameters
    ----------
    folder : ImageFolder
        The images.
    at_most : int
        Maximum number of bad files; one more is an error.
    replace : bool
        Whether the next usable file, with its label, replaces a bad one. Otherwise the image is left out.
    replaced : dict from int to int, optional
        The attribute `replaced` of an earlier instance, to resume from.
    report : bool
        Whether this process reports the files with refused headers. All processes find the same ones.

    Attributes
    ----------
    replaced : dict from int to int
        Index of the replacement for each bad file, in the order in which the bad files were found.
    rare_formats : bool
        Whether the folder has files, other than refused ones, with an extension in
        `dali_saliencymix.datasets.formats.LOOKED_AT`.

    Raises
    ------
    LoaderError
        If the headers of more than `at_most` files are refused.
    """

    def __init__(
        self,
        folder: ImageFolder,
        at_most: int,
        *,
        replace: bool,
        replaced: dict[int, int] | None = None,
        report: bool = True,
    ) -> None:
        self.folder, self.replaced = folder, dict(replaced or {})
        self._at_most, self._replace = at_most, replace
        refused = find_refused(folder.files)
        self.rare_formats = sum(map(is_looked_at, folder.files)) > len(refused)
        for index, why in refused.items():
            if index not in self.replaced:
                self._leave_out(
                    index, why, "a file is refused", f"files are refused, at most {at_most} are allowed", report=report
                )

    @property
    def names(self) -> list[str]:
        """The bad files, in the order in which they were found."""
        return [self.folder.files[index] for index in self.replaced]

    def leave_out(self, index: int, why: str) -> None:
        """Find a replacement for a file that made a batch fail, and report both on stderr.

        Raises
        ------
        LoaderError
            If there are too many bad files.
        """
        self._leave_out(index, why, "a batch failed", "batches have failed by now")

    def _leave_out(self, index: int, why: str, one: str, several: str, *, report: bool = True) -> None:
        described = f"{self.folder.files[index]}: {why}"
        if len(self.replaced) >= self._at_most:
            count = len(self.replaced) + 1
            raise LoaderError(described + (f"; {count} {several}" if count > 1 else ""))
        replace_file(self.folder, index, self.replaced)
        if report:
            named = self.folder.files[self.replaced[index]]
            place = f"{named} takes its place" if self._replace else "its image is left out"
            count_of = f"{len(self.replaced)} of at most {self._at_most}"
            sys.stderr.write(f"warning: {one} ({count_of}): {described}; {place}\n")

    def in_place(self) -> tuple[list[str], list[int]]:
        """Return files and labels with the bad files replaced; images to leave out have label -1."""
        files, labels = list(self.folder.files), list(self.folder.labels)
        for index, other in self.replaced.items():
            files[index] = self.folder.files[other]
            labels[index] = self.folder.labels[other] if self._replace else -1
        return files, labels


def replace_file(folder: ImageFolder, index: int, replaced: dict[int, int]) -> None:
    """Enter the next usable file into `replaced`, for a file and for all files that it has replaced."""
    other = stand_in(folder, index, replaced)
    for bad in [index, *(bad for bad, instead in replaced.items() if instead == index)]:
        replaced[bad] = other


def stand_in(folder: ImageFolder, index: int, replaced: dict[int, int]) -> int:
    """Return the index of the next file that can be decoded."""
    files = folder.files
    for candidate in ((index + step) % len(files) for step in range(1, min(len(files), _CANDIDATES))):
        if candidate not in replaced and why_unusable(files[candidate]) is None:
            return candidate
    msg = f"{files[index]}: cannot be read, and there is no readable file to replace it"
    raise LoaderError(msg)
