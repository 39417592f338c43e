// Which image of a batch an index means.

// An index outside the batch, which nobody has checked, counts around it, as in CuPy: it must not leave the memory.
__device__ inline int wrapped(int index, int count) {
    if ((unsigned)index < (unsigned)count) {
        return index;
    }
    const int remainder = index % count;
    return remainder < 0 ? remainder + count : remainder;
}
