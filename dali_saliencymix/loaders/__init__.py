"""Batches on a device for training and validation: the DALI graphs, the loaders around them, a loader without DALI."""
