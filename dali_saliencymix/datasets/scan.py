"""Scan a data set: decode every file once, in parallel, and write a list of the files that are usable for training.

DATA is a folder with ``train/`` and optionally ``val/``, or a folder of class folders. Each of these folders gets one
list, named in `LIST_NAMES`, with paths relative to the folder, one on each line, in the order of `list_image_folder`.
The lists do not define the classes; the class folders do, so that a class without usable files keeps its label.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import TimeoutError as TaskTimeoutError
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from dali_saliencymix._checks import check_at_least, check_positive
from dali_saliencymix._versions import versions
from dali_saliencymix.datasets.damage import EXCLUDED, NOTED, Examined, examine
from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder

SCHEMA, VERSION = "dali-saliencymix/scan", 1
REPORT_NAME = "scan.json"
LIST_NAMES = {"train": "train.txt", "val": "val.txt", "all": "files.txt"}

_CHUNK = 32  # files per task of a worker


@dataclass(frozen=True)
class Scan:
    """The result of a scan.

    Attributes
    ----------
    report : dict
        The content of ``scan.json``; docs/scan.md documents its entries.
    lists : dict from str to list of str
        The usable files of each part (``"train"``, ``"val"`` or ``"all"``), relative to the folder of the part.
    """

    report: dict[str, Any]
    lists: dict[str, list[str]]

    @property
    def excluded(self) -> int:
        """The number of files that the lists exclude."""
        return sum(part["excluded"] for part in self.report["parts"].values())


def scan(
    root: str | Path,
    *,
    min_size: int = 8,
    strict: bool = False,
    workers: int | None = None,
    timeout: float = 60.0,
) -> Scan:
    """Decode every image below a folder, and exclude the files that are unusable for training.

    Parameters
    ----------
    root : path
        Folder with ``train/`` and optionally ``val/``, or folder of class folders.
    min_size : int
        Minimum length of the shorter side, in pixels. Smaller images are excluded.
    strict : bool
        Whether to also exclude files for which the decoder warns of damage.
    workers : int, optional
        Number of worker processes; by default the number of cores available to this process.
    timeout : float
        Time limit for reading and decoding one file, in seconds.

    Returns
    -------
    Scan

    Raises
    ------
    OSError
        If `root` is missing or holds no images.
    ValueError
        If a number is out of range, ``val/`` has a class that ``train/`` does not have, or a name is not UTF-8.

    Notes
    -----
    Worker processes decode the files, so that a file which crashes or hangs the decoder is a finding. As always with
    multiprocessing, a script must protect the call with ``if __name__ == "__main__":``.
    """
    check_at_least(min_size, "min_size", 1)
    check_positive(timeout, "timeout")
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    check_at_least(workers, "workers", 1)
    begun, start = time.time(), time.monotonic()
    parts, lists = {}, {}
    for name, folder in _folders(Path(root)).items():
        found = _Findings()
        task = functools.partial(examine, min_size=min_size)
        examinations = examined_in_processes(folder.files, task, workers=workers, timeout=timeout)
        bar = tqdm(total=len(folder), desc=name, unit="file", disable=None)  # on terminals only
        with bar, contextlib.closing(examinations):
            for index, examined in examinations:
                found.add(index, os.path.relpath(folder.files[index], folder.root), examined)
                bar.update()
        lists[name], parts[name] = _part(folder, found, {*EXCLUDED, "bit_rot"} if strict else set(EXCLUDED))
    report = {
        "schema": SCHEMA,
        "version": VERSION,
        "root": str(Path(root).absolute()),
        "begun": round(begun, 3),
        "seconds": round(time.monotonic() - start, 3),
        "options": {"min_size": min_size, "strict": strict, "workers": workers, "timeout": timeout},
        "versions": versions("pillow", "simplejpeg"),
        "parts": parts,
    }
    return Scan(report, lists)


def _folders(root: Path) -> dict[str, ImageFolder]:
    if not (root / "train").is_dir():
        return {"all": list_image_folder(root)}
    folders = {"train": list_image_folder(root / "train")}
    if (root / "val").is_dir():
        folders["val"] = list_image_folder(root / "val", classes=folders["train"].classes)
    return folders


def examined_in_processes(
    files: Sequence[str], task: Callable[[str], Examined], *, workers: int, timeout: float
) -> Generator[tuple[int, Examined], None, None]:
    """Examine files in processes that may die or hang; yield the index and result of each file, in any order.

    `task` examines one file and must be importable by another process. Tasks that exceed `timeout` seconds are stopped.
    Workers process chunks of files; if a chunk fails, its files are processed again one by one.
    """
    pool = ProcessPool(max_workers=workers, context=multiprocessing.get_context("spawn"))
    try:
        indices = range(len(files))
        chunks = [indices[begin : begin + _CHUNK] for begin in range(0, len(files), _CHUNK)]
        while chunks:
            again = []
            waiting = {}
            with _interrupts_for_later():
                for chunk in chunks:
                    paths = [files[i] for i in chunk]
                    waiting[pool.schedule(_examine_all, args=(task, paths), timeout=timeout)] = chunk
            for future in as_completed(waiting):
                chunk = waiting[future]  # type: ignore[index]  # as_completed does not keep the type of its futures
                try:
                    yield from zip(chunk, future.result(), strict=True)
                except (ProcessExpired, TaskTimeoutError) as error:
                    if len(chunk) == 1:
                        yield chunk[0], _lost(error, timeout)
                    else:
                        again += [chunk[i : i + 1] for i in range(len(chunk))]
            chunks = again
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


@contextlib.contextmanager
def _interrupts_for_later() -> Iterator[None]:
    """Block SIGINT in the threads and processes of the pool that start in this context.

    They inherit the blocked signals. After Ctrl-C, which a terminal sends to all processes, the main process stops the
    workers. Without this, a worker that is still starting would exit with its own traceback.
    """
    # Python would start the tracker together with the first process, and unblock SIGINT after that.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _examine_all(task: Callable[[str], Examined], files: Sequence[str]) -> list[Examined]:
    return [task(file) for file in files]


def _lost(error: Exception, timeout: float) -> Examined:
    if isinstance(error, ProcessExpired):
        return Examined({"crashed": f"{EXCLUDED['crashed']} (exit code {error.exitcode})"})
    return Examined({"timed_out": f"not done after {timeout:g} seconds"})


@dataclass
class _Findings:
    """The findings of one folder, with little memory per file, since there may be millions of files."""

    files: list[tuple[int, str, str, str]] = field(default_factory=list)  # index, relative path, kind, words
    sizes: list[tuple[int, int, int]] = field(default_factory=list)  # width, height, bytes of each image
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)

    def add(self, index: int, path: str, examined: Examined) -> None:
        findings = examined.findings
        if len(path.splitlines()) > 1:
            findings = {"unlistable": EXCLUDED["unlistable"], **findings}
        self.files += [(index, path, kind, words) for kind, words in findings.items()]
        if examined.size is not None:
            self.sizes.append((*examined.size, examined.file_bytes))
            self.formats[examined.format] += 1
            self.modes[examined.mode] += 1


def _part(folder: ImageFolder, found: _Findings, excluded_kinds: set[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the list of usable files of a folder, and its part of the report."""
    excluded = {index for index, _, kind, _ in found.files if kind in excluded_kinds}
    clean = [index for index in range(len(folder)) if index not in excluded]
    left = Counter(folder.labels[index] for index in clean)
    widths, heights, lengths = np.array(found.sizes, np.int64).reshape(-1, 3).T
    return [os.path.relpath(folder.files[index], folder.root) for index in clean], {
        "root": str(folder.root.absolute()),
        "files": len(folder),
        "excluded": len(excluded),
        "classes": len(folder.classes),
        "classes_without_a_usable_file": [name for label, name in enumerate(folder.classes) if not left[label]],
        "counts": dict(Counter(kind for _, _, kind, _ in found.files)),
        "formats": dict(found.formats.most_common()),
        "modes": dict(found.modes.most_common()),
        "width": _spread(widths),
        "height": _spread(heights),
        "short_side": _spread(np.minimum(widths, heights)),
        "file_bytes": _spread(lengths),
        "findings": [
            {"file": path, "kind": kind, "words": words, "excluded": kind in excluded_kinds}
            for _, path, kind, words in sorted(found.files)
        ],
    }


def _spread(values: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, float] | None:
    if not len(values):
        return None
    marks = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}
    spread = {name: float(value) for name, value in zip(marks, np.percentile(values, [*marks.values()]), strict=True)}
    return spread | {"mean": round(float(values.mean()), 2)}


def check_output(root: str | Path, output: str | Path) -> None:
    """Refuse an unsuitable output folder. Call it before the scan, which may take hours.

    Raises
    ------
    ValueError
        If `output` would become a class folder, or holds lists that were not written by a scan.
    """
    root, output = Path(root), Path(output)
    data = [root / "train", root / "val"] if (root / "train").is_dir() else [root]
    for folder in data:
        if output.resolve().is_relative_to(folder.resolve()):
            msg = f"output must not lie within {folder}, where it would become a class folder, got {output}"
            raise ValueError(msg)
    if not (output / REPORT_NAME).exists():
        for name in LIST_NAMES.values():
            if (output / name).exists():
                msg = f"{output / name}: would be overwritten, but no scan wrote it; choose another output folder"
                raise ValueError(msg)


def write_scan(result: Scan, output: str | Path) -> None:
    """Write the lists and ``scan.json`` into a folder, which is created if necessary; replace an earlier scan.

    Each file is written completely or not at all.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    texts = {LIST_NAMES[part]: "".join(f"{file}\n" for file in files) for part, files in result.lists.items()}
    texts[REPORT_NAME] = json.dumps(result.report, indent=1, allow_nan=False) + "\n"
    unfinished = {name: output / f".{name}.{os.getpid()}" for name in texts}
    try:
        for name, text in texts.items():
            unfinished[name].write_text(text, encoding="utf-8")
        for name, path in unfinished.items():
            path.replace(output / name)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    for name in set(LIST_NAMES.values()) - set(texts):  # left by an earlier scan of other folders
        (output / name).unlink(missing_ok=True)


def scan_table(result: Scan) -> str:
    """Return the findings of a scan as a readable table."""
    report = result.report
    lines = []
    for name, part in report["parts"].items():
        usable = part["files"] - part["excluded"]
        lines.append(f"{name}: {part['files']} files in {part['classes']} classes, {usable} usable")
        firsts = {finding["kind"]: finding for finding in reversed(part["findings"])}
        for kind in (*EXCLUDED, *NOTED):
            if first := firsts.get(kind):
                fate = "excluded" if first["excluded"] else "kept"
                file = ascii(first["file"]) if kind == "unlistable" else first["file"]
                lines.append(f"  {kind:14} {part['counts'][kind]:8}  {fate:8}  {file}: {first['words']}")
        sizes = part["short_side"]
        if sizes:
            lines.append(f"  short side {sizes['min']:g} to {sizes['max']:g} pixels, median {sizes['median']:g}")
        without = part["classes_without_a_usable_file"]
        if without:
            shown = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
            lines.append(f"  {len(without)} classes without usable files: {shown}")
    files = sum(part["files"] for part in report["parts"].values())
    rate = files / max(report["seconds"], 1e-9)
    lines.append(f"{files} files in {report['seconds']:.1f} s, {rate:.0f} files/s")
    return "\n".join(lines)


def run_scan(root: Path, output: Path, **options: Any) -> int:
    """Scan, write and print; return the exit status: 0 if no file is excluded, else 1."""
    check_output(root, output)
    result = scan(root, **options)
    write_scan(result, output)
    lists = ", ".join(LIST_NAMES[part] for part in result.lists)
    sys.stdout.write(f"{scan_table(result)}\nwritten to {output}: {lists}, {REPORT_NAME}\n")
    return 1 if result.excluded else 0
