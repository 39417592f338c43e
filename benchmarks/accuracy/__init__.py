"""Does mixing help, and does saliency? One network, trained many times on CIFAR-10, with equal seeds for each arm.

    python -m benchmarks.accuracy DATA -o FILE    trains the pairs of arm and seed that FILE lacks, and shows a table

DATA is the folder of CIFAR-10's files, or of its mosaics (see `data`). `arms` says what is compared, `run` trains once,
`study` keeps the file, `summary` makes means and intervals of it.
"""
