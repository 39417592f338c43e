"""From the options of a run to its data set."""

from __future__ import annotations

from dali_saliencymix.loaders.base import Data, chosen_backend
from dali_saliencymix.loaders.options import DataOptions


def open_data(options: DataOptions, classes: list[str] | None = None) -> Data:
    """Look at the data set that the options of a run name, once; what it returns makes the loaders of each process.

    Parameters
    ----------
    options : DataOptions
        What the batches are like.
    classes : list of str, optional
        Names of the classes in label order, where nothing is trained: the training images, which the names come from
        otherwise, are not read and need not exist.

    Returns
    -------
    Data

    Raises
    ------
    FileNotFoundError, NotADirectoryError, ValueError
        If the data set is not there, is damaged, or an option is wrong.
    """
    # Imported here: DALI and torchvision take seconds, which an option that is refused need not wait for.
    if chosen_backend(options) == "synthetic":
        from dali_saliencymix.loaders.synthetic import open_synthetic

        return open_synthetic(options, classes)
    if options.dataset == "folder":
        from dali_saliencymix.loaders.imagenet import open_folder

        return open_folder(options, classes)
    from dali_saliencymix.loaders.cifar import open_cifar

    return open_cifar(options, classes)
