"""A training that has lost its way: losses or weights that are no numbers, noticed before a good checkpoint is lost."""

from __future__ import annotations

from pathlib import Path

import torch

from dali_saliencymix.training.optimisation import Updater


class DivergenceWatch:
    """Counts steps without a finite loss on the device, and ends the run when it is asked and there are too many.

    Parameters
    ----------
    max_nan_steps : int
        How many such steps in a row end the run.
    device : torch.device
        Where the losses are.
    last : path
        The checkpoint that a run would go on from, which an error names.
    """

    def __init__(self, max_nan_steps: int, device: torch.device, last: Path) -> None:
        self._max_nan_steps = max_nan_steps
        self._last = last
        self._in_a_row = torch.zeros((), device=device)

    def count(self, loss: torch.Tensor) -> None:
        """Take note of the loss of a step, without waiting for the GPU."""
        self._in_a_row = torch.where(loss.detach().isfinite(), 0, self._in_a_row + 1)

    def check_loss(self, loss: float, epoch: int, step: int) -> None:
        """Raise ValueError if too many steps in a row had no loss; this waits for the GPU.

        `loss` is that of the last step, `step` of `epoch`, both counted from 1.
        """
        count = int(self._in_a_row)
        if count >= self._max_nan_steps:
            msg = f"the loss became {loss} in epoch {epoch}, step {max(step - count + 1, 1)}; {self._advice()}"
            raise ValueError(msg)

    def check_weights(self, updater: Updater, epoch: int, step: int) -> None:
        """Raise ValueError if a weight is no number; this waits for the GPU."""
        if not updater.is_finite():
            msg = f"some weights are not finite after epoch {epoch}, step {step}; {self._advice()}"
            raise ValueError(msg)

    def _advice(self) -> str:
        """Say what may help, and what is left of the training."""
        left = f"{self._last} is from before" if self._last.exists() else "there is no checkpoint yet"
        return f"a smaller --lr may help, more --lr-warmup-epochs, --clip-grad-norm 1, or --amp-dtype bf16; {left}"
