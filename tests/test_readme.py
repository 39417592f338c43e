"""The snippets of the README run unchanged, and the files and options that it names exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_pipeline
from dali_saliencymix import PRESETS
from dali_saliencymix.__main__ import main as package_main
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.options import PRESET_OPTIONS
from dali_saliencymix.training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def snippet(containing):
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if containing in code)
    return found


def test_the_snippet_on_arrays_runs():
    names: dict = {}
    exec(snippet("draw_params"), names)
    np.testing.assert_allclose(names["targets"].sum(1), 1, atol=1e-6)
    assert names["mixed"].images.shape == names["images"].shape
    assert (names["mixed"].images != names["images"]).any()


def test_the_snippet_on_a_dali_pipeline_runs(tmp_path):
    make_sample_data(tmp_path, train=2, val=1)
    names: dict = {}
    source = snippet("pipeline_def").replace('device="mixed"', 'device="cpu"')
    # In a file, since DALI reads the source of a pipeline definition.
    (tmp_path / "job.py").write_text(source)
    exec(compile(source, tmp_path / "job.py", "exec"), names)
    pipeline = names["training_pipeline"](str(tmp_path / "train"), batch_size=4, num_threads=2, device_id=None)
    images, targets = (np.array(output.as_tensor()) for output in pipeline.run())
    assert images.shape == (4, 3, 224, 224)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)


def test_the_snippet_on_tensors_runs():
    names: dict = {}
    exec(snippet("collate_fn"), names)
    assert names["mixed"].shape == (32, 3, 224, 224)
    for images, targets in (next(iter(names["loader"])), (names["mixed"][:8], names["targets"][:8])):
        assert images.shape == (8, 3, 224, 224)
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)


def test_the_presets_are_those_of_the_code():
    (row,) = re.findall(r"^\| `preset` \| (.*) \|$", README, re.MULTILINE)
    shown = dict(re.findall(r'`"([\w-]+)"`: (?:the same with )?([^;]+)', row))
    assert shown.keys() == PRESETS.keys()
    default = {option: getattr(PRESETS["default"], option) for option in PRESET_OPTIONS}
    for name, preset in PRESETS.items():
        values = {option: getattr(preset, option) for option in PRESET_OPTIONS}
        if name != "default":
            values = {option: value for option, value in values.items() if value != default[option]}
        texts = {option: f'"{value}"' if isinstance(value, str) else str(value) for option, value in values.items()}
        assert shown[name] == ", ".join(f"`{option}={text}`" for option, text in texts.items())


def help_of(main, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["program", *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_options_that_it_names_exist(monkeypatch, capsys):
    options = set(re.findall(r"--[a-z][a-z0-9-]+", README)) - {"--nproc_per_node", "--nproc"}
    programs = [(parse_arguments,), (bench_pipeline.main,)]
    programs += [(package_main, command) for command in ("preview", "scan", "bottleneck")]
    shown = "".join(help_of(main, monkeypatch, capsys, *command) for main, *command in programs)
    assert options
    assert {option for option in options if option not in shown} == set()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_files_that_it_links_to_exist(target):
    assert (ROOT / target).is_file()
