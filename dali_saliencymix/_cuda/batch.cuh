// Indices into a batch.

// Wrap around an index outside the batch, as CuPy does. Indices are not checked, and no thread may access memory
// outside the batch.
__device__ inline int wrapped(int index, int count) {
    if ((unsigned)index < (unsigned)count) {
        return index;
    }
    const int remainder = index % count;
    return remainder < 0 ? remainder + count : remainder;
}
