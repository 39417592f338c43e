// Paste, flip, normalise and change the layout in one pass over uint8 images: paste_normalised in pixels.py.
//
// The output has 2 or 4 times the bytes of the input, so the stores limit the speed. In CHW a thread produces all
// channels of a pixel, and in HWC one number. In both layouts a warp writes adjacent numbers.

#include "paste.cuh"

// NVRTC may be installed without cuda_fp16.h, so use the one instruction needed directly.
#ifdef __CUDACC__
__device__ inline unsigned short half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

struct Half {
    unsigned short bits;
};

__device__ inline void store(float value, float* out) { *out = value; }
__device__ inline void store(float value, Half* out) { out->bits = half_bits(value); }

// Blocks iterate over the pixels (CHW) or the numbers (HWC) of an image, then over images.
template <class Out, bool CHW>
__device__ inline void paste_normalised(const unsigned char* __restrict__ images, int count, int height, int width,
                                        int channels, long long image_stride, const int* __restrict__ source_index,
                                        int index_step, const int* __restrict__ boxes,
                                        const int* __restrict__ source_boxes,
                                        const unsigned char* __restrict__ mirror,  // (N,) bool, or null
                                        const float* __restrict__ scaling,         // (2, C): mean, 1 / std
                                        int blocks_per_image, Out* __restrict__ out) {
    const int image = blockIdx.x / blocks_per_image;
    const int number = blockIdx.x % blocks_per_image * blockDim.x + threadIdx.x;
    const int pixels = height * width;
    const int pixel = CHW ? number : number / channels;
    if (pixel >= pixels) {
        return;
    }
    const int y = pixel / width;
    // The mixed image is flipped together with its patch.
    const int x = mirror != nullptr && mirror[image] ? width - 1 - pixel % width : pixel % width;
    const Patch patch = patch_of(boxes, source_boxes, image);
    const bool pasted = patch.covers(y, x);
    const int from = pasted ? wrapped(source_index[(long long)image * index_step], count) : image;
    const int from_y = pasted ? inside(y + patch.dy, height) : y, from_x = pasted ? inside(x + patch.dx, width) : x;
    const unsigned char* level = images + from * image_stride + ((long long)from_y * width + from_x) * channels;
    out += (long long)image * pixels * channels;
    if (CHW) {
        for (int channel = 0; channel < channels; ++channel) {
            store((level[channel] - scaling[channel]) * scaling[channels + channel],
                  out + (long long)channel * pixels + pixel);
        }
    } else {
        const int channel = number % channels;
        store((level[channel] - scaling[channel]) * scaling[channels + channel], out + number);
    }
}

#define PASTE_NORMALISED(NAME, OUT, CHW)                                                                            \
    extern "C" __global__ void paste_normalised_##NAME(                                                             \
        const unsigned char* images, int count, int height, int width, int channels, long long image_stride,        \
        const int* source_index, int index_step, const int* boxes, const int* source_boxes,                         \
        const unsigned char* mirror, const float* scaling, int blocks_per_image, OUT* out) {                        \
        paste_normalised<OUT, CHW>(images, count, height, width, channels, image_stride, source_index, index_step,  \
                                   boxes, source_boxes, mirror, scaling, blocks_per_image, out);                    \
    }

PASTE_NORMALISED(float32_CHW, float, true)
PASTE_NORMALISED(float32_HWC, float, false)
PASTE_NORMALISED(float16_CHW, Half, true)
PASTE_NORMALISED(float16_HWC, Half, false)
