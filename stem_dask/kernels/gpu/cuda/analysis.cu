// Everything that is known of each pattern, and what the patterns are together, in one launch.
//
// A batch of patterns is worked on by `batch` blocks of threads, one a pattern, and by `adders` more, which add up the same
// patterns pixel by pixel: these follow each other in the order of the blocks, so that a pattern comes from the memory
// once, and from the cache when it is looked at again. Nothing waits for another block, and every sum has a fixed order.
// Defined by -D, in addition to those of pixels.cuh: CIRCLE, 1 for rings of circles, 0 of squares.

// shared: [whole, near y, near x, good, smallest, 4 odd, free][3 + 1 values a warp][rows][columns][scratch]
#define HEAD 16
#define A_WARP 4

struct Found {
    double *total, *com, *center;
    float *radius, *profile;
    unsigned int *odd;
    double *negative;
};

__device__ __forceinline__ int square_ring(int distance) {
    return distance >= 0 ? distance + 1 : -distance;
}

// Smallest q with square <= q * q
__device__ __forceinline__ int circle_ring(int square) {
    int q = (int)sqrtf((float)square);
    while (q * q < square) ++q;
    while (q > 0 && (q - 1) * (q - 1) >= square) --q;
    return q;
}

#if CIRCLE && IS_FLOAT
// floats are added up as whole numbers of 2^-61 of the pattern's total, which atomics add exactly in any order
#define FIXED(value, exponent) ((u64)llrint(ldexp((double)(value), 61 - (exponent))))
#define LOOSE(sum, exponent) ldexp((double)(sum), (exponent) - 61)
typedef u64 RING;
#else
#define FIXED(value, exponent) ((SUM)(value))
#define LOOSE(sum, exponent) (sum)
typedef SUM RING;
#endif

__device__ __forceinline__ SUM *sums_of(u64 *shared) { return reinterpret_cast<SUM *>(shared); }

#pragma nv_diag_suppress 186 // of types without a sign none is negative

// Why a value that is not 0 does not count
__device__ __noinline__ void note_odd(VALUE value, VALUE low, u64 *odd, double *negative) {
    if (value != value) atomicAdd(odd, 1ull);
    else if (value - value != 0) atomicAdd(odd + 1, 1ull);
    else if (value < 0) {
        atomicAdd(odd + 2, 1ull);
        *negative -= (double)value;
    } else if (value < low) atomicAdd(odd + 3, 1ull);
}

// Total, moments and odd pixels of one pattern; centers to `found`, what the rings need to shared
__device__ void project(const PIXEL *pattern, long long i, int height, int width, VALUE low, double given_y,
                        double given_x, const Found &found, u64 *shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    u64 *odd = shared + 5;
    SUM *parts = sums_of(shared + HEAD);
    double *negatives = reinterpret_cast<double *>(shared + HEAD);
    SUM whole = 0, moment_y = 0, moment_x = 0;
    double negative = 0;
    if (threadIdx.x < 4) odd[threadIdx.x] = 0;
    __syncthreads();
    for (int v = lane; v < width / VEC; v += 32) {
        LINE column[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) column[j] = 0;
#pragma unroll 4
        for (int y = warp; y < height; y += warps) {
            const Pixels some = load(pattern + (size_t)y * width + v * VEC);
            LINE row = 0;
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const VALUE value = value_of(some.at[j]);
#if DIRTY
                if (value != 0 && !counts(value, low)) note_odd(value, low, odd, &negative);
#endif
                const LINE counted = (LINE)intensity(value, low);
                row += counted;
                column[j] += counted;
            }
            whole += row;
            moment_y += (SUM)row * (SUM)y;
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) moment_x += (SUM)column[j] * (SUM)(v * VEC + j);
    }
    whole = warp_sum(whole);
    moment_y = warp_sum(moment_y);
    moment_x = warp_sum(moment_x);
    negative = warp_sum(negative);
    if (lane == 0) {
        parts[A_WARP * warp] = whole;
        parts[A_WARP * warp + 1] = moment_y;
        parts[A_WARP * warp + 2] = moment_x;
        negatives[A_WARP * warp + 3] = negative;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < warps; ++w) {
            whole += parts[A_WARP * w];
            moment_y += parts[A_WARP * w + 1];
            moment_x += parts[A_WARP * w + 2];
            negative += negatives[A_WARP * w + 3];
        }
        const bool filled = whole > 0;
        const double mass_y = filled ? (double)moment_y / (double)whole : NAN64;
        const double mass_x = filled ? (double)moment_x / (double)whole : NAN64;
        const double y = given_y != given_y ? mass_y : given_y, x = given_x != given_x ? mass_x : given_x;
        const double near_y = rint(y), near_x = rint(x);
        found.total[i] = (double)whole;
        found.com[2 * i] = mass_y;
        found.com[2 * i + 1] = mass_x;
        found.center[2 * i] = y;
        found.center[2 * i + 1] = x;
        found.negative[i] = negative;
        // outside only after an overflow, which the caller refuses
        const bool good = filled && 0 <= near_y && near_y < height && 0 <= near_x && near_x < width;
        sums_of(shared)[0] = whole;
        shared[1] = good ? (u64)near_y : 0;
        shared[2] = good ? (u64)near_x : 0;
        shared[3] = good;
        for (int k = 0; k < 4; ++k) found.odd[4 * i + k] = (unsigned int)odd[k];
    }
    __syncthreads();
}

#if CIRCLE
__device__ void add_rings(const PIXEL *pattern, int height, int width, VALUE low, int ry, int rx, int exponent,
                          RING *rows, RING *columns, LINE *scratch, RING *rings, int radii) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    for (int r = threadIdx.x; r < radii; r += blockDim.x) rings[r] = 0;
    __syncthreads();
    for (int v = lane; v < width / VEC; v += 32)
        for (int y = warp; y < height; y += warps) {
            const Pixels some = load(pattern + (size_t)y * width + v * VEC);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const VALUE counted = intensity(value_of(some.at[j]), low);
                if (counted == 0) continue; // most pixels of a pattern
                const int x = v * VEC + j;
                atomicAdd(rings + circle_ring((y - ry) * (y - ry) + (x - rx) * (x - rx)), FIXED(counted, exponent));
            }
        }
    __syncthreads();
}
#else
// rings[r] = what the window of half-size r has and that of r - 1 has not. In row y, which enters with ring q, the columns
// inside half-size q enter with it, and are added along the row; those farther out with their own ring, and are added along
// the column.
__device__ void add_rings(const PIXEL *pattern, int height, int width, VALUE low, int ry, int rx, int exponent,
                          RING *rows, RING *columns, LINE *scratch, RING *rings, int radii) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    for (int first = 0; first < width / VEC; first += 32) {
        const int v = first + lane;
        const bool there = v < width / VEC;
        LINE wing[VEC];
        int q[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            wing[j] = 0;
            q[j] = square_ring(v * VEC + j - rx);
        }
#pragma unroll 4
        for (int y = warp; y < height; y += warps) {
            const int ring = square_ring(y - ry);
            LINE inside = 0;
            if (there) {
                const Pixels some = load(pattern + (size_t)y * width + v * VEC);
#pragma unroll
                for (int j = 0; j < VEC; ++j) {
                    const LINE counted = (LINE)intensity(value_of(some.at[j]), low);
                    inside += q[j] <= ring ? counted : (LINE)0;
                    wing[j] += q[j] <= ring ? (LINE)0 : counted;
                }
            }
            inside = warp_sum(inside);
            if (lane == 0) rows[y] = (first ? rows[y] : 0) + inside;
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) scratch[(warp * VEC + j) * 32 + lane] = wing[j];
        __syncthreads();
        for (int k = threadIdx.x; k < 32 * VEC; k += blockDim.x) {
            const int x = (first + (k & 31)) * VEC + (k >> 5);
            SUM column = 0;
            for (int w = 0; w < warps; ++w) column += scratch[w * VEC * 32 + k];
            if (x < width) columns[x] = column;
        }
        __syncthreads();
    }
    for (int r = threadIdx.x; r < radii; r += blockDim.x) {
        SUM ring = 0;
        if (r > 0) {
            if (ry - r >= 0) ring += rows[ry - r];
            if (ry + r - 1 < height) ring += rows[ry + r - 1];
            if (rx - r >= 0) ring += columns[rx - r];
            if (rx + r - 1 < width) ring += columns[rx + r - 1];
        }
        rings[r] = ring;
    }
    __syncthreads();
}
#endif

// Radius and profile of one pattern
__device__ void measure(const PIXEL *pattern, long long i, int height, int width, VALUE low, double target, int radii,
                        const Found &found, u64 *shared) {
    const int warps = blockDim.x >> 5;
    const SUM whole = sums_of(shared)[0];
    const int ry = (int)shared[1], rx = (int)shared[2];
    RING *rows = reinterpret_cast<RING *>(shared + HEAD + A_WARP * warps), *columns = rows + height;
    RING *from = columns + width, *to = from + radii;
    LINE *scratch = reinterpret_cast<LINE *>(from); // used up before there are rings
    int *smallest = reinterpret_cast<int *>(shared + 4);
    float *profile = found.profile + i * radii;
    if (!shared[3]) {
        for (int r = threadIdx.x; r < radii; r += blockDim.x) profile[r] = NAN32;
        if (threadIdx.x == 0) found.radius[i] = NAN32;
        return;
    }
    if (threadIdx.x == 0) *smallest = radii - 1;
#if CIRCLE && IS_FLOAT
    const int exponent = ilogb(whole);
#else
    const int exponent = 0;
#endif
    add_rings(pattern, height, width, low, ry, rx, exponent, rows, columns, scratch, from, radii);
    for (int step = 1; step < radii; step *= 2) { // from[r] becomes the sum of ring r and all outside of it
        for (int r = threadIdx.x; r < radii; r += blockDim.x) to[r] = from[r] + (r + step < radii ? from[r + step] : 0);
        __syncthreads();
        RING *before = from;
        from = to;
        to = before;
    }
    const double least = target * (double)whole;
    for (int r = threadIdx.x; r < radii; r += blockDim.x) {
        const RING outside = r + 1 < radii ? from[r + 1] : 0;
        const double inside = (double)(whole - LOOSE(outside, exponent));
        if (inside >= least && r >= 1 - CIRCLE) atomicMin(smallest, r);
        const double fraction = inside / (double)whole;
        const float narrow = (float)fraction;
        // rounded down, so that a stored fraction never promises too much
        profile[r] = (double)narrow > fraction ? nextafterf(narrow, 0.0f) : narrow;
    }
    __syncthreads();
    if (threadIdx.x == 0) found.radius[i] = (float)*smallest;
}

// Sum and maximum of some patterns, pixel by pixel
__device__ void add_patterns(const PIXEL *patterns, int n, size_t pixels, int adder, int adders, VALUE low, SUM *sums,
                             VALUE *highest) {
    for (size_t v = (size_t)adder * blockDim.x + threadIdx.x; v < pixels / VEC; v += (size_t)adders * blockDim.x) {
        LINE sum[VEC];
        VALUE most[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] = 0, most[j] = 0;
#pragma unroll 8
        for (int i = 0; i < n; ++i) {
            const Pixels some = load(patterns + i * pixels + v * VEC);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const VALUE counted = intensity(value_of(some.at[j]), low);
                sum[j] += (LINE)counted;
                most[j] = counted > most[j] ? counted : most[j];
            }
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            sums[v * VEC + j] = sum[j];
            highest[v * VEC + j] = most[j];
        }
    }
}

// n patterns; `sums` and `highest` have one pattern a batch, which `fold` puts together
extern "C" __global__ void __launch_bounds__(THREADS, 2)
analyze(const PIXEL *patterns, long long n, int height, int width, int batch, int adders, VALUE low, double given_y,
        double given_x, double target, int radii, double *total, double *com, double *center, float *radius,
        float *profile, unsigned int *odd, double *negative, SUM *sums, VALUE *highest) {
    extern __shared__ u64 shared[];
    const long long group = blockIdx.x / (batch + adders), first = group * batch;
    const int role = blockIdx.x % (batch + adders);
    const size_t pixels = (size_t)height * width;
    if (role >= batch) {
        const int here = n - first < batch ? (int)(n - first) : batch;
        add_patterns(patterns + first * pixels, here, pixels, role - batch, adders, low, sums + group * pixels,
                     highest + group * pixels);
    } else if (first + role < n) {
        const long long i = first + role;
        const Found found = {total, com, center, radius, profile, odd, negative};
        project(patterns + i * pixels, i, height, width, low, given_y, given_x, found, shared);
        measure(patterns + i * pixels, i, height, width, low, target, radii, found, shared);
    }
}

// Adds the sums of all batches to `total`, in their order, and raises `most`
extern "C" __global__ void fold(const SUM *sums, const VALUE *highest, int batches, long long pixels, SUM *total,
                                VALUE *most) {
    for (long long p = (long long)blockIdx.x * blockDim.x + threadIdx.x; p < pixels; p += (long long)gridDim.x * blockDim.x) {
        SUM sum = total[p];
        VALUE high = most[p];
        for (int b = 0; b < batches; ++b) {
            sum += sums[b * pixels + p];
            high = highest[b * pixels + p] > high ? highest[b * pixels + p] : high;
        }
        total[p] = sum;
        most[p] = high;
    }
}
