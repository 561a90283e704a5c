// Cut a window out of each pattern, make it smaller, and add up what the window holds, in one launch that reads nothing else.
//
// One block of threads a pattern, one row of the output a warp. Defined by -D, in addition to those of pixels.cuh: OUT, the type of
// the output; FACTOR, pixels that become one; WAY, 0 for the first of them, 1 for their mean, 2 for their sum; WORK, the
// type in which they are added, column by column and then along the row, as the CPU does.

#define AT_ONCE 4 // rows of the output that a warp has under way
constexpr int UNROLLED = FACTOR <= 8 ? FACTOR : 1;

struct Window {
    const PIXEL *pattern;
    int height, width, y0, x0;
};

__device__ __forceinline__ PIXEL pixel(const Window &window, int y, int x) {
    y += window.y0;
    x += window.x0;
    if (y < 0 || y >= window.height || x < 0 || x >= window.width) return (PIXEL)0;
    return __ldg(window.pattern + (size_t)y * window.width + x);
}

// One pixel of the output; what its pixels count is added to `inside`
__device__ __forceinline__ OUT smaller(const Window &window, int row, int col, VALUE low, SUM *inside) {
    WORK total = 0;
#pragma unroll UNROLLED
    for (int x = 0; x < FACTOR; ++x) {
        WORK column = 0;
#pragma unroll UNROLLED
        for (int y = 0; y < FACTOR; ++y) {
            const VALUE value = value_of(pixel(window, row * FACTOR + y, col * FACTOR + x));
            *inside += (SUM)intensity(value, low);
            column += (WORK)value;
        }
        total += column;
    }
#if WAY == 0
    return pixel(window, row * FACTOR, col * FACTOR);
#elif WAY == 1
    return (OUT)((double)total * (1.0 / (FACTOR * FACTOR)));
#else
    return (OUT)total;
#endif
}

// patterns (n, height, width), windows (rows, cols) at origins that may lie outside, out (n, rows / FACTOR, cols / FACTOR);
// inside (n,): what counts in each whole window
extern "C" __global__ void __launch_bounds__(THREADS) crop(const PIXEL *__restrict__ patterns, int height, int width,
                                const int *__restrict__ origin_y, const int *__restrict__ origin_x, int rows, int cols,
                                VALUE low, OUT *__restrict__ out, double *__restrict__ inside) {
    extern __shared__ u64 shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int out_rows = rows / FACTOR, out_cols = cols / FACTOR;
    const size_t i = blockIdx.x;
    const Window window = {patterns + i * height * width, height, width, origin_y[i], origin_x[i]};
    SUM *parts = reinterpret_cast<SUM *>(shared);
    SUM sum = 0;
    out += i * out_rows * out_cols;
    for (int first = warp * AT_ONCE; first < out_rows; first += warps * AT_ONCE)
        for (int col = lane; col < out_cols; col += 32) {
            OUT found[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                found[k] = first + k < out_rows ? smaller(window, first + k, col, low, &sum) : (OUT)0;
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                if (first + k < out_rows) out[(size_t)(first + k) * out_cols + col] = found[k];
        }
    // what is left over at the end of an axis is no pixel of the output, but counts
    for (int row = warp; row < rows; row += warps)
        for (int col = (row < out_rows * FACTOR ? out_cols * FACTOR : 0) + lane; col < cols; col += 32)
            sum += (SUM)intensity(value_of(pixel(window, row, col)), low);
    sum = warp_sum(sum);
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < warps; ++w) sum += parts[w];
        inside[i] = (double)sum;
    }
}
