"""SaliencyMix in DALI jobs as people have them: one job in one file.

``python -m pipelines.examples NAME [DATA]`` runs one; without DATA on a small data set that it makes.
"""
