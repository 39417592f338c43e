// Indices into a batch.

// Wrap an index outside the batch around it, as CuPy does. Indices are not checked and must not leave the memory.
__device__ inline int wrapped(int index, int count) {
    if ((unsigned)index < (unsigned)count) {
        return index;
    }
    const int remainder = index % count;
    return remainder < 0 ? remainder + count : remainder;
}
