/* The few inner loops that PyTorch and NumPy have no single operation for.
 *
 * Optional: what these functions compute, the Python beside their callers computes too, to the bit. They know
 * nothing of Python, so whoever calls them need not hold its lock. Sums are added in the order of the rows and
 * nothing is contracted or reordered (build with -ffp-contract=off), so that both ways round alike.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__ELF__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#define HAS_AVX512 1
#include <immintrin.h>
#else
#define WIDE
#endif

#define BLOCK 1024 /* floats of a row that are worked on together: all rows of a block stay in the first cache */

/* Changes with every change of a signature; the Python side asks for it before anything else. */
int32_t weightsmith_native_version(void) { return 1; }

/* Keys in [lower, lower + span]: their places and themselves, in order. Returns how many; *above counts keys >= upper.
 * The outputs have room for n + 16 values. */
static int64_t inside_plain(const int32_t *key, int64_t n, int32_t lower, uint32_t span, int32_t upper,
                            int32_t *places, int32_t *found, int64_t *above) {
    int64_t count = 0, over = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t value = key[i];
        places[count] = (int32_t)i;
        found[count] = value;
        count += (uint32_t)value - (uint32_t)lower <= span;
        over += value >= upper;
    }
    *above = over;
    return count;
}

#ifdef HAS_AVX512
__attribute__((target("avx512f"))) static int64_t inside_avx512(const int32_t *key, int64_t n, int32_t lower,
                                                                uint32_t span, int32_t upper, int32_t *places,
                                                                int32_t *found, int64_t *above) {
    const __m512i low = _mm512_set1_epi32(lower), wide = _mm512_set1_epi32((int32_t)span);
    const __m512i high = _mm512_set1_epi32(upper), step = _mm512_set1_epi32(16);
    __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    int64_t count = 0, over = 0, i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512i value = _mm512_loadu_si512((const void *)(key + i));
        __mmask16 in = _mm512_cmple_epu32_mask(_mm512_sub_epi32(value, low), wide);
        over += __builtin_popcount(_mm512_cmpge_epi32_mask(value, high));
        _mm512_storeu_si512((void *)(places + count), _mm512_maskz_compress_epi32(in, place));
        _mm512_storeu_si512((void *)(found + count), _mm512_maskz_compress_epi32(in, value));
        count += __builtin_popcount(in);
        place = _mm512_add_epi32(place, step);
    }
    int64_t rest, more = inside_plain(key + i, n - i, lower, span, upper, places + count, found + count, &rest);
    for (int64_t j = count; j < count + more; j++) places[j] += (int32_t)i;
    *above = over + rest;
    return count + more;
}
#endif

int64_t weightsmith_inside(const int32_t *key, int64_t n, int32_t lower, uint32_t span, int32_t upper,
                           int32_t *places, int32_t *found, int64_t *above) {
#ifdef HAS_AVX512
    if (__builtin_cpu_supports("avx512f")) return inside_avx512(key, n, lower, span, upper, places, found, above);
#endif
    return inside_plain(key, n, lower, span, upper, places, found, above);
}

static inline float sign_of(float value) { return (float)(value > 0) - (float)(value < 0); }

/* What k rows say together that have the sign of the majority. See merge/_trim.py, elected: the same steps in the same
 * order. rows [k, stride >= n] are used up.
 *
 * vote: 0 the sum of the weighted rows, 1 the number of their signs, 2 the sum of the unweighted rows.
 * mean: 0 the sum; else its quotient by the weights (vote 0 and 1) or the number (vote 2) of those that agree.
 */
WIDE void weightsmith_elected(float *rows, int64_t k, int64_t n, int64_t stride, const float *weight, int32_t vote,
                              int32_t mean, int32_t has_negative, float half_tie, float tiny, float *out) {
    float sign[BLOCK], number[BLOCK];
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        const int64_t size = n - begin < BLOCK ? n - begin : BLOCK;
        float *total = out + begin;
        for (int64_t r = 0; r < k; r++) {
            float *row = rows + r * stride + begin;
            const float w = weight[r];
            if (vote != 2 && w != 1.0f)
                for (int64_t i = 0; i < size; i++) row[i] *= w;
            if (r == 0 && vote == 1)
                for (int64_t i = 0; i < size; i++) sign[i] = sign_of(row[i]);
            else if (r == 0)
                for (int64_t i = 0; i < size; i++) sign[i] = row[i];
            else if (vote == 1)
                for (int64_t i = 0; i < size; i++) sign[i] += sign_of(row[i]);
            else
                for (int64_t i = 0; i < size; i++) sign[i] += row[i];
        }
        for (int64_t i = 0; i < size; i++) sign[i] = sign_of(sign_of(sign[i]) + half_tie);
        for (int64_t i = 0; i < size; i++) number[i] = 0.0f;
        for (int64_t r = 0; r < k; r++) {
            float *row = rows + r * stride + begin;
            const float w = weight[r], counted = vote == 2 ? 1.0f : w, scale = vote == 2 ? w : 1.0f;
            for (int64_t i = 0; i < size; i++) {
                float value = row[i] * sign[i];
                value = value < 0 ? 0.0f : value; /* NaN stays */
                number[i] += sign_of(value) * counted;
                value *= scale;
                total[i] = r == 0 ? value : total[i] + value;
            }
        }
        for (int64_t i = 0; i < size; i++) total[i] *= sign[i];
        if (mean && (vote == 2 || !has_negative))
            for (int64_t i = 0; i < size; i++) total[i] /= number[i] < tiny ? tiny : number[i];
        else if (mean)
            for (int64_t i = 0; i < size; i++) total[i] /= number[i] == 0 ? 1.0f : number[i];
    }
}

/* PCG64 DXSM: numpy's generator of that name, from a given state. */
typedef unsigned __int128 state_t;

static void draw(uint64_t *bits, int64_t count, state_t *state, state_t inc) {
    const uint64_t factor = 0xda942042e4dd58b5ULL;
    state_t now = *state;
    for (int64_t i = 0; i < count; i++) {
        uint64_t high = (uint64_t)(now >> 64), low = (uint64_t)now | 1;
        high ^= high >> 32;
        high *= factor;
        high ^= high >> 48;
        bits[i] = high * low;
        now = now * factor + inc;
    }
    *state = now;
}

WIDE static void scale_16(float *row, const uint16_t *bits, int64_t n, uint16_t limit, float factor) {
    for (int64_t i = 0; i < n; i++) row[i] *= bits[i] < limit ? factor : 0.0f;
}

WIDE static void scale_32(float *row, const uint32_t *bits, int64_t n, uint32_t limit, float factor) {
    for (int64_t i = 0; i < n; i++) row[i] *= bits[i] < limit ? factor : 0.0f;
}

/* Every element times `factor` where its number of `width` bits lies below `limit`, else times 0. The first of the
 * numbers is the one after `skipped` others of the state's first word. */
void weightsmith_dropped(float *row, int64_t n, uint64_t state_high, uint64_t state_low, uint64_t inc_high,
                         uint64_t inc_low, int32_t skipped, int32_t width, uint32_t limit, float factor) {
    uint64_t bits[BLOCK];
    state_t state = ((state_t)state_high << 64) | state_low, inc = ((state_t)inc_high << 64) | inc_low;
    const int64_t per = 64 / width;
    int64_t place = 0, first = skipped;
    while (place < n) {
        int64_t words = (n - place + first + per - 1) / per;
        if (words > BLOCK) words = BLOCK;
        draw(bits, words, &state, inc);
        int64_t count = words * per - first;
        if (count > n - place) count = n - place;
        if (width == 16)
            scale_16(row + place, (const uint16_t *)bits + first, count, (uint16_t)limit, factor);
        else
            scale_32(row + place, (const uint32_t *)bits + first, count, limit, factor);
        place += count;
        first = 0;
    }
}
