// Out-of-place pasting: paste_boxes in pixels.py. Pixels of any dtype are copied as bytes.
//
// Each byte of the result is written once, and one byte is read for it, from the receiver or from the source. There is
// no other memory traffic. A thread copies CHUNKS vectors, one block width apart, and issues all loads before it waits
// for the first.

#include "paste.cuh"

constexpr int CHUNKS = 4;
constexpr int THREADS = 256;

// Vectors consist of words, which stay in registers; bytes in registers cannot be indexed.
struct alignas(16) Vector16 {
    unsigned word[4];
};
struct Vector4 {
    unsigned word[1];
};
struct Vector1 {
    unsigned char word[1];
};

// Shape and strides of a batch, in bytes unless stated otherwise.
struct Layout {
    int count;               // images
    int height, width;       // pixels
    int pixel;               // size of a pixel
    long long image_stride;  // distance between images in `images`; rows and pixels are contiguous
};

// One row of a patch, in bytes from the start of the row.
struct PatchRow {
    int left, right;              // its interval in the receiver
    const unsigned char* source;  // the whole row of the source
    int shift;                    // offset from the receiver's interval to the source's
    int row_bytes, pixel;
};

// Return `word`, which holds the bytes from `start` on, with the bytes inside the patch replaced one by one.
template <class Word>
__device__ inline Word patched(Word word, int start, PatchRow row) {
#pragma unroll 1  // rarely executed, and long code
    for (int i = 0; i < (int)sizeof(Word); ++i) {
        const int position = start + i;
        if (row.left <= position && position < row.right) {
            int at = position + row.shift;
            if ((unsigned)at >= (unsigned)row.row_bytes) {  // the source box crosses the border: nearest pixel
                at = (at < 0 ? 0 : row.row_bytes - row.pixel) + position % row.pixel;
            }
            word = (Word)((word & ~(0xffu << 8 * i)) | (unsigned)row.source[at] << 8 * i);
        }
    }
    return word;
}

// Rows and addresses are multiples of the vector's size. Blocks iterate over the chunks of an image, then over images.
template <class Vector>
__device__ inline void paste(const unsigned char* __restrict__ images, Layout layout,
                             const int* __restrict__ source_index, int index_step, const int* __restrict__ boxes,
                             const int* __restrict__ source_boxes, int blocks_per_image,
                             unsigned char* __restrict__ mixed) {
    constexpr int SIZE = sizeof(Vector), WORD = sizeof(Vector::word[0]);
    const int image = blockIdx.x / blocks_per_image;
    const int first = blockIdx.x % blocks_per_image * (THREADS * CHUNKS) + threadIdx.x;
    const int row_bytes = layout.width * layout.pixel;
    const int row_chunks = row_bytes / SIZE;
    const int chunks = layout.height * row_chunks;
    const int source = wrapped(source_index[(long long)image * index_step], layout.count);
    const Patch patch = patch_of(boxes, source_boxes, image);
    const unsigned char* receiver_pixels = images + image * layout.image_stride;
    const unsigned char* source_pixels = images + source * layout.image_stride;
    // Boxes are not checked: clip them, so that products of their corners do not overflow.
    const int left = inside(patch.x0, layout.width + 1) * layout.pixel;
    const int right = inside(patch.x1, layout.width + 1) * layout.pixel;
    const bool same_place = patch.dy == 0 && patch.dx == 0;

    Vector vector[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int chunk = first + i * THREADS;
        if (chunk < chunks) {
            const int y = chunk / row_chunks, start = chunk % row_chunks * SIZE;
            const bool whole = same_place && patch.y0 <= y && y < patch.y1 && left <= start && start + SIZE <= right;
            const unsigned char* from = whole ? source_pixels : receiver_pixels;
            vector[i] = *reinterpret_cast<const Vector*>(from + (long long)chunk * SIZE);
        }
    }
    unsigned char* out = mixed + (long long)image * layout.height * row_bytes;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int chunk = first + i * THREADS;
        if (chunk >= chunks) {
            return;
        }
        const int y = chunk / row_chunks, start = chunk % row_chunks * SIZE;
        const bool whole = left <= start && start + SIZE <= right;
        const bool touched = patch.y0 <= y && y < patch.y1 && left < start + SIZE && start < right;
        // Copy byte by byte at the left and right edges of the box, and in the whole box if the patch is moved.
        if (touched && !(whole && same_place)) {
            const int source_y = inside(y + patch.dy, layout.height);
            const PatchRow row = {left, right, source_pixels + (long long)source_y * row_bytes,
                                  patch.dx * layout.pixel, row_bytes, layout.pixel};
#pragma unroll
            for (int j = 0; j < SIZE / WORD; ++j) {
                vector[i].word[j] = patched(vector[i].word[j], start + j * WORD, row);
            }
        }
        *reinterpret_cast<Vector*>(out + (long long)chunk * SIZE) = vector[i];
    }
}

#define PASTE(BYTES)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        paste_##BYTES(const unsigned char* images, int count, int height, int width, int pixel,                      \
                      long long image_stride, const int* source_index, int index_step, const int* boxes,             \
                      const int* source_boxes, int blocks_per_image, unsigned char* mixed) {                         \
        paste<Vector##BYTES>(images, {count, height, width, pixel, image_stride}, source_index, index_step, boxes,   \
                             source_boxes, blocks_per_image, mixed);                                                 \
    }

PASTE(16)
PASTE(4)
PASTE(1)
