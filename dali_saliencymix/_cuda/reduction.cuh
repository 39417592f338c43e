// Maxima over a block, and the peak of a map with the tie rule of boxes.py. Blocks are one-dimensional and consist of
// whole warps.

constexpr int WARP = 32;
constexpr int MAX_WARPS = 32;  // per block, from the hardware limit of 1024 threads

template <class Value>
__device__ inline Value larger(Value a, Value b) {
    return a < b ? b : a;
}

// Return the maximum of `value` over the warp, to every thread.
template <class Value>
__device__ inline Value warp_maximum(Value value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = larger(value, (Value)__shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

// Return the maximum of `value` over the block, to every thread. `slots` is shared memory with one entry per warp; no
// thread may have used it since the last barrier.
template <class Value>
__device__ inline Value block_maximum(Value value, Value* slots) {
    value = warp_maximum(value);
    if (threadIdx.x % WARP == 0) {
        slots[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    value = slots[0];
    for (int warp = 1; warp < (int)blockDim.x / WARP; ++warp) {
        value = larger(value, slots[warp]);
    }
    return value;
}

// A cell of a map as one number, which is larger for the better peak. The upper half holds the value. The lower half
// holds the closeness of the cell to the centre, which breaks ties. No two cells have the same closeness.
typedef unsigned long long Key;

__device__ inline Key peak_key(float value, int closeness, bool least) {
    const float lowest = -__int_as_float(0x7f800000);
    value = isnan(value) ? lowest : least ? -value : value;
    value += 0.0f;  // -0 and 0 are equal
    unsigned bits = __float_as_uint(value);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // now the bits are ordered like the floats
    return (Key)bits << 32 | (unsigned)closeness;
}

// The cells of a map and the image that it belongs to.
struct Cells {
    const int* closeness;  // (map_height, map_width): unique numbers, the largest at the cell nearest to the centre
    const int* nearest;    // (map_height * map_width,): the cells by distance to the centre, the inverse of `closeness`
    int map_height, map_width;
    int height, width;  // of the image
};

// Write the centre (y, x), in pixels of the image, of the cell of `key`.
__device__ inline void write_peak(Key key, Cells cells, int* peak) {
    const int cell = cells.nearest[cells.map_height * cells.map_width - (int)(unsigned)key];
    const long long y = cell / cells.map_width, x = cell % cells.map_width;
    peak[0] = (int)((2 * y + 1) * cells.height / (2 * cells.map_height));
    peak[1] = (int)((2 * x + 1) * cells.width / (2 * cells.map_width));
}
