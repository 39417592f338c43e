"""Every mixing option is declared once, and all signatures agree with its declaration."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import math
import pickle

import numpy as np
import pytest
from nvidia.dali import Pipeline

import dali_saliencymix
from dali_saliencymix import DETECTORS, PRESETS, MixOptions, MixParams, fn, preview, pytorch
from dali_saliencymix.options import add_option, unused_options

DECLARED = {field.name: field for field in dataclasses.fields(MixOptions)}
SIGNATURES = {
    function.__module__ + "." + function.__qualname__: (function, set(names.split()))
    for function, names in [
        (dali_saliencymix.saliencymix, "preset saliency source destination box per_batch label_weight algorithm"),
        (dali_saliencymix.mix, "preset saliency source destination box per_batch label_weight algorithm"),
        (dali_saliencymix.cutmix, "box per_batch"),
        (dali_saliencymix.mixup, "per_batch"),
        (dali_saliencymix.draw_params, "alpha prob"),
        (dali_saliencymix.draw_mix_params, "modes alpha prob choose"),
        (fn.saliencymix, "alpha prob preset saliency source destination box per_batch label_weight algorithm"),
        (fn.cutmix, "alpha prob box per_batch"),
        (fn.mixup, "alpha prob per_batch"),
        (
            fn.mix,
            "modes alpha prob choose preset saliency source destination box per_batch label_weight algorithm",
        ),
        (
            pytorch.SaliencyMix,
            "modes alpha prob choose preset saliency source destination box per_batch label_weight algorithm",
        ),
        (preview.draw_mixed, "preset saliency source destination box per_batch label_weight"),
    ]
}
# Functions for a single mode have defaults that the option resolves to in this mode.
SPELLED_OUT = {
    "dali_saliencymix.mix.cutmix": {"box": "clip", "per_batch": False},
    "dali_saliencymix.mix.mixup": {"per_batch": False},
    "dali_saliencymix.fn.cutmix": {"box": "clip", "per_batch": False},
    "dali_saliencymix.fn.mixup": {"per_batch": False},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_have_the_options_that_are_declared(name):
    function, expected = SIGNATURES[name]
    parameters = inspect.signature(function).parameters
    assert parameters.keys() & DECLARED.keys() == expected
    for option in expected:
        parameter = parameters[option]
        assert parameter.kind is parameter.KEYWORD_ONLY
        wanted = SPELLED_OUT.get(name, {}).get(option, DECLARED[option].default)
        assert parameter.default in (wanted, parameter.empty), option


IMAGES, INDEX, SHARES = np.zeros((2, 8, 8, 3), np.uint8), np.array([1, 0]), np.full(2, 0.5)
POINTS = np.full((2, 2), 0.5)
ARGUMENTS = {
    dali_saliencymix.saliencymix: (IMAGES, INDEX, SHARES),
    dali_saliencymix.mix: (IMAGES, INDEX, SHARES, INDEX, POINTS),
    dali_saliencymix.cutmix: (IMAGES, INDEX, SHARES, POINTS),
    dali_saliencymix.mixup: (IMAGES, INDEX, SHARES),
    dali_saliencymix.draw_params: (np.random.default_rng(0), 2),
    dali_saliencymix.draw_mix_params: (np.random.default_rng(0), 2),
    pytorch.SaliencyMix: (10,),
    preview.draw_mixed: (IMAGES, MixParams(INDEX, SHARES, INDEX, POINTS)),
}


TAKES_ANY_TRUTH = {("dali_saliencymix.fn.cutmix", "per_batch"), ("dali_saliencymix.fn.mixup", "per_batch")}
CHECKED = {(name, option) for name, (_, options) in SIGNATURES.items() for option in options} - TAKES_ANY_TRUTH


@pytest.mark.parametrize(("name", "option"), sorted(CHECKED))
def test_a_wrong_option_is_refused_at_once_by_every_function(name, option):
    function, options = SIGNATURES[name]
    given = {"modes": {"mixup": 1.0}} if "modes" in options else {}
    given |= {"names": "ab"} if function is preview.draw_mixed else {}
    with pytest.raises((TypeError, ValueError), match=f"^{option} must "), Pipeline(2, 1, None):
        function(*ARGUMENTS.get(function, (None, None)), **given | {option: -17.5})


def test_what_is_spelled_out_is_what_the_options_become():
    assert (MixOptions(modes={"cutmix": 1.0}).box, MixOptions(modes={"cutmix": 1.0}).per_batch) == ("clip", False)
    assert MixOptions(modes={"mixup": 1.0}).per_batch is False


def test_presets_fill_in_what_is_not_given():
    for name, preset in PRESETS.items():
        assert preset == MixOptions(preset=name)
        assert None not in vars(preset).values()
    released = MixOptions(preset="released-code", box="fit", per_batch=False)
    assert (released.saliency, released.box, released.per_batch) == ("fine_grained", "fit", False)
    assert MixOptions(preset="released-code", modes={"cutmix": 1, "mixup": 1}).box == "clip"
    assert MixOptions(modes={"cutmix": 1, "saliencymix": 1}).box == "fit"


def test_modes_become_probabilities_and_alphas():
    options = MixOptions(modes={"mixup": 1, "cutmix": 3}, alpha={"cutmix": 1, "mixup": 0.2})
    assert options.probabilities == {"mixup": 0.25, "cutmix": 0.75}
    assert list(options.alphas.items()) == [("mixup", 0.2), ("cutmix", 1.0)]
    assert options.mode is None
    assert MixOptions(modes={"mixup": 2}).mode == "mixup"
    assert MixOptions().mode == "saliencymix"


def test_options_are_values():
    options = MixOptions(preset="paper", modes={"mixup": 1, "saliencymix": 1})
    assert pickle.loads(pickle.dumps(options)) == copy.copy(options) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.prob = 0.5
    other = dataclasses.replace(options, saliency="frequency_tuned")
    assert (other.saliency, other.preset, options.saliency) == ("frequency_tuned", "paper", "fine_grained")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"modes": {}}, ValueError, r"modes must map mode names \(saliencymix, cutmix, mixup\) to weights, got \{\}"),
        ({"modes": ["mixup"]}, ValueError, r"modes must map mode names .* got \['mixup'\]"),
        ({"modes": {"mix": 1}}, ValueError, "modes must be one of saliencymix, cutmix, mixup, got 'mix'"),
        ({"modes": {"mixup": 0}}, ValueError, r"modes\['mixup'\] must be a positive number, got 0"),
        ({"modes": {"mixup": math.nan}}, ValueError, r"modes\['mixup'\] must be a positive number, got nan"),
        ({"alpha": 0}, ValueError, "alpha must be a positive number, got 0"),
        ({"alpha": {"mixup": 1}}, ValueError, "alpha must be one number, or one for each of saliencymix, got"),
        ({"alpha": {"saliencymix": -1}}, ValueError, r"alpha\['saliencymix'\] must be a positive number, got -1"),
        ({"prob": -0.1}, ValueError, r"prob must be in \[0, 1\], got -0.1"),
        ({"prob": 1.5}, ValueError, r"prob must be in \[0, 1\], got 1.5"),
        ({"choose": "all"}, ValueError, "choose must be one of sample, batch, got 'all'"),
        ({"preset": "theirs"}, ValueError, "preset must be one of default, paper, released-code, got 'theirs'"),
        ({"saliency": "edges"}, ValueError, "saliency must be one of fine_grained, .*, or a callable, got 'edges'"),
        ({"saliency": 3}, TypeError, "saliency must be the name of a detector or a callable, got 3"),
        ({"source": "random"}, ValueError, "source must be one of salient, non_salient, got 'random'"),
        ({"destination": "top"}, ValueError, "destination must be one of corresponding, .*, got 'top'"),
        ({"box": "cut"}, ValueError, "box must be one of fit, clip, got 'cut'"),
        ({"per_batch": 1}, TypeError, "per_batch must be True or False, got 1"),
        ({"label_weight": "mass"}, ValueError, "label_weight must be one of area, saliency, got 'mass'"),
        (
            {"label_weight": "saliency", "modes": {"cutmix": 1, "mixup": 1}},
            ValueError,
            "label_weight must be 'area' where saliencymix is not among the modes, got 'saliency'",
        ),
        ({"algorithm": "fast"}, ValueError, "algorithm must be one of auto, array, kernel, got 'fast'"),
    ],
)
def test_wrong_options_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        MixOptions(**wrong)


def test_each_mode_says_what_it_has_no_use_for():
    assert unused_options("saliencymix") == ()
    assert unused_options("cutmix") == ("preset", "saliency", "source", "destination", "label_weight")
    assert set(unused_options("mixup")) == {*unused_options("cutmix"), "box"}
    assert unused_options("none") == tuple(DECLARED)


def test_a_command_line_takes_options_from_their_declaration():
    parser = argparse.ArgumentParser()
    names = [name for name in DECLARED if name != "modes"]
    for name in names:
        add_option(parser, name, *(["--mix-alpha", "--beta"] if name == "alpha" else []))
    assert vars(parser.parse_args([])) == {
        "mix_alpha" if name == "alpha" else name: DECLARED[name].default for name in names
    }
    given = parser.parse_args(["--beta", "0.5", "--prob", "0.25", "--box", "clip", "--no-per-batch"])
    assert (given.mix_alpha, given.prob, given.box, given.per_batch) == (0.5, 0.25, "clip", False)
    text = parser.format_help()
    for choice in (*DETECTORS, *PRESETS):
        assert choice in text
    for name in names:
        assert DECLARED[name].metadata["help"].split(";")[0] in " ".join(text.split())


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({}, False),
        ({"destination": "random"}, True),
        ({"modes": {"cutmix": 1}}, True),
        ({"modes": {"mixup": 1}}, False),
        ({"modes": {"mixup": 1, "saliencymix": 1}}, True),
    ],
)
def test_a_point_is_drawn_where_it_is_needed(given, needed):
    assert MixOptions(**given).needs_point is needed
