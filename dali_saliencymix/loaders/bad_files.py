"""Files of a folder that cannot be read: each is named and counted, and another one takes its place, or none."""

from __future__ import annotations

import sys

from dali_saliencymix.datasets.damage import why_unusable
from dali_saliencymix.datasets.formats import find_refused
from dali_saliencymix.datasets.image_folder import ImageFolder
from dali_saliencymix.loaders.base import LoaderError

_CANDIDATES = 1000  # files that are tried in the place of a bad one


class BadFiles:
    """The bad files of a folder and what stands in for them; those that are refused by their headers are known at once.

    Parameters
    ----------
    folder : ImageFolder
        The images.
    at_most : int
        Number of bad files before the next one is an error.
    replace : bool
        Whether the next usable file, with its label, takes the place of a bad one. Otherwise its image is left out.
    replaced : dict from int to int, optional
        The attribute `replaced` of an earlier one, to go on with.
    report : bool
        Whether this process names the files that are refused by their headers, which all processes find.

    Attributes
    ----------
    replaced : dict from int to int
        Index of the file that stands in for each bad one, in the order in which these were found.

    Raises
    ------
    LoaderError
        If more than `at_most` files are refused by their headers.
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
        for index, why in find_refused(folder.files).items():
            if index not in self.replaced:
                self._leave_out(
                    index, why, "a file is refused", f"files are refused, and at most {at_most} may be", report=report
                )

    @property
    def names(self) -> list[str]:
        """The bad files, in the order in which they were found."""
        return [self.folder.files[index] for index in self.replaced]

    def leave_out(self, index: int, why: str) -> None:
        """Find what stands in for a file that made a batch fail, and name both on stderr.

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
        """Return files and labels with the bad ones replaced, by label -1 where their images are left out."""
        return in_place(self.folder, self.replaced, replace=self._replace)


def in_place(folder: ImageFolder, replaced: dict[int, int], *, replace: bool) -> tuple[list[str], list[int]]:
    """Return files and labels with the bad ones replaced, by label -1 without `replace`."""
    files, labels = list(folder.files), list(folder.labels)
    for index, other in replaced.items():
        files[index] = folder.files[other]
        labels[index] = folder.labels[other] if replace else -1
    return files, labels


def replace_file(folder: ImageFolder, index: int, replaced: dict[int, int]) -> None:
    """Enter the next usable file into `replaced`, also for the files for which this one has stood in."""
    other = stand_in(folder, index, replaced)
    for bad in [index, *(bad for bad, instead in replaced.items() if instead == index)]:
        replaced[bad] = other


def stand_in(folder: ImageFolder, index: int, replaced: dict[int, int]) -> int:
    """Return the next file that can be decoded."""
    files = folder.files
    for candidate in ((index + step) % len(files) for step in range(1, min(len(files), _CANDIDATES))):
        if candidate not in replaced and why_unusable(files[candidate]) is None:
            return candidate
    msg = f"{files[index]}: not readable, nor is any of the files after it"
    raise LoaderError(msg)
