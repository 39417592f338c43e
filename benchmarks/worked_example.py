"""The slow job of docs/bottleneck.md and its faster version.

    python -m benchmarks.worked_example photos --from DATA    # 96 large photographs

The page has the commands. The photographs have 1600 pixels along the long side. `slow` decodes a whole photograph and
then crops a random part; `fast` decodes that part only. `step` sleeps, like a host that waits for an accelerator.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from benchmarks import program
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.fn import saliencymix

SIDE = 1600  # pixels of the longer side
SECONDS = 0.09  # duration of a step


@pipeline_def(device_id=None, seed=1)
def slow() -> tuple[Any, ...]:
    """Decode whole photographs, then crop."""
    encoded, labels = read()
    return mixed(fn.random_resized_crop(fn.decoders.image(encoded), size=(224, 224)), labels)


@pipeline_def(device_id=None, seed=1)
def fast() -> tuple[Any, ...]:
    """Decode only the part that is kept."""
    encoded, labels = read()
    return mixed(fn.resize(fn.decoders.image_random_crop(encoded), size=(224, 224)), labels)


def read() -> Any:
    return fn.readers.file(file_root=os.environ["IMAGES"], random_shuffle=True, name="reader")


def mixed(images: Any, labels: Any) -> tuple[Any, ...]:
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam


def step(batch: Any) -> None:
    """Sleep for the duration of a step, like a host that waits for an accelerator."""
    time.sleep(SECONDS)


def main() -> None:
    parser = program.parser("Enlarge the photographs in a folder of class folders.")
    parser.add_argument("folder", type=Path, help="folder to write into")
    parser.add_argument("--from", type=Path, required=True, dest="source", help="folder of class folders")
    parser.add_argument("--count", type=program.positive, default=96)
    args = parser.parse_args()
    files = list_image_folder(args.source).files
    for file in map(Path, files[: args.count]):
        target = args.folder / file.parent.name / f"{file.stem}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            scale = SIDE / max(image.size)
            large = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
        large.save(target, quality=90)


if __name__ == "__main__":
    program.run(main)
