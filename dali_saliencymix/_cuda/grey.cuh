// Grey levels of uint8 HWC images and their reduction, in the integer arithmetic of saliency/grey.py.

// Rec. 601 luma weights in units of 2^-15, rounded.
__device__ inline int luma(const unsigned char* pixel, int channels) {
    if (channels == 1) {
        return pixel[0];
    }
    return (9798 * pixel[0] + 19235 * pixel[1] + 3735 * pixel[2] + (1 << 14)) >> 15;
}

// Positions of the samples along one axis: the tables tap_indices and tap_weights of _tables.py.
struct Taps {
    const long long* index;  // (2 * size,): the lower neighbour of each sample, then the upper one
    const int* weight;       // (size,): weight of the upper neighbour, in units of 1/256
    int size;                // number of samples
};

// Return the grey level of one pixel of the reduced image.
__device__ inline int reduced_luma(const unsigned char* image, int width, int channels, Taps rows, Taps columns, int y,
                                   int x) {
    const long long left = columns.index[x] * channels;
    const long long right = columns.index[x + columns.size] * channels;
    const int weight = columns.weight[x];
    int level[2];
    for (int i = 0; i < 2; ++i) {
        const unsigned char* row = image + rows.index[y + i * rows.size] * width * channels;
        level[i] = luma(row + left, channels) * (256 - weight) + luma(row + right, channels) * weight;
    }
    return (level[0] * (256 - rows.weight[y]) + level[1] * rows.weight[y] + (1 << 15)) >> 16;
}
