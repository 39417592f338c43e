"""The command line of the package: sample data and pictures of mixed samples."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image
from shared.programs import run_program

from dali_saliencymix import DETECTORS, boxes_at, draw_mix_params, mix, saliency_peaks, spectral_residual
from dali_saliencymix.__main__ import main
from dali_saliencymix.preview import draw_detectors, draw_mixed

pytest_plugins = ["shared.training_fixtures"]


def error_of(capsys) -> str:
    """Return the line on stderr; fail if there is not exactly one."""
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


def test_options_change_the_picture_and_the_same_seed_repeats_it(data_folder, tmp_path):
    pictures = []
    changes = [[], [], ["--seed", "2"], ["--box", "clip"], ["--per-batch"], ["--destination", "salient"]]
    changes += [["--modes", "mixup"], ["--source", "non_salient"], ["--compare"]]
    default, other, *_ = DETECTORS
    changes += [["--saliency", other]]
    for i, options in enumerate(changes):
        output = str(tmp_path / f"{i}.png")
        common = ["-n", "2", "--size", "64", "--saliency", default]
        assert main(["preview", str(data_folder), "-o", output, *common, *options]) == 0
        with Image.open(output) as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == len(pictures) - 1


def test_a_folder_of_class_folders_will_do_and_few_images_are_drawn_twice(data_folder, tmp_path):
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "red_square").symlink_to(data_folder / "val" / "red_square")
    output = tmp_path / "few.png"
    assert main(["preview", str(tmp_path / "classes"), "-o", str(output), "-n", "4", "--size", "16"]) == 0
    assert output.stat().st_size > 5_000


def panels_of(figure, rows, count):
    """Return the panels of a picture by row name, and check the names of the rows."""
    named = {row: figure.axes[number * count : (number + 1) * count] for number, row in enumerate(rows)}
    assert [axes[0].get_ylabel() for axes in named.values()] == rows
    assert len(figure.axes) == count * len(rows)
    return named


def shown_box(axis):
    """Return the box drawn in a panel as (y0, x0, y1, x1) in pixels, or None."""
    if not axis.patches:
        return None
    (edge,) = axis.patches
    x0, y0, x1, y1 = edge.get_bbox().extents + 0.5
    return [y0, x0, y1, x1]


@pytest.mark.parametrize("destination", ["corresponding", "random", "salient", "non_salient"])
@pytest.mark.parametrize("label_weight", ["area", "saliency"])
def test_the_picture_shows_what_was_mixed(destination, label_weight):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (4, 30, 40, 3), np.uint8)
    params = draw_mix_params(rng, 4, modes={"saliencymix": 1})
    options = {"destination": destination, "label_weight": label_weight}
    figure = draw_mixed(images, params, names=list("abcd"), **options)
    mixed = mix(images, *params, **options)
    peaks = saliency_peaks(spectral_residual(images), 30, 40)
    least = saliency_peaks(spectral_residual(images), 30, 40, least=True)
    with_map = destination in ("salient", "non_salient")
    rows = ["receiver", *["saliency of receiver"] * with_map, "source", "saliency of source", "mixed"]
    panels = panels_of(figure, rows, 4)
    for i, source in enumerate(params.source_index):
        receiver, giver, result = (panels[name][i] for name in ("receiver", "source", "mixed"))
        np.testing.assert_array_equal(receiver.images[0].get_array(), images[i])
        np.testing.assert_array_equal(giver.images[0].get_array(), images[source])
        np.testing.assert_array_equal(result.images[0].get_array(), mixed.images[i])
        assert shown_box(receiver) == shown_box(result) == mixed.boxes[i].tolist()
        assert shown_box(giver) == shown_box(panels["saliency of source"][i]) == mixed.source_boxes[i].tolist()
        assert panels["saliency of source"][i].lines[0].get_xydata()[0, ::-1].tolist() == peaks[source].tolist()
        if with_map:
            assert shown_box(panels["saliency of receiver"][i]) == mixed.boxes[i].tolist()
            shown = panels["saliency of receiver"][i].lines[0].get_xydata()[0, ::-1].tolist()
            assert shown == (peaks if destination == "salient" else least)[i].tolist()
        assert result.patches[0].get_edgecolor() == to_rgba("cyan")
        assert receiver.get_title() == "abcd"[i]
        assert giver.get_title() == "abcd"[source]
        assert result.get_title() == f"saliencymix, lam = {mixed.lam[i]:.2f}"


def test_a_policy_shows_each_sample_s_mode_and_a_map_only_where_one_was_used():
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (3, 30, 40, 1), np.uint8)
    params = draw_mix_params(rng, 3, modes={"mixup": 1})._replace(mode=np.array([0, 1, 2]))
    panels = panels_of(
        draw_mixed(images, params, names=list("abc")), ["receiver", "source", "saliency of source", "mixed"], 3
    )
    assert [axis.get_title().partition(",")[0] for axis in panels["mixed"]] == ["saliencymix", "cutmix", "mixup"]
    assert [len(axis.images) for axis in panels["saliency of source"]] == [1, 0, 0]
    assert shown_box(panels["mixed"][2]) is None
    without_maps = draw_mixed(images, params._replace(mode=np.array([1, 2, 2])), names=list("abc"))
    panels_of(without_maps, ["receiver", "source", "mixed"], 3)


def test_one_box_for_a_batch_is_shown_with_the_map_it_comes_from():
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (3, 30, 40, 3), np.uint8)
    params = draw_mix_params(rng, 3, modes={"saliencymix": 1})
    figure = draw_mixed(images, params, names=list("abc"), per_batch=True)
    panels = panels_of(figure, ["receiver", "source", "saliency of source", "mixed"], 3)
    decisive = spectral_residual(images)[params.source_index[0]]
    for axis in panels["saliency of source"]:
        np.testing.assert_allclose(axis.images[0].get_array(), decisive, atol=1e-6)
    assert len({tuple(shown_box(axis)) for axis in panels["mixed"]}) == 1


def test_detectors_side_by_side_show_their_maps_peaks_and_boxes():
    rng = np.random.default_rng(6)
    images = rng.integers(0, 256, (2, 30, 40, 3), np.uint8)
    panels = panels_of(draw_detectors(images, names=["a", "b"], lam=0.5), ["image", *DETECTORS], 2)
    for name, detector in DETECTORS.items():
        maps = detector(images)
        peaks = saliency_peaks(maps, 30, 40)
        boxes = boxes_at(peaks, np.full(2, 0.5), 30, 40)
        for i in range(2):
            np.testing.assert_array_equal(panels[name][i].images[0].get_array(), maps[i])
            assert panels[name][i].lines[0].get_xydata()[0, ::-1].tolist() == peaks[i].tolist()
            assert shown_box(panels[name][i]) == boxes[i].tolist()


def test_without_matplotlib_the_error_names_the_extra(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["preview", str(data_folder), "-o", str(tmp_path / "x.png"), "--size", "32"]) == 1
    assert "pip install '.[preview]'" in error_of(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/no/such/folder"], "/no/such/folder: no such folder"),
        (["{data}", "-o", "/no/such/folder/x.png"], "/no/such/folder/x.png"),
        (["{data}", "--alpha", "0"], "alpha must be a positive number, got 0.0"),
        (["{data}", "--min-crop-area", "0"], "min_crop_area must be in (0, 1], got 0.0"),
    ],
    ids=["data", "output", "alpha", "crop"],
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
    except SystemExit as ended:  # argparse may already refuse it
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
    assert line.endswith(".jpg: not an image: begins with b'no image'")


def test_an_unknown_detector_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["preview", "data", "--saliency", "deep"])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(name in line for name in ("deep", *DETECTORS))


def test_sample_data_from_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sample-data", str(tmp_path / "data"), "--train", "0"])
    text = "sample-data: error: argument --train: must be a whole number of at least 1, got 0\n"
    assert capsys.readouterr().err.endswith(text)
    (tmp_path / "file").touch()
    assert main(["sample-data", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in error_of(capsys)
