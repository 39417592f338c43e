"""Data sets: image folders, CIFAR, a small generated data set, and checks for damaged files."""
