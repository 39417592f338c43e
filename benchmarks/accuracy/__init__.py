"""Study whether mixing and saliency improve accuracy: one network, trained many times on CIFAR-10, same seeds per arm.

    python -m benchmarks.accuracy DATA -o FILE    trains the pairs of arm and seed that FILE lacks, and prints tables

DATA is the folder of CIFAR-10's files, or of its mosaics (see `mosaics`). `arms` defines what is compared, `run` trains
once, `study` manages the file, and `summary` computes means and intervals.
"""
