// Origin of the pixels of a mixed batch: paste_boxes in pixels.py.

#include "batch.cuh"

__device__ inline int inside(int value, int size) { return value < 0 ? 0 : value >= size ? size - 1 : value; }

// The patch that one image receives.
struct Patch {
    int y0, x0, y1, x1;  // its box in the receiver
    int dy, dx;          // offset from the receiver's box to the source's box

    __device__ bool covers(int y, int x) const { return y0 <= y && y < y1 && x0 <= x && x < x1; }
};

__device__ inline Patch patch_of(const int* boxes, const int* source_boxes, int image) {
    const int* box = boxes + 4LL * image;
    Patch patch = {box[0], box[1], box[2], box[3], 0, 0};
    if (source_boxes != nullptr) {
        patch.dy = source_boxes[4LL * image] - patch.y0;
        patch.dx = source_boxes[4LL * image + 1] - patch.x0;
    }
    return patch;
}
