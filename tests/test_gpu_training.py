"""Training on a GPU, from JPEG files to weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dali_saliencymix.datasets.sample_data import make_sample_data

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("options", [[], ["--amp", "--channels-last"], ["--mix", "cutmix"]], ids=" ".join)
def test_training_runs_on_the_gpu_and_learns(tmp_path, options):
    make_sample_data(tmp_path / "data", train=32, val=8)
    command = [sys.executable, str(ROOT / "train.py"), str(tmp_path / "data"), "-a", "resnet18", "-b", "32", *options]
    command += ["--device", "cuda", "--epochs", "3", "--lr", "0.05", "--min-crop-area", "0.35"]
    command += ["--train-crop-size", "64", "--val-resize-size", "64", "--val-crop-size", "64"]
    command += ["--output-dir", str(tmp_path / "run")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert finished.returncode == 0, finished.stderr
    start, *epochs = (json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert start["device"] == torch.cuda.get_device_name()
    assert epochs[-1]["train"]["loss"] < epochs[0]["train"]["loss"]
    assert epochs[-1]["val"]["images"] == 64
