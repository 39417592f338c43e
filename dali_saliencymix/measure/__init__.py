"""Measurements: figures with a range, interleaved rounds, the environment, result files and their comparison.

`dali_saliencymix.bottleneck`, the training log and the benchmarks of the repository use this package.
"""
