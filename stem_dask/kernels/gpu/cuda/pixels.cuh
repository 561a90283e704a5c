// What the kernels share: how pixels are loaded, what counts of them, and sums over a warp.
//
// Set by -D: PIXEL, the type in memory; VALUE, the type that is compared (PIXEL, float for halves); HALF, 1 for halves;
// SUM, the type of sums over a pattern, and LINE, that over a row or column (whole numbers: exact); DIRTY, 1 where pixels
// may not count as they are; VEC, pixels that are loaded at once, a power of two; THREADS, of a block at most. Sums of floats
// have a fixed order.

typedef unsigned long long u64;

#define ALL_LANES 0xffffffffu
#define NAN32 __int_as_float(0x7fc00000)
#define NAN64 __longlong_as_double(0x7ff8000000000000ll)

template <int bytes> struct Word;
template <> struct Word<1> { typedef unsigned char type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned int type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<16> { typedef uint4 type; };

// VEC pixels that come in one load, aligned to its size
union Pixels {
    Word<VEC * sizeof(PIXEL)>::type word;
    PIXEL at[VEC];
};

__device__ __forceinline__ Pixels load(const PIXEL *from) {
    Pixels found;
    found.word = __ldg(reinterpret_cast<const Word<VEC * sizeof(PIXEL)>::type *>(from));
    return found;
}

#if HALF
// IEEE 754 binary16 as float, exactly. No float on the way is subnormal: cupy compiles with -ftz=true, which makes them 0
__device__ __forceinline__ float value_of(unsigned short half) {
    const unsigned int bits = half & 0x7fffu;
    float size;
    if (bits >= 0x7c00u) size = __int_as_float(0x7f800000u | bits << 13); // infinite, or none
    else if (bits < 0x400u) size = (float)bits * __int_as_float(0x33800000); // in steps of 2^-24
    else size = __int_as_float((bits << 13) + (112u << 23)); // another zero of the exponent
    return half & 0x8000u ? -size : size;
}
#else
__device__ __forceinline__ VALUE value_of(PIXEL pixel) { return pixel; }
#endif

// What a value counts: NaN, infinite and negative ones, and those below `low`, count 0
__device__ __forceinline__ bool counts(VALUE value, VALUE low) {
    return value >= low && value - value == 0;
}

__device__ __forceinline__ VALUE intensity(VALUE value, VALUE low) {
#if DIRTY
    return counts(value, low) ? value : (VALUE)0;
#else
    return value;
#endif
}

// Sum over the lanes of a warp, in lane 0; always in the same order
template <class Number> __device__ __forceinline__ Number warp_sum(Number value) {
    for (int step = 16; step; step /= 2) value += __shfl_down_sync(ALL_LANES, value, step);
    return value;
}
