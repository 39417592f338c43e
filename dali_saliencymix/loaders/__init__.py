"""Data loaders for training and validation: DALI pipelines, their iterators, and a loader without DALI."""
