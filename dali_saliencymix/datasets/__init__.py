"""Data sets: folders of images, CIFAR, a small one that is made here, and what is wrong with files."""
