// Fine-grained saliency from pixels to map, or to its peak: saliency/contrast.py, fine_grained.
//
// Five launches, in the order below, with a scratch of 9 bytes a pixel: the integral image of a 224x224 image and its
// grey levels, 253 KB, do not fit into the shared memory of a block, and the maxima have to be known before the maps
// are added. All roundings are those of contrast.py, in its order; row sums are integers under 2^24, exact in any.

#include "grey.cuh"
#include "reduction.cuh"

// Index with the border mirrored at the centres of the outermost pixels, for i in -2..size+1; in an image of one or
// two pixels that takes more than one reflection. What lies further outside, where a tile does, becomes any pixel.
__device__ inline int mirrored(int i, int size) {
    i = abs(i);
    i = i < size ? i : abs(2 * (size - 1) - i);
    return min(i, size - 1);
}

// 1. Grey levels after two blurs of weights 1-2-1 over 4 along both axes, each rounded: (N, H, W) uint8. One block
// makes a tile of TILE x TILE. A mirrored border stays mirrored under a symmetric filter, so the tile's margin is
// mirrored once. Launched over the tiles of a row, of an image, of the batch.
constexpr int TILE = 32;
constexpr int MARGIN = 2;
constexpr int ROWS = TILE + 2 * MARGIN;

// Blur a tile at a position that has neighbours.
__device__ inline int blurred(const short (&tile)[ROWS][ROWS], int y, int x) {
    int sum = 0;
    for (int dy = -1; dy <= 1; ++dy) {
        sum += (2 - dy * dy) * (tile[y + dy][x - 1] + 2 * tile[y + dy][x] + tile[y + dy][x + 1]);
    }
    return (sum + 8) >> 4;
}

extern "C" __global__ void __launch_bounds__(256)
    blurred_luma(const unsigned char* __restrict__ images, long long image_stride, int height, int width, int channels,
                 int tiles_down, int tiles_along, unsigned char* __restrict__ grey) {
    __shared__ short levels[ROWS][ROWS], once[ROWS][ROWS];
    const int number = blockIdx.x / (tiles_down * tiles_along);
    const int top = blockIdx.x / tiles_along % tiles_down * TILE, left = blockIdx.x % tiles_along * TILE;
    const unsigned char* image = images + number * image_stride;
    for (int i = threadIdx.x; i < ROWS * ROWS; i += blockDim.x) {
        const int y = mirrored(top - MARGIN + i / ROWS, height), x = mirrored(left - MARGIN + i % ROWS, width);
        levels[i / ROWS][i % ROWS] = (short)luma(image + ((long long)y * width + x) * channels, channels);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (ROWS - 2) * (ROWS - 2); i += blockDim.x) {
        const int y = 1 + i / (ROWS - 2), x = 1 + i % (ROWS - 2);
        once[y][x] = (short)blurred(levels, y, x);
    }
    __syncthreads();
    grey += (long long)number * height * width;
    for (int i = threadIdx.x; i < TILE * TILE; i += blockDim.x) {
        const int y = top + i / TILE, x = left + i % TILE;
        if (y < height && x < width) {
            grey[(long long)y * width + x] = (unsigned char)blurred(once, i / TILE + MARGIN, i % TILE + MARGIN);
        }
    }
}

// The integral image, (N, H + 1, W + 1) float32: its first row and its first column are 0.
//
// 2. Sums along the rows; one warp makes a row. `rows` are those of all images.
extern "C" __global__ void row_sums(const unsigned char* __restrict__ grey, int height, int width, long long rows,
                                    float* __restrict__ integral) {
    const int lane = threadIdx.x % WARP;
    const long long row = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= rows) {
        return;  // whole warps only
    }
    const unsigned char* from = grey + row * width;
    float* to = integral + ((row / height) * (height + 1) + row % height + 1) * (width + 1);
    if (lane == 0) {
        to[0] = 0.0f;
    }
    int before = 0;
    for (int start = 0; start < width; start += WARP) {
        const int x = start + lane;
        int sum = x < width ? from[x] : 0;
        for (int distance = 1; distance < WARP; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, sum, distance);
            sum += lane >= distance ? other : 0;
        }
        sum += before;
        if (x < width) {
            to[x + 1] = (float)sum;
        }
        before = __shfl_sync(0xffffffffu, sum, WARP - 1);
    }
}

// 3. Sums down the columns, in place, from the top and in float32, so that sums over 2^24 are rounded where NumPy
// rounds them. One thread makes a column; neighbours read neighbours. There are few columns, so a thread asks for
// AHEAD numbers before it waits for the first. `columns` are those of all images.
constexpr int AHEAD = 16;

extern "C" __global__ void column_sums(int height, int width, long long columns, float* __restrict__ integral,
                                       int* __restrict__ maxima) {
    const long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) {
        return;
    }
    const int pitch = width + 1, x = (int)(column % pitch);
    const long long image = column / pitch;
    float* at = integral + image * (height + 1) * pitch + x;
    if (x < 2) {
        maxima[2 * image + x] = 0;  // for the kernel that follows
    }
    *at = 0.0f;
    float sum = 0.0f;
    for (int first = 0; first < height; first += AHEAD) {
        float row_sum[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            row_sum[i] = first + i < height ? at[(long long)(i + 1) * pitch] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (first + i < height) {
                sum += row_sum[i];
                at[(long long)(i + 1) * pitch] = sum;
            }
        }
        at += (long long)AHEAD * pitch;
    }
}

// 4. What is brighter (on) and what is darker (off) than six surrounds, each summed: (N, H, W) uint32, on in the lower
// half; and the maxima of both for each image, (N, 2). Each is at most 6 * 255. Launched over the blocks of an image,
// of the batch.
extern "C" __global__ void __launch_bounds__(256)
    surrounds(const unsigned char* __restrict__ grey, const float* __restrict__ integral, int height, int width,
              int blocks_per_image, unsigned* __restrict__ on_off, int* __restrict__ maxima) {
    __shared__ unsigned on_slots[MAX_WARPS], off_slots[MAX_WARPS];
    const int pixels = height * width, pitch = width + 1;
    const long long image = blockIdx.x / blocks_per_image;
    grey += image * pixels;
    on_off += image * pixels;
    integral += image * (height + 1) * pitch;
    const int pixel = blockIdx.x % blocks_per_image * blockDim.x + threadIdx.x;
    unsigned on = 0, off = 0;
    if (pixel < pixels) {
        const int y = pixel / width, x = pixel % width;
        const float level = grey[pixel];
        const int halves[6] = {12, 24, 28, 48, 56, 112};  // half the side of a surround
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            const int half = halves[i];
            const int top = max(y - half + 1, 0), bottom = min(y + half + 1, height);
            const int left = max(x - half + 1, 0), right = min(x + half + 1, width);
            const float* above = integral + (long long)top * pitch;
            const float* below = integral + (long long)bottom * pitch;
            float surround = below[right] + above[left];
            surround -= below[left];
            surround -= above[right];
            surround -= level;
            surround /= (float)max((bottom - top) * (right - left) - 1, 1);
            const int difference = (int)(level - surround);
            on += max(difference, 0);
            off += max(-difference, 0);
        }
        on_off[pixel] = on | off << 16;
    }
    const unsigned most_on = block_maximum(on, on_slots), most_off = block_maximum(off, off_slots);
    if (threadIdx.x == 0) {
        atomicMax(maxima + 2 * image, (int)most_on);
        atomicMax(maxima + 2 * image + 1, (int)most_off);
    }
}

// Both sums brought to 0..255 by their maxima and added in 8 bits, as OpenCV does, which scales by the rounded inverse.
__device__ inline float contrast(unsigned on_off, const int* maxima) {
    const int on = (int)(on_off & 0xffff) * 255 / max(maxima[0], 1);
    const int off = (int)(on_off >> 16) * 255 / max(maxima[1], 1);
    return (float)((on + off) & 255) * 0.003921568859368562698f;
}

// 5. Either the maps, (N, H, W) float32, ...
extern "C" __global__ void contrast_maps(const unsigned* __restrict__ on_off, const int* __restrict__ maxima,
                                         int pixels, long long all_pixels, float* __restrict__ maps) {
    const long long pixel = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel < all_pixels) {
        maps[pixel] = contrast(on_off[pixel], maxima + 2 * (pixel / pixels));
    }
}

// ... or their peaks, (N, 2). One block looks at one image.
extern "C" __global__ void __launch_bounds__(1024)
    contrast_peaks(const unsigned* __restrict__ on_off, const int* __restrict__ maxima,
                   const int* __restrict__ closeness, const int* __restrict__ nearest, int height, int width, int least,
                   int* __restrict__ peaks) {
    __shared__ Key slots[MAX_WARPS];
    const int pixels = height * width;
    on_off += (long long)blockIdx.x * pixels;
    Key best = 0;
    for (int pixel = threadIdx.x; pixel < pixels; pixel += blockDim.x) {
        const float value = contrast(on_off[pixel], maxima + 2LL * blockIdx.x);
        best = larger(best, peak_key(value, closeness[pixel], least));
    }
    best = block_maximum(best, slots);
    if (threadIdx.x == 0) {
        write_peak(best, {closeness, nearest, height, width, height, width}, peaks + 2LL * blockIdx.x);
    }
}
