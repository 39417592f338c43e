// Reduced grey levels of a batch of images: small_luma in saliency/grey.py. One thread computes one pixel.
//
// A warp computes adjacent pixels of a row, whose taps share cache lines. Rows of the image between taps are not read.

#include "grey.cuh"

extern "C" __global__ void small_luma(const unsigned char* __restrict__ images, long long image_stride, int width,
                                      int channels, const long long* __restrict__ row_index,
                                      const int* __restrict__ row_weight, int rows,
                                      const long long* __restrict__ column_index,
                                      const int* __restrict__ column_weight, int columns, long long pixels,
                                      int* __restrict__ grey) {
    const long long pixel = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel >= pixels) {
        return;
    }
    const int x = (int)(pixel % columns);
    const int y = (int)(pixel / columns % rows);
    const unsigned char* image = images + pixel / columns / rows * image_stride;
    const Taps down = {row_index, row_weight, rows}, along = {column_index, column_weight, columns};
    grey[pixel] = reduced_luma(image, width, channels, down, along, y, x);
}
