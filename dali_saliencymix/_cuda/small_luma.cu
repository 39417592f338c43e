// Grey levels of a batch of images, reduced: saliency/grey.py, small_luma. One thread makes one pixel.
//
// A warp makes neighbours in a row, whose taps share cache lines; rows of the image between the taps are not read.

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
