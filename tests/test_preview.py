"""The command line of the package: sample data and pictures of mixed samples."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image
from training_fixtures import run_program

from dali_saliencymix import DETECTORS, draw_params, saliencymix
from dali_saliencymix.__main__ import main
from dali_saliencymix.preview import draw_mixed

pytest_plugins = ["training_fixtures"]


def error_of(capsys) -> str:
    """Return the one line on stderr; fails if there are more."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_command_draws_a_picture(data_folder, tmp_path):
    output = tmp_path / "mixed.png"
    ended = run_program("-m", "dali_saliencymix", "preview", data_folder, "-o", output, "-n", "4", "--size", "96")
    assert ended.stdout + ended.stderr == ""
    with Image.open(output) as picture:
        assert picture.format == "PNG"
        assert 500 < picture.width < 1500
        assert 500 < picture.height < 1500
        assert np.asarray(picture.convert("RGB")).std() > 20  # not a blank page


@pytest.mark.parametrize("saliency", sorted(DETECTORS))
def test_options_change_the_picture_and_the_same_seed_repeats_it(data_folder, tmp_path, saliency):
    pictures = []
    for i, options in enumerate(([], [], ["--seed", "2"], ["--box", "clip"], ["--per-batch"])):
        output = str(tmp_path / f"{i}.png")
        common = ["-n", "3", "--size", "64", "--saliency", saliency]
        assert main(["preview", str(data_folder), "-o", output, *common, *options]) == 0
        with Image.open(output) as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 4


def test_a_folder_of_class_folders_will_do_and_few_images_are_drawn_twice(data_folder, tmp_path):
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "red_square").symlink_to(data_folder / "val" / "red_square")
    output = tmp_path / "few.png"
    assert main(["preview", str(tmp_path / "classes"), "-o", str(output), "-n", "4", "--size", "16"]) == 0
    assert output.stat().st_size > 5_000


def test_the_boxes_in_the_picture_are_those_of_the_mix():
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (4, 30, 40, 3), np.uint8)
    source_index, lam = draw_params(rng, 4)
    figure = draw_mixed(images, source_index, lam, names=list("abcd"))
    mixed = saliencymix(images, source_index, lam)
    for column in range(4):
        receiver, giver, _, result = (figure.axes[row * 4 + column] for row in range(4))
        np.testing.assert_array_equal(receiver.images[0].get_array(), images[column])
        np.testing.assert_array_equal(giver.images[0].get_array(), images[source_index[column]])
        np.testing.assert_array_equal(result.images[0].get_array(), mixed.images[column])
        (edge,) = result.patches
        y0, x0, y1, x1 = mixed.boxes[column]
        assert edge.get_bbox().extents.tolist() == [x0 - 0.5, y0 - 0.5, x1 - 0.5, y1 - 0.5]
        assert edge.get_edgecolor() == to_rgba("cyan")
        assert receiver.get_title() == "abcd"[column]
        assert giver.get_title() == "abcd"[source_index[column]]
        assert result.get_title() == f"lam = {mixed.lam[column]:.2f}"


def test_without_matplotlib_the_error_names_the_extra(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["preview", str(data_folder), "-o", str(tmp_path / "x.png"), "--size", "32"]) == 1
    assert "pip install 'dali-saliencymix[train]'" in error_of(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/no/such/folder"], "/no/such/folder: no such folder"),
        (["{data}", "-o", "/no/such/folder/x.png"], "/no/such/folder/x.png"),
        (["{data}", "--alpha", "0"], "alpha must be a positive number, got 0.0"),
    ],
    ids=["data", "output", "alpha"],
)
def test_what_cannot_be_drawn_ends_with_one_line(data_folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    given = [option.format(data=data_folder) for option in options]
    assert main(["preview", "-n", "2", "--size", "32", *given]) == 1
    line = error_of(capsys)
    assert line.startswith("python -m dali_saliencymix preview: error: ")
    assert message in line


@pytest.mark.parametrize(("option", "value"), [("count", "0"), ("count", "-1"), ("size", "0"), ("seed", "-1")])
def test_a_wrong_number_ends_with_one_line_that_names_it(data_folder, tmp_path, capsys, option, value):
    try:
        status = main(["preview", str(data_folder), "-o", str(tmp_path / "x.png"), f"--{option}", value])
    except SystemExit as ended:  # it may be refused while the options are read
        status = ended.code
    assert status in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert option in line


def test_a_broken_image_is_named(own_data, tmp_path, capfd):
    for file in (own_data / "train" / "red_square").iterdir():
        file.write_text("no image")
    assert main(["preview", str(own_data), "-o", str(tmp_path / "x.png"), "-n", "40", "--size", "32"]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert "red_square" in line


def test_an_unknown_detector_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["preview", "data", "--saliency", "deep"])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(name in line for name in ("deep", *DETECTORS))


def test_sample_data_from_the_command_line(tmp_path, capsys):
    wrong = main(["sample-data", str(tmp_path / "data"), "--train", "0"])
    assert wrong == 1
    assert (
        error_of(capsys)
        == "python -m dali_saliencymix sample-data: error: train must be an integer of at least 1, got 0"
    )
    (tmp_path / "file").touch()
    assert main(["sample-data", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in error_of(capsys)
