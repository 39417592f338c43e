"""Command line: ``dali-saliencymix sample-data | preview | scan | bottleneck | compare | compile``.

``python -m dali_saliencymix`` runs the same program.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from dali_saliencymix import __version__
from dali_saliencymix._errors import EXPECTED, add_traceback, flush_stdout, prepare_stdout, write_error
from dali_saliencymix.options import MODES, PRESET_OPTIONS, HelpFormatter, add_option, whole_number
from dali_saliencymix.packages import require


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    script = "dali-saliencymix"
    called = script if Path(sys.argv[0]).name == script else "python -m dali_saliencymix"
    parser = argparse.ArgumentParser(prog=called)
    parser.add_argument("--version", action="version", version=f"{script} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    add_command = functools.partial(commands.add_parser, formatter_class=HelpFormatter)

    sample = add_command("sample-data", help="write a small data set of real JPEG files")
    sample.add_argument("root", type=Path, metavar="DATA", help="folder to write train/ and val/ into")
    sample.add_argument("--train", type=whole_number(1, 10**6), default=200, help="training images per class")
    sample.add_argument("--val", type=whole_number(1, 10**6), default=40, help="validation images per class")
    sample.add_argument("--seed", type=whole_number(0), default=0, help="random seed")

    preview = add_command("preview", help="plot mixed samples of a data set, or the maps of all detectors")
    preview.add_argument("root", type=Path, metavar="DATA", help="folder of class folders, or folder with train/")
    preview.add_argument("-o", "--output", type=Path, default=Path("preview.png"), help="image file to write")
    preview.add_argument("-n", "--count", type=whole_number(1, 1000), default=8, help="number of samples")
    preview.add_argument(
        "--size", type=whole_number(1, 10_000), default=224, help="height and width of the images in pixels"
    )
    preview.add_argument("--min-crop-area", type=float, default=0.08, help="minimum area fraction of the random crop")
    preview.add_argument(
        "--compare", action="store_true", help="plot the maps of all detectors instead of mixed samples"
    )
    preview.add_argument(
        "--modes", nargs="+", choices=MODES, default=["saliencymix"], help="mixing modes; each sample gets one of them"
    )
    for option in ("alpha", "prob", "preset", *PRESET_OPTIONS, "label_weight"):
        add_option(preview, option)
    preview.add_argument("--seed", type=whole_number(0), default=0, help="random seed")

    scan = add_command("scan", help="decode every file of a data set once and list the files usable for training")
    scan.add_argument("root", type=Path, metavar="DATA", help="folder of class folders, or one with train/ and val/")
    scan.add_argument("-o", "--output", type=Path, default=Path("scan"), help="folder for the lists and scan.json")
    scan.add_argument(
        "--min-size", type=whole_number(1), default=8, help="exclude images whose shorter side is below this, in pixels"
    )
    scan.add_argument("--strict", action="store_true", help="also exclude files with decoder warnings")
    scan.add_argument("-j", "--workers", type=whole_number(1, 1024), help="decoding processes (default: one per core)")
    scan.add_argument("--timeout", type=float, default=60.0, help="time limit per file in seconds")

    # Its options include those of train.py, and the parser of train.py imports PyTorch.
    add_command("bottleneck", help="report whether training is input-bound", add_help=False)

    comparison = add_command("compare", help="report what changed between two bottleneck reports")
    comparison.add_argument("before", type=Path, metavar="A.json", help="first report, written by bottleneck -o")
    comparison.add_argument("after", type=Path, metavar="B.json", help="second report")

    compiling = add_command(
        "compile",
        help="compile the Numba kernels in advance",
        description="Compile all Numba kernels for this type of CPU into Numba's cache. NUMBA_CACHE_DIR sets the cache "
        "folder. By default it is next to the package or, if that is not writable, in ~/.cache.",
    )
    for command_parser in (sample, preview, scan, comparison, compiling):
        add_traceback(command_parser)

    given = sys.argv[1:] if arguments is None else arguments
    prepare_stdout()
    if given[:1] == ["bottleneck"]:
        from dali_saliencymix.bottleneck.command import run_bottleneck

        return run_bottleneck(given[1:], f"{parser.prog} bottleneck")
    args = vars(parser.parse_args(given))
    command, with_traceback = args.pop("command"), args.pop("traceback")
    prog = f"{parser.prog} {command}"
    try:
        status = _run(command, args)
        flush_stdout()
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    except Exception as error:
        write_error(error, prog, expected=isinstance(error, EXPECTED), with_traceback=with_traceback)
        return 2 if command == "scan" else 1  # scan returns 1 if it found unusable files
    return status


def _run(command: str, args: dict[str, Any]) -> int:
    """Dispatch to the command; return the exit status."""
    if command == "sample-data":
        require("PIL")
        from dali_saliencymix.datasets.sample_data import make_sample_data

        make_sample_data(args.pop("root"), **args)
    elif command == "compare":
        from dali_saliencymix.bottleneck.command import run_compare

        return run_compare(**args)
    elif command == "scan":
        require("PIL", "pebble", "simplejpeg", "tqdm")
        from dali_saliencymix.datasets.scan import run_scan

        return run_scan(**args)
    elif command == "compile":
        require("numba")
        from dali_saliencymix._compile import compile_kernels

        compile_kernels(functools.partial(print, flush=True))
    else:
        require("PIL", "matplotlib", "nvidia.dali", "simplejpeg")
        from dali_saliencymix.preview import save_preview

        save_preview(args.pop("root"), args.pop("output"), **args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
