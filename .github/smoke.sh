#!/usr/bin/env bash
# Installs each of the files, wheels or sdists, into an empty environment outside the checkout and runs the package.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for file in "$@"; do
  file=$(realpath -e "$file")
  echo "== $file"
  (
    cd "$folder"
    python3 -m venv --clear environment
    environment/bin/python -m pip install --quiet --disable-pip-version-check "$file"
    environment/bin/dali-saliencymix --version
    environment/bin/python - <<'EOF'
import numpy as np

from dali_saliencymix import draw_params, saliencymix, soft_labels

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (8, 64, 64, 3), np.uint8)
source_index, lam = draw_params(rng, len(images), alpha=1.0, prob=1.0)
mixed = saliencymix(images, source_index, lam)
targets = soft_labels(np.arange(8), source_index, mixed.lam, num_classes=8)
print("mean lam", mixed.lam.mean(), "of images", mixed.images.shape)
assert mixed.images.shape == images.shape and (mixed.images != images).any() and np.allclose(targets.sum(axis=1), 1)
EOF
  )
done
