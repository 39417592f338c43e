"""Single declaration of every mixing option: default, choices, help, validation, and the modes that use it.

Public functions have explicit keyword arguments with the same names and defaults. They and the command line build a
`MixOptions`, which the internal functions take.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from dali_saliencymix._checks import check_choice, check_flag, check_fraction, check_positive
from dali_saliencymix._errors import printable
from dali_saliencymix._routes import ALGORITHMS
from dali_saliencymix.saliency import DETECTORS, get_detector

if TYPE_CHECKING:
    from dali_saliencymix.saliency import Detector

MODES = ("saliencymix", "cutmix", "mixup")
CHOOSE = ("sample", "batch")
SOURCES = ("salient", "non_salient")
DESTINATIONS = ("corresponding", "salient", "non_salient", "random")
BOXES = ("fit", "clip")
LABEL_WEIGHTS = ("area", "saliency")

# Values of the options that are not given: this project's defaults, the paper's, and the released code's.
_DEFAULT = {
    "saliency": "spectral_residual",
    "source": "salient",
    "destination": "corresponding",
    "box": "fit",
    "per_batch": False,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "default": _DEFAULT,
    "paper": {**_DEFAULT, "saliency": "fine_grained"},
    "released-code": {**_DEFAULT, "saliency": "fine_grained", "box": "clip", "per_batch": True},
}
PRESET_OPTIONS = tuple(_DEFAULT)
_BOX_OF_CUTMIX = "clip"  # with every preset

_SALIENCYMIX = MODES[:1]


def _about(
    text: str, *, choices: Sequence[str] = (), modes: Sequence[str] = MODES, metavar: str | None = None
) -> dict[str, Any]:
    return {"help": text, "choices": choices, "modes": modes, "metavar": metavar}


@dataclass(frozen=True)
class MixOptions:
    """Options of the mixing functions.

    Attributes
    ----------
    modes : mapping from str to float
        Mixing modes, among ``"saliencymix"``, ``"cutmix"`` and ``"mixup"``, with their relative probabilities, which
        need not sum to 1. By default saliencymix only.
    alpha : float or mapping from str to float
        Parameter of Beta(alpha, alpha), the distribution of `lam`: one number for all modes, or one per mode.
    prob : float
        Probability in [0, 1] that an image is mixed.
    choose : {"sample", "batch"}
        Whether to draw a mode for each image or one for the whole batch.
    preset : {"default", "paper", "released-code"}
        Values of the options that are None. After construction, no option is None.
    saliency : str or callable, optional
        Detector: a name in `dali_saliencymix.DETECTORS`, or a function from images (N, H, W, C) uint8 to maps
        (N, h, w), larger where more salient.
    source : {"salient", "non_salient"}, optional
        Cut the patch around the most or the least salient pixel of the source.
    destination : {"corresponding", "salient", "non_salient", "random"}, optional
        Paste the patch at the same place, around the most or the least salient pixel of the receiver, or around a
        point drawn uniformly.
    box : {"fit", "clip"}, optional
        If a box crosses the border of the source, ``"fit"`` moves it inside and ``"clip"`` cuts it at the border; see
        `dali_saliencymix.boxes_at`. Unless the destination is ``"corresponding"``, the patch then keeps its size and is
        moved inside the receiver. If saliencymix is not among the modes, the default is ``"clip"``.
    per_batch : bool, optional
        If true, `lam`, the mode and the boxes of image 0 and its source are used for the whole batch.
    label_weight : {"area", "saliency"}
        Meaning of `lam` for saliencymix samples: the receiver's share of the pixels, or of the saliency; see
        `dali_saliencymix.saliencymix`. Presets do not set this option.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or kernels for the steps that have one; see `dali_saliencymix.fine_grained`.

    Raises
    ------
    TypeError, ValueError
        If an option is invalid. The message names it.

    Examples
    --------
    >>> MixOptions(preset="paper").saliency
    'fine_grained'
    """

    # `Any` admits None as a default, which __post_init__ replaces by a value of the other type.
    modes: Mapping[str, float] | Any = field(default=None, metadata=_about("mixing modes"))
    alpha: float | Mapping[str, float] = field(
        default=1.0, metadata=_about("lam is drawn from Beta(ALPHA, ALPHA)", metavar="ALPHA")
    )
    prob: float = field(default=1.0, metadata=_about("probability that an image is mixed", metavar="P"))
    choose: str = field(default="sample", metadata=_about("draw one mode per sample or per batch", choices=CHOOSE))
    preset: str = field(
        default="default",
        metadata=_about(
            "defaults of saliency, source, destination, box and per-batch", choices=tuple(_PRESETS), modes=_SALIENCYMIX
        ),
    )
    saliency: str | Detector | Any = field(
        default=None, metadata=_about("saliency detector", choices=sorted(DETECTORS), modes=_SALIENCYMIX)
    )
    source: str | Any = field(
        default=None, metadata=_about("where to cut the patch out of the source", choices=SOURCES, modes=_SALIENCYMIX)
    )
    destination: str | Any = field(
        default=None, metadata=_about("where to paste the patch", choices=DESTINATIONS, modes=_SALIENCYMIX)
    )
    box: str | Any = field(
        default=None,
        metadata=_about(
            "move or cut boxes that cross the border; the default for cutmix is clip", choices=BOXES, modes=MODES[:2]
        ),
    )
    per_batch: bool | Any = field(default=None, metadata=_about("use one lam and one box for the whole batch"))
    label_weight: str = field(
        default="area",
        metadata=_about(
            "weight labels by area, or by saliency kept and pasted", choices=LABEL_WEIGHTS, modes=_SALIENCYMIX
        ),
    )
    algorithm: str = field(default="auto", metadata=_about("array operations or kernels", choices=ALGORITHMS))

    def __post_init__(self) -> None:
        if self.modes is None:
            object.__setattr__(self, "modes", {"saliencymix": 1.0})
        else:
            _check_modes(self.modes)
        for name, value in vars(self).items():
            declared = _DECLARED[name]
            if value is None or value is declared.default:  # None and defaults are valid
                continue
            if name == "saliency":
                get_detector(value)
            elif name == "alpha":
                _check_alpha(value, self.modes)
            elif name == "prob":
                check_fraction(value, name)
            elif name == "per_batch":
                check_flag(value, name)
            elif declared.metadata["choices"]:
                check_choice(value, name, declared.metadata["choices"])
        if self.label_weight != "area" and "saliencymix" not in self.modes:
            msg = f"label_weight must be 'area' where saliencymix is not among the modes, got {self.label_weight!r}"
            raise ValueError(msg)
        for name, value in _PRESETS[self.preset].items():
            if getattr(self, name) is None:
                of_cutmix = name == "box" and "saliencymix" not in self.modes
                object.__setattr__(self, name, _BOX_OF_CUTMIX if of_cutmix else value)

    @property
    def mode(self) -> str | None:
        """The mode if there is exactly one, otherwise None."""
        return next(iter(self.modes)) if len(self.modes) == 1 else None

    @property
    def needs_point(self) -> bool:
        """Whether each image needs a random point: with several modes, with cutmix, or with a random destination."""
        return self.mode in (None, "cutmix") or (self.mode == "saliencymix" and self.destination == "random")

    @property
    def probabilities(self) -> dict[str, float]:
        """The normalised probability of each mode, in the given order."""
        total = sum(self.modes.values())
        return {name: weight / total for name, weight in self.modes.items()}

    @property
    def alphas(self) -> dict[str, float]:
        """The alpha of each mode."""
        alpha = self.alpha
        return {name: float(alpha[name] if isinstance(alpha, Mapping) else alpha) for name in self.modes}


_DECLARED: dict[str, Field[Any]] = {declared.name: declared for declared in fields(MixOptions)}

PRESETS = {name: MixOptions(preset=name) for name in _PRESETS}


def check_with_peaks(options: MixOptions, peaks: Any, saliency: str | Detector | None = None) -> None:
    """Require options that are compatible with `peaks`, if it is given; `saliency` is the user's argument."""
    if peaks is None:
        return
    if saliency is not None:
        msg = f"saliency must be left out where peaks are given, got {saliency!r}"
        raise ValueError(msg)
    if options.label_weight != "area":
        msg = f"label_weight must be 'area' where peaks are given: there is no map, got {options.label_weight!r}"
        raise ValueError(msg)
    for name in ("source", "destination"):
        if getattr(options, name) == "non_salient":
            msg = f"{name} must not be 'non_salient' where peaks are given: they are the most salient pixels"
            raise ValueError(msg)


def unused_options(mode: str) -> tuple[str, ...]:
    """Return the options that a mode does not use; for ``"none"``, all of them."""
    return tuple(name for name, declared in _DECLARED.items() if mode not in declared.metadata["modes"])


def add_option(parser: argparse._ActionsContainer, name: str, *flags: str) -> None:
    """Add a mixing option to a command line; the default flag is ``--name``."""
    declared = _DECLARED[name]
    add = functools.partial(
        parser.add_argument,
        *(flags or (f"--{name.replace('_', '-')}",)),
        default=declared.default,
        help=declared.metadata["help"],
    )
    if name == "per_batch":
        add(action=argparse.BooleanOptionalAction)
    elif declared.metadata["choices"]:
        add(choices=declared.metadata["choices"])
    else:
        add(type=float, metavar=declared.metadata["metavar"])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that only mean that an option is not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return an argparse type for integers in `least`..`most`; the default maximum is that of DALI's arguments.

    Examples
    --------
    >>> whole_number(1)("12")
    12
    """

    def read(text: str) -> int:
        digits = text.strip()
        number = int(digits) if digits.isdecimal() and len(digits) <= 20 else None
        if number is None or not least <= number <= most:
            rule = (
                f"at most {most}" if digits.isdecimal() and (number is None or number > most) else f"at least {least}"
            )
            msg = f"must be a whole number of {rule}, got {printable(text)[:40]}"
            raise argparse.ArgumentTypeError(msg)
        return number

    return read


def _check_modes(modes: Mapping[str, float]) -> None:
    if not isinstance(modes, Mapping) or not modes:
        msg = f"modes must map mode names ({', '.join(MODES)}) to weights, got {modes!r}"
        raise ValueError(msg)
    for name, weight in modes.items():
        check_choice(name, "modes", MODES)
        check_positive(weight, f"modes[{name!r}]")


def _check_alpha(alpha: float | Mapping[str, float], modes: Mapping[str, float]) -> None:
    if not isinstance(alpha, Mapping):
        check_positive(alpha, "alpha")
        return
    if set(alpha) != set(modes):
        msg = f"alpha must be one number, or one for each of {', '.join(modes)}, got {dict(alpha)!r}"
        raise ValueError(msg)
    for name in modes:
        check_positive(alpha[name], f"alpha[{name!r}]")
