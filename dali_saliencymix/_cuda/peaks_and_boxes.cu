// From maps to peaks and from peaks to boxes: boxes.py, in its integers and its float64.

#include "batch.cuh"
#include "reduction.cuh"

// Peak of each map (N, map_height, map_width) float32. One block looks at one map.
extern "C" __global__ void __launch_bounds__(1024)
    saliency_peaks(const float* __restrict__ maps, const int* __restrict__ closeness, const int* __restrict__ nearest,
                   int map_height, int map_width, int height, int width, int least, int* __restrict__ peaks) {
    __shared__ Key slots[MAX_WARPS];
    const int cells = map_height * map_width;
    const float* map = maps + (long long)blockIdx.x * cells;
    Key best = 0;
    for (int cell = threadIdx.x; cell < cells; cell += blockDim.x) {
        best = larger(best, peak_key(map[cell], closeness[cell], least));
    }
    best = block_maximum(best, slots);
    if (threadIdx.x == 0) {
        write_peak(best, {closeness, nearest, map_height, map_width, height, width}, peaks + 2LL * blockIdx.x);
    }
}

__device__ inline int clipped(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

struct Interval {
    int start, stop;
};

// Interval of `side` pixels around `centre`, moved inside 0..size.
__device__ inline Interval fitted(int centre, int side, int size) {
    const int start = clipped(centre - side / 2, 0, size - side);
    return {start, start + side};
}

__device__ inline Interval around(int centre, double share, int size, bool fit) {
    // In float64 as in boxes.py: the floor must not depend on where it is computed. A share that is no number, or not
    // in [0, 1], as of a lam outside of it, must not send anybody out of the image.
    const double length = floor(size * share);
    const int side = length >= 0 ? (length <= size ? (int)length : size) : 0;
    if (fit) {
        return fitted(centre, side, size);
    }
    return {clipped(centre - side / 2, 0, size), clipped(centre + side / 2, 0, size)};
}

__device__ inline void write_box(Interval rows, Interval columns, int* box) {
    box[0] = rows.start;
    box[1] = columns.start;
    box[2] = rows.stop;
    box[3] = columns.stop;
}

// Boxes around the peaks of the sources, where they go, and the share that is left of the receivers. One thread makes
// one box. Empty boxes are all 0.
template <class Real>
__device__ inline void boxes_at_peaks(const int* peaks, const int* source_index, int index_step, const Real* lam,
                                      int lam_step, const int* centres, int count, int height, int width, int fit,
                                      int* boxes, int* source_boxes, float* kept) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) {
        return;
    }
    const int* peak = peaks + 2LL * wrapped(source_index[(long long)i * index_step], count);
    const double share = sqrt(1.0 - (double)lam[(long long)i * lam_step]);
    Interval source_rows = around(peak[0], share, height, fit), source_columns = around(peak[1], share, width, fit);
    int sides[2] = {source_rows.stop - source_rows.start, source_columns.stop - source_columns.start};
    if (sides[0] == 0 || sides[1] == 0) {
        sides[0] = sides[1] = 0;
        source_rows = source_columns = {0, 0};
    }
    Interval rows = source_rows, columns = source_columns;
    if (centres != nullptr && sides[0] != 0) {
        rows = fitted(centres[2 * i], sides[0], height);
        columns = fitted(centres[2 * i + 1], sides[1], width);
    }
    write_box(rows, columns, boxes + 4LL * i);
    if (source_boxes != nullptr) {
        write_box(source_rows, source_columns, source_boxes + 4LL * i);
    }
    kept[i] = (float)(1 - (double)((long long)sides[0] * sides[1]) / (double)((long long)height * width));
}

extern "C" __global__ void boxes_at_peaks_float32(const int* peaks, const int* source_index, int index_step,
                                                  const float* lam, int lam_step, const int* centres, int count,
                                                  int height, int width, int fit, int* boxes, int* source_boxes,
                                                  float* kept) {
    boxes_at_peaks(peaks, source_index, index_step, lam, lam_step, centres, count, height, width, fit, boxes,
                   source_boxes, kept);
}

extern "C" __global__ void boxes_at_peaks_float64(const int* peaks, const int* source_index, int index_step,
                                                  const double* lam, int lam_step, const int* centres, int count,
                                                  int height, int width, int fit, int* boxes, int* source_boxes,
                                                  float* kept) {
    boxes_at_peaks(peaks, source_index, index_step, lam, lam_step, centres, count, height, width, fit, boxes,
                   source_boxes, kept);
}
