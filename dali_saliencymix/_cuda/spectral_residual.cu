// Spectral residual saliency from pixels to map, or to its peak, in one launch: saliency/spectral.py.
//
// One block processes one image. Its map is 64x64. The 4096 complex numbers fit into the registers of 512 threads, 8
// each, and into 36 KB of shared memory, through which threads exchange them. Global memory traffic consists of the
// taps of the image, read once, and the result. With cuFFT and separate kernels for the other steps, each step would be
// a launch that writes and reads the whole spectrum, 8 MB for 256 images.
//
// Every exchange starts with a barrier, after which all threads have read the previous contents of shared memory, and
// has a second barrier between its writes and its reads.

#include "grey.cuh"
#include "reduction.cuh"

constexpr int SIDE = 64;
constexpr int RADIX = 8;                     // 64 = 8 * 8: 8 threads transform a line in two steps
constexpr int THREADS = SIDE * SIDE / RADIX;  // 512; a thread holds 8 elements
constexpr int FORWARD = -1, INVERSE = 1;     // sign of the exponent

struct alignas(8) Complex {
    float re, im;
};

__device__ inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
__device__ inline Complex operator*(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// Squares stay within the range of float32. Moduli are at most 255 * 4096 before and 4096 * 255 * 4096 after whitening,
// and rounding errors in place of 0 are far above 1e-18.
__device__ inline float modulus(Complex z) { return sqrtf(z.re * z.re + z.im * z.im); }

// Position of an element of the 64x64 array in shared memory. A gap after every 8 elements makes each row 72 long. It
// avoids bank conflicts within half a warp, whose threads access 8 bytes each at a time: along rows they read the
// elements 8 a + part or 8 part + b for part = 0..7, of two rows.
constexpr int PITCH = SIDE + SIDE / RADIX;
__device__ inline int slot(int y, int x) { return y * PITCH + x + x / RADIX; }

union Memory {
    Complex spectrum[SIDE * PITCH];  // 36864 bytes
    float plane[2][SIDE * SIDE];     // 32768 bytes
};

// Multiply by exp(sign * 2 pi i * EIGHTHS / 8).
template <int EIGHTHS, int SIGN>
__device__ inline Complex turned(Complex z) {
    constexpr float ROOT_HALF = 0.70710678f;
    if constexpr (EIGHTHS == 1) {
        return {ROOT_HALF * (z.re - SIGN * z.im), ROOT_HALF * (z.im + SIGN * z.re)};
    } else if constexpr (EIGHTHS == 2) {
        return {-SIGN * z.im, SIGN * z.re};
    } else if constexpr (EIGHTHS == 3) {
        return {ROOT_HALF * (-z.re - SIGN * z.im), ROOT_HALF * (-z.im + SIGN * z.re)};
    }
    return z;
}

template <int EIGHTHS, int SIGN>
__device__ inline void butterfly(Complex& a, Complex& b) {
    const Complex sum = a + b;
    b = turned<EIGHTHS, SIGN>(a - b);
    a = sum;
}

__device__ inline void swap(Complex& a, Complex& b) {
    const Complex old = a;
    a = b;
    b = old;
}

// Transform 8 elements in registers, with radix 2 and decimation in frequency.
template <int SIGN>
__device__ inline void dft8(Complex (&v)[RADIX]) {
    butterfly<0, SIGN>(v[0], v[4]);
    butterfly<1, SIGN>(v[1], v[5]);
    butterfly<2, SIGN>(v[2], v[6]);
    butterfly<3, SIGN>(v[3], v[7]);
    for (int half = 0; half < RADIX; half += 4) {
        butterfly<0, SIGN>(v[half], v[half + 2]);
        butterfly<2, SIGN>(v[half + 1], v[half + 3]);
    }
    for (int pair = 0; pair < RADIX; pair += 2) {
        butterfly<0, SIGN>(v[pair], v[pair + 1]);
    }
    // The results are in bit-reversed order.
    swap(v[1], v[4]);
    swap(v[3], v[6]);
}

// Position of element `i` of row or column `line`.
template <bool ROW>
__device__ inline int line_slot(int line, int i) {
    return ROW ? slot(line, i) : slot(i, line);
}

// Transform all rows, or all columns. A thread holds the elements 8 i + part of its line, before and after the
// transform.
//
// With n = 8 a + b and k = c + 8 d:  X[k] = sum_b w8^(b d) * w64^(b c) * (sum_a w8^(a c) * x[n]).
// `turns` are w64^0 .. w64^63 for the forward sign.
template <bool ROW, int SIGN>
__device__ inline void fft64(Complex (&v)[RADIX], int line, int part, Complex* spectrum, const Complex* turns) {
    dft8<SIGN>(v);
    for (int c = 1; c < RADIX; ++c) {
        Complex turn = turns[part * c];
        turn.im *= -SIGN;
        v[c] = v[c] * turn;
    }
    __syncthreads();
    for (int c = 0; c < RADIX; ++c) {
        spectrum[line_slot<ROW>(line, RADIX * c + part)] = v[c];
    }
    __syncthreads();
    for (int b = 0; b < RADIX; ++b) {
        v[b] = spectrum[line_slot<ROW>(line, RADIX * part + b)];
    }
    dft8<SIGN>(v);
}

// Exchange the elements from threads that hold rows to threads that hold columns, or vice versa.
template <bool TO_ROWS>
__device__ inline void transpose(Complex (&v)[RADIX], int row, int row_part, int column, int column_part,
                                 Complex* spectrum) {
    __syncthreads();
    for (int i = 0; i < RADIX; ++i) {
        spectrum[TO_ROWS ? slot(RADIX * i + column_part, column) : slot(row, RADIX * i + row_part)] = v[i];
    }
    __syncthreads();
    for (int i = 0; i < RADIX; ++i) {
        v[i] = spectrum[TO_ROWS ? slot(row, RADIX * i + row_part) : slot(RADIX * i + column_part, column)];
    }
}

// Return the index for `i` in -63..126 with the border mirrored at the centres of the outermost elements.
__device__ inline int mirrored(int i) { return i < 0 ? -i : i >= SIDE ? 2 * (SIDE - 1) - i : i; }

// Divide the spectrum by its smooth part: the amplitude becomes exp(log amplitude - its mean over 3x3 bins), and the
// phase is kept. As in OpenCV, the border is mirrored although the spectrum is periodic. This breaks the symmetry of
// the spectrum, so the whole spectrum is needed.
__device__ inline void whiten(Complex (&v)[RADIX], int column, int part, float* log_amplitude) {
    __syncthreads();
    for (int i = 0; i < RADIX; ++i) {
        log_amplitude[(RADIX * i + part) * SIDE + column] = log1pf(modulus(v[i]));
    }
    __syncthreads();
    for (int i = 0; i < RADIX; ++i) {
        const int row = RADIX * i + part;
        float sum = 0.0f;
        for (int dy = -1; dy <= 1; ++dy) {
            for (int dx = -1; dx <= 1; ++dx) {
                sum += log_amplitude[mirrored(row + dy) * SIDE + mirrored(column + dx)];
            }
        }
        const float wanted = expf(log_amplitude[row * SIDE + column] - sum * (1.0f / 9.0f));
        const float amplitude = modulus(v[i]);  // recomputed, since keeping all 8 would take too many registers
        if (amplitude == 0.0f) {  // an empty bin has phase 0 by convention
            v[i] = {wanted, 0.0f};
        } else {
            const float scale = wanted / amplitude;
            v[i] = {v[i].re * scale, v[i].im * scale};
        }
    }
}

// Return one of the two passes of the 5x5 Gaussian with sigma 8 at element i of a line with elements `step` apart.
__device__ inline float blurred(const float* line, int step, int i) {
    const float centre = 0.20313220f, near = 0.20155142f, far = 0.19688248f;  // exp(-i^2 / 128), scaled to sum 1
    return centre * line[i * step] + near * (line[mirrored(i - 1) * step] + line[mirrored(i + 1) * step]) +
           far * (line[mirrored(i - 2) * step] + line[mirrored(i + 2) * step]);
}

// With 2 blocks per multiprocessor, which allows 64 registers per thread, 128 multiprocessors process 256 images at
// once.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    spectral_residual(const unsigned char* __restrict__ images, long long image_stride, int image_width, int channels,
                      const long long* __restrict__ row_index, const int* __restrict__ row_weight,
                      const long long* __restrict__ column_index, const int* __restrict__ column_weight,
                      const float* __restrict__ turn_table, const int* __restrict__ closeness,
                      const int* __restrict__ nearest, int height, int width, int least,
                      float* __restrict__ maps,   // (N, 64, 64), or null
                      int* __restrict__ peaks) {  // (N, 2), or null; in pixels of height x width
    __shared__ Memory memory;
    __shared__ Complex turns[SIDE];
    __shared__ float maximum_slots[MAX_WARPS];
    __shared__ Key key_slots[MAX_WARPS];
    const int thread = threadIdx.x;
    // Adjacent threads hold the same row, or adjacent columns, which avoids bank conflicts in both cases.
    const int row = thread / RADIX, row_part = thread % RADIX;
    const int column = thread % SIDE, column_part = thread / SIDE;
    float(&plane)[2][SIDE * SIDE] = memory.plane;

    const unsigned char* image = images + blockIdx.x * image_stride;
    const Taps down = {row_index, row_weight, SIDE}, along = {column_index, column_weight, SIDE};
    for (int y = column_part; y < SIDE; y += RADIX) {
        plane[0][y * SIDE + column] = (float)reduced_luma(image, image_width, channels, down, along, y, column);
    }
    if (thread < SIDE) {
        turns[thread] = {turn_table[2 * thread], turn_table[2 * thread + 1]};
    }
    __syncthreads();
    Complex v[RADIX];
    bool same = true;
    for (int i = 0; i < RADIX; ++i) {
        v[i] = {plane[0][row * SIDE + RADIX * i + row_part], 0.0f};
        same = same && v[i].re == plane[0][0];
    }
    const bool one_level = __syncthreads_and(same);

    fft64<true, FORWARD>(v, row, row_part, memory.spectrum, turns);
    transpose<false>(v, row, row_part, column, column_part, memory.spectrum);
    fft64<false, FORWARD>(v, column, column_part, memory.spectrum, turns);
    whiten(v, column, column_part, plane[0]);
    fft64<false, INVERSE>(v, column, column_part, memory.spectrum, turns);
    transpose<true>(v, row, row_part, column, column_part, memory.spectrum);
    fft64<true, INVERSE>(v, row, row_part, memory.spectrum, turns);

    // The factor 1/4096 of the inverse transform is omitted: it is a power of two, and dividing by the maximum cancels
    // it exactly.
    __syncthreads();
    for (int i = 0; i < RADIX; ++i) {
        plane[0][row * SIDE + RADIX * i + row_part] = modulus(v[i]);
    }
    __syncthreads();
    for (int y = column_part; y < SIDE; y += RADIX) {
        plane[1][y * SIDE + column] = blurred(plane[0] + y * SIDE, 1, column);
    }
    __syncthreads();
    float saliency[RADIX], top = 0.0f;
    for (int i = 0; i < RADIX; ++i) {
        saliency[i] = blurred(plane[1] + column, SIDE, RADIX * i + column_part);
        saliency[i] *= saliency[i];
        top = larger(top, saliency[i]);
    }
    top = block_maximum(top, maximum_slots);

    Key best = 0;
    for (int i = 0; i < RADIX; ++i) {
        const int cell = (RADIX * i + column_part) * SIDE + column;
        const float value = one_level || top == 0.0f ? 0.0f : saliency[i] / top;
        if (maps != nullptr) {
            maps[(long long)blockIdx.x * SIDE * SIDE + cell] = value;
        }
        if (peaks != nullptr) {
            best = larger(best, peak_key(value, closeness[cell], least));
        }
    }
    if (peaks != nullptr) {  // the same branch in all threads
        best = block_maximum(best, key_slots);
        if (thread == 0) {
            write_peak(best, {closeness, nearest, SIDE, SIDE, height, width}, peaks + 2LL * blockIdx.x);
        }
    }
}
