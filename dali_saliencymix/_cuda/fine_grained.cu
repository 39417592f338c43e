// Fine-grained saliency from pixels to map, or to its peak: fine_grained in saliency/contrast.py.
//
// Three launches, in the order below, with 9 bytes of scratch memory per pixel. The maxima must be known before the
// sums are scaled, and large images do not fit into the shared memory of a block. All roundings are those of
// contrast.py, in the same order. Row sums are integers below 2^24, which are exact in any order.

#include "grey.cuh"
#include "reduction.cuh"

constexpr int BAND = 32;  // rows that a block processes at a time

// Return the index for `i` in -2..size+1 with the border mirrored at the centres of the outermost pixels. In an image
// of one or two pixels this takes more than one reflection. Indices further outside, which occur in strips, map to an
// arbitrary pixel.
__device__ inline int mirrored(int i, int size) {
    i = abs(i);
    i = i < size ? i : abs(2 * (size - 1) - i);
    return min(i, size - 1);
}

// 1. Grey levels after two blurs with weights (1, 2, 1) / 4 along both axes, each rounded, (N, H, W) uint8; and their
// integral image, (N, H, W) float32, without the usual first row and column of zeros.
//
// One block processes an image in bands from the top, with one row per warp, and each band in strips from the left. A
// mirrored border stays mirrored under a symmetric filter, so the margin of a strip is mirrored only once. If an image
// has only one strip, each band reuses the rows that the band above has computed for its lower margin.
//
// Levels are stored in words of four pixels, which are blurred together.
constexpr int PAIR = 2;                          // words per lane
constexpr int WORDS = PAIR * WARP;               // words per row: a strip and its margins
constexpr int MARGIN = PAIR;                     // words on each side of a strip; two pixels are needed
constexpr int STRIP = 4 * (WORDS - 2 * MARGIN);  // 240 columns; most images are not wider

// Return the row of a ring buffer that holds row y of the image, for y >= -2.
template <int SIZE>
__device__ inline unsigned* ring_row(unsigned (&ring)[SIZE][WORDS], int y) {
    return ring[(unsigned)(y + 2) % SIZE];
}

// Sum with weights (1, 2, 1) along the columns of the pixels 0 and 2 of a word, in 16 bits each; of the pixels 1 and 3
// if `shift` is 8.
__device__ inline unsigned column_sum(unsigned above, unsigned level, unsigned below, int shift) {
    const unsigned even = 0x00ff00ffu;
    return (above >> shift & even) + 2 * (level >> shift & even) + (below >> shift & even);
}

// Blur the four pixels of a word. The arguments are rows of words. At the ends of a row, the pixel without a neighbour
// becomes an arbitrary number, which is never read.
__device__ inline unsigned blurred(const unsigned* above, const unsigned* level, const unsigned* below, int word) {
    const int before = max(word - 1, 0), after = min(word + 1, WORDS - 1);
    const unsigned odd_before = column_sum(above[before], level[before], below[before], 8);
    const unsigned even = column_sum(above[word], level[word], below[word], 0);
    const unsigned odd = column_sum(above[word], level[word], below[word], 8);
    const unsigned even_after = column_sum(above[after], level[after], below[after], 0);
    // A sum is at most 16 * 255 + 8, so it does not overflow into the upper half.
    const unsigned rounding = 0x00080008u;
    const unsigned even_sum = (odd << 16 | odd_before >> 16) + 2 * even + odd + rounding;
    const unsigned odd_sum = even + 2 * odd + (even_after << 16 | even >> 16) + rounding;
    return (even_sum >> 4 & 0x00ff00ffu) | (odd_sum << 4 & 0xff00ff00u);
}

// Write the pixels of a word to x..x+3 of a row, except those beyond its end.
__device__ inline void write_four(unsigned four, unsigned char* row, int x, int width) {
    if (width % 4 == 0) {
        if (x < width) {
            *(unsigned*)(row + x) = four;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (x + i < width) {
            row[x + i] = (unsigned char)(four >> 8 * i);
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024, 2)
    integral_image(const unsigned char* __restrict__ images, long long image_stride, int height, int width,
                   int channels, unsigned char* __restrict__ grey, float* __restrict__ integral,
                   int* __restrict__ maxima) {
    __shared__ __align__(16) unsigned levels[BAND + 4][WORDS], once[BAND + 2][WORDS];
    __shared__ __align__(16) float sums[BAND][STRIP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const long long first_pixel = (long long)blockIdx.x * height * width;
    images += blockIdx.x * image_stride;
    grey += first_pixel;
    integral += first_pixel;
    if (threadIdx.x < 2) {
        maxima[2LL * blockIdx.x + threadIdx.x] = 0;  // for the next kernel
    }
    for (int top = 0; top < height; top += BAND) {
        const int bottom = min(top + BAND, height);
        const bool goes_on = top > 0 && width <= STRIP;
        int row_sum = 0;  // sum of the warp's row left of the strip
        for (int left = 0; left < width; left += STRIP) {
            for (int y = (goes_on ? top + 2 : top - 2) + warp; y < bottom + 2; y += BAND) {
                const unsigned char* row = images + (long long)mirrored(y, height) * width * channels;
                unsigned char* to = (unsigned char*)ring_row(levels, y);
#pragma unroll 4
                for (int i = 0; i < 4 * WORDS; i += WARP) {
                    const unsigned x = mirrored(left - 4 * MARGIN + i + lane, width);
                    to[i + lane] = (unsigned char)luma(row + x * channels, channels);
                }
            }
            __syncthreads();
            for (int y = (goes_on ? top + 1 : top - 1) + warp; y < bottom + 1; y += BAND) {
                const unsigned *above = ring_row(levels, y - 1), *level = ring_row(levels, y);
                const unsigned* below = ring_row(levels, y + 1);
                unsigned* to = ring_row(once, y);
#pragma unroll
                for (int word = 0; word < WORDS; word += WARP) {
                    to[word + lane] = blurred(above, level, below, word + lane);
                }
            }
            __syncthreads();
            const int y = top + warp;
            if (y < bottom) {
                const unsigned *above = ring_row(once, y - 1), *level = ring_row(once, y);
                const unsigned* below = ring_row(once, y + 1);
                // Each lane blurs the PAIR words at x and sums their pixels. Lanes beyond the strip do nothing.
                const bool inside = lane < STRIP / (4 * PAIR);
                const int x = left + 4 * PAIR * lane;
                int sum[4 * PAIR], all = 0;
#pragma unroll
                for (int i = 0; i < PAIR; ++i) {
                    const unsigned four = inside ? blurred(above, level, below, MARGIN + PAIR * lane + i) : 0;
                    if (inside) {
                        write_four(four, grey + (long long)y * width, x + 4 * i, width);
                    }
#pragma unroll
                    for (int pixel = 0; pixel < 4; ++pixel) {
                        all += four >> 8 * pixel & 255;
                        sum[4 * i + pixel] = all;
                    }
                }
                int sum_of_lanes = all;
                for (int distance = 1; distance < WARP; distance *= 2) {
                    const int other = __shfl_up_sync(0xffffffffu, sum_of_lanes, distance);
                    sum_of_lanes += lane >= distance ? other : 0;
                }
                if (inside) {
#pragma unroll
                    for (int i = 0; i < 4 * PAIR; ++i) {
                        sums[warp][4 * PAIR * lane + i] = (float)(row_sum + sum_of_lanes - all + sum[i]);
                    }
                }
                row_sum += __shfl_sync(0xffffffffu, sum_of_lanes, WARP - 1);
            }
            __syncthreads();
            // Sum along columns in float32, so that sums above 2^24 are rounded as in NumPy.
            const int x = left + threadIdx.x;
            if (threadIdx.x < STRIP && x < width) {
                float* at = integral + (long long)top * width + x;
                float sum = top > 0 ? *(at - width) : 0.0f;  // this thread wrote it
#pragma unroll 8
                for (int row = 0; row < bottom - top; ++row) {
                    sum += sums[row][threadIdx.x];
                    *at = sum;
                    at += width;
                }
            }
        }
    }
}

// Division by an integer below 2^16 with IEEE 754 rounding, without the steps that general divisors require.
//
// The relative error of the inverse is at most 2^-22, 2 units in the last place (ulp). Hence `near` is within 5 ulp of
// the quotient, the remainder has few bits and is exact, and the last sum, before it is rounded, is within 2^-19 ulp of
// the quotient. The result is correct, since no quotient is nearer than 2^-17 ulp to a midpoint between two floats:
// their distance in ulp is a fraction with denominator 2 * number.
struct Divisor {
    float number, inverse;

    __device__ inline explicit Divisor(float number) : number(number), inverse(__fdividef(1.0f, number)) {}

    __device__ inline float into(float value) const {
        const float near = value * inverse;
        return __fmaf_rn(__fmaf_rn(-number, near, value), inverse, near);
    }
};

// 2. The sums of the positive (on) and the negative (off) differences from six surrounds, (N, H, W) uint32, with on in
// the lower half; and the maxima of both for each image, (N, 2). Each is at most 6 * 255, or slightly more if sums are
// rounded.
//
// One block processes a band of an image, or a strip of the band. It has one thread for each of `columns` columns, a
// multiple of 32, and for each of the rows that it processes at a time, as many as fit. Each thread stays in its column
// and looks up the row-dependent values of the surrounds. A factor of 0 replaces the missing row and column of zeros of
// the integral image.
constexpr int SURROUNDS = 6;

struct __align__(16) Rows {
    const float *above, *below;  // the last row above the surround, and the last row of the surround
    float count, factor;         // number of rows of the surround, and factor of the row above
};

// These pointers were stored in shared memory, so the compiler no longer knows that they point to global memory.
__device__ inline float sum_at(const float* row, unsigned bytes) {
    return __ldg((const float*)((const char*)row + bytes));
}

extern "C" __global__ void __launch_bounds__(512, 2)
    surrounds(const unsigned char* __restrict__ grey, const float* __restrict__ integral, int height, int width,
              int strips, int columns, int rows_at_once, unsigned* __restrict__ on_off, int* __restrict__ maxima) {
    __shared__ Rows rows[BAND][SURROUNDS];
    constexpr int halves[SURROUNDS] = {12, 24, 28, 48, 56, 112};  // half the side of a surround
    const int bands = (height + BAND - 1) / BAND;
    const int top = blockIdx.x / strips % bands * BAND;
    const long long image = blockIdx.x / strips / bands;
    grey += image * height * width;
    on_off += image * height * width;
    integral += image * height * width;
    const int band = min(BAND, height - top);
    for (int row = threadIdx.x; row < band; row += blockDim.x) {
        const int y = top + row;
#pragma unroll
        for (int i = 0; i < SURROUNDS; ++i) {
            const int above = max(y - halves[i], -1), last = min(y + halves[i], height - 1);
            rows[row][i] = {integral + (long long)max(above, 0) * width, integral + (long long)last * width,
                            (float)(last - above), above < 0 ? 0.0f : 1.0f};
        }
    }
    const int x = blockIdx.x % strips * columns + threadIdx.x % columns;
    unsigned left[SURROUNDS], right[SURROUNDS];  // the last column before the surround, and its last column, in bytes
    float count[SURROUNDS], factor[SURROUNDS];
#pragma unroll
    for (int i = 0; i < SURROUNDS; ++i) {
        const int before = max(x - halves[i], -1), last = min(x + halves[i], width - 1);
        left[i] = 4u * max(before, 0);
        right[i] = 4u * last;
        count[i] = (float)(last - before);
        factor[i] = fminf((float)(before + 1), 1.0f);
    }
    // The mean excludes the pixel itself, unless it is the only one.
    const float less = height == 1 && width == 1 ? 0.0f : -1.0f;
    int most_on = 0, most_off = 0;
    __syncthreads();
    if (x < width) {
        const int first = threadIdx.x / columns;
        unsigned pixel = (top + first) * width + x;
        for (int row = first; row < band; row += rows_at_once, pixel += rows_at_once * width) {
            const float level = grey[pixel];
            int on = 0, all = 0;
#pragma unroll
            for (int i = 0; i < SURROUNDS; ++i) {
                const Rows at = rows[row][i];
                float surround = __fmaf_rn(sum_at(at.above, left[i]), factor[i] * at.factor, sum_at(at.below, right[i]));
                surround = __fmaf_rn(sum_at(at.below, left[i]), -factor[i], surround);
                surround = __fmaf_rn(sum_at(at.above, right[i]), -at.factor, surround);
                surround -= level;
                surround = Divisor(__fmaf_rn(at.count, count[i], less)).into(surround);
                const int difference = (int)(level - surround);
                on += max(difference, 0);
                all += difference;
            }
            const int off = on - all;
            on_off[pixel] = (unsigned)on | (unsigned)off << 16;
            most_on = max(most_on, on);
            most_off = max(most_off, off);
        }
    }
    most_on = warp_maximum(most_on);
    most_off = warp_maximum(most_off);
    if (threadIdx.x % WARP == 0) {
        atomicMax(maxima + 2 * image, most_on);
        atomicMax(maxima + 2 * image + 1, most_off);
    }
}

// Both sums scaled to 0..255 by their maxima and added in 8 bits. Truncating the quotients is exact: a quotient of
// integers below 2^24 and 2^16 is never rounded up to the next integer.
struct Contrast {
    Divisor most_on, most_off;

    __device__ inline explicit Contrast(const int* maxima)
        : most_on((float)max(maxima[0], 1)), most_off((float)max(maxima[1], 1)) {}

    __device__ inline int of(unsigned on_off) const {
        const int on = (on_off & 0xffff) * 255, off = (on_off >> 16) * 255;
        return ((int)most_on.into((float)on) + (int)most_off.into((float)off)) & 255;
    }
};

// 3a. The maps, (N, H, W) float32, multiplied by the rounded inverse of 255, as in OpenCV.
extern "C" __global__ void contrast_maps(const unsigned* __restrict__ on_off, const int* __restrict__ maxima,
                                         int pixels, long long all_pixels, float* __restrict__ maps) {
    const long long pixel = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel < all_pixels) {
        maps[pixel] = (float)Contrast(maxima + 2 * (pixel / pixels)).of(on_off[pixel]) * 0.003921568859368562698f;
    }
}

// 3b. The peaks of the maps, (N, 2), without the maps. One block searches one image. A thread issues the loads of AHEAD
// pixels before it waits for the first.
constexpr int AHEAD = 4;

extern "C" __global__ void __launch_bounds__(1024, 2)
    contrast_peaks(const unsigned* __restrict__ on_off, const int* __restrict__ maxima,
                   const int* __restrict__ closeness, const int* __restrict__ nearest, int height, int width, int least,
                   int* __restrict__ peaks) {
    __shared__ Key slots[MAX_WARPS];
    const unsigned pixels = height * width;
    const Contrast contrast(maxima + 2LL * blockIdx.x);
    on_off += (long long)blockIdx.x * pixels;
    Key best = 0;
    for (unsigned first = threadIdx.x; first < pixels; first += AHEAD * blockDim.x) {
        unsigned sums[AHEAD];
        int close[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const unsigned pixel = first + i * blockDim.x;
            sums[i] = pixel < pixels ? on_off[pixel] : 0;
            close[i] = pixel < pixels ? closeness[pixel] : 0;  // never 0 for a pixel
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int value = contrast.of(sums[i]);
            const Key key = (Key)(least ? 255 - value : value) << 32 | (unsigned)close[i];
            best = larger(best, close[i] ? key : 0);
        }
    }
    best = block_maximum(best, slots);
    if (threadIdx.x == 0) {
        write_peak(best, {closeness, nearest, height, width, height, width}, peaks + 2LL * blockIdx.x);
    }
}
