"""Open the data set that the options of a run name."""

from __future__ import annotations

from dali_saliencymix.loaders.base import Data, chosen_backend
from dali_saliencymix.loaders.options import DataOptions


def open_data(options: DataOptions, classes: list[str] | None = None) -> Data:
    """Open the data set that the options of a run name. The result creates the loaders of each process.

    Parameters
    ----------
    options : DataOptions
        Options that determine the batches.
    classes : list of str, optional
        Class names in label order, for runs without training. The training images, which define the names otherwise,
        are then not read and need not exist.

    Returns
    -------
    Data

    Raises
    ------
    FileNotFoundError, NotADirectoryError, ValueError
        If the data set is missing or damaged, or an option is invalid.
    """
    # Imported here: DALI and torchvision take seconds to import, and an invalid option should fail at once.
    if chosen_backend(options) == "synthetic":
        from dali_saliencymix.loaders.synthetic import open_synthetic

        return open_synthetic(options, classes)
    if options.dataset == "folder":
        from dali_saliencymix.loaders.folder import open_folder

        return open_folder(options, classes)
    from dali_saliencymix.loaders.cifar import open_cifar

    return open_cifar(options, classes)
