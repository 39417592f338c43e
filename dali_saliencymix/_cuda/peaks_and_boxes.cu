// From maps to peaks, and from peaks to boxes, in the integer and float64 arithmetic of boxes.py.

#include "batch.cuh"
#include "reduction.cuh"

// Find the peak of each map (N, map_height, map_width) float32. One block searches one map.
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

// Return the interval of `side` pixels around `centre`, moved inside 0..size.
__device__ inline Interval fitted(int centre, int side, int size) {
    const int start = clipped(centre - side / 2, 0, size - side);
    return {start, start + side};
}

__device__ inline Interval around(int centre, double share, int size, bool fit) {
    // float64 as in boxes.py, so that the floor does not depend on the device. If lam is outside [0, 1], the share is
    // too, or it is NaN; the box must stay inside the image even then.
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

// Compute the boxes around the peaks of the sources, the boxes in the receivers, and the kept share of the receivers.
// One thread computes one pair of boxes. Empty boxes are all 0.
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
