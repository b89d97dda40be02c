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
int32_t weightsmith_native_version(void) { return 3; }

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

/* Floats as planes of bytes, and codes of unequal length: see share/_planes.py and share/_huffman.py. */

/* Values of `width` bytes (2 or 4) to `width` planes [n] of bytes: the eight bits below the sign, then the sign and what
 * is left of the mantissa, highest first. */
WIDE void weightsmith_planes(const void *values, int64_t n, int32_t width, uint8_t *out) {
    if (width == 2) {
        const uint16_t *given = values;
        for (int64_t i = 0; i < n; i++) {
            out[i] = (uint8_t)(given[i] >> 7);
            out[n + i] = (uint8_t)((given[i] >> 8 & 0x80) | (given[i] & 0x7f));
        }
    } else {
        const uint32_t *given = values;
        for (int64_t i = 0; i < n; i++) {
            out[i] = (uint8_t)(given[i] >> 23);
            out[n + i] = (uint8_t)((given[i] >> 24 & 0x80) | (given[i] >> 16 & 0x7f));
            out[2 * n + i] = (uint8_t)(given[i] >> 8);
            out[3 * n + i] = (uint8_t)given[i];
        }
    }
}

/* The way back. */
WIDE void weightsmith_together(const uint8_t *planes, int64_t n, int32_t width, void *values) {
    if (width == 2) {
        uint16_t *made = values;
        for (int64_t i = 0; i < n; i++)
            made[i] = (uint16_t)((planes[n + i] & 0x80) << 8 | planes[i] << 7 | (planes[n + i] & 0x7f));
    } else {
        uint32_t *made = values;
        for (int64_t i = 0; i < n; i++)
            made[i] = (uint32_t)(planes[n + i] & 0x80) << 24 | (uint32_t)planes[i] << 23 |
                      (uint32_t)(planes[n + i] & 0x7f) << 16 | (uint32_t)planes[2 * n + i] << 8 | planes[3 * n + i];
    }
}

/* How often each byte occurs, added to counts [256]. Four tables: the same byte often follows itself. */
void weightsmith_counted(const uint8_t *symbols, int64_t n, int64_t *counts) {
    static const int64_t most = (int64_t)1 << 30;
    for (int64_t begin = 0; begin < n; begin += most) {
        const int64_t size = n - begin < most ? n - begin : most;
        const uint8_t *run = symbols + begin;
        uint32_t found[4][256] = {{0}};
        int64_t i = 0;
        for (; i + 4 <= size; i += 4)
            for (int j = 0; j < 4; j++) found[j][run[i + j]]++;
        for (; i < size; i++) found[0][run[i]]++;
        for (int s = 0; s < 256; s++) counts[s] += (int64_t)found[0][s] + found[1][s] + found[2][s] + found[3][s];
    }
}

/* Bits that each lane of symbols takes. */
void weightsmith_lane_bits(const uint8_t *symbols, int64_t n, int64_t lane, const uint8_t *length, int32_t *bits) {
    for (int64_t begin = 0; begin < n; begin += lane) {
        const int64_t size = n - begin < lane ? n - begin : lane;
        const uint8_t *run = symbols + begin;
        uint32_t sum[4] = {0};
        int64_t i = 0;
        for (; i + 4 <= size; i += 4)
            for (int j = 0; j < 4; j++) sum[j] += length[run[i + j]];
        for (; i < size; i++) sum[0] += length[run[i]];
        *bits++ = (int32_t)(sum[0] + sum[1] + sum[2] + sum[3]);
    }
}

static inline uint64_t load_64(const uint8_t *from) {
    uint64_t word = 0;
    for (int i = 0; i < 8; i++) word |= (uint64_t)from[i] << 8 * i; /* one load where the lowest byte comes first */
    return word;
}

static inline void store_64(uint8_t *to, uint64_t word) {
    for (int i = 0; i < 8; i++) to[i] = (uint8_t)(word >> 8 * i);
}

/* Symbols to codes of at most 12 bits, the first in the lowest bits. Lane l is written from begin[l] on, whole bytes;
 * out has 8 bytes more than the last lane needs. */
void weightsmith_coded(const uint8_t *symbols, int64_t n, int64_t lane, const uint16_t *code, const uint8_t *length,
                       const int64_t *begin, uint8_t *out) {
    for (int64_t first = 0, l = 0; first < n; first += lane, l++) {
        const int64_t size = n - first < lane ? n - first : lane;
        const uint8_t *run = symbols + first;
        uint8_t *to = out + begin[l];
        uint64_t word = 0;
        uint32_t held = 0;
        int64_t i = 0;
        for (; i < size; i += 4) {
            const int64_t upto = i + 4 < size ? i + 4 : size;
            for (int64_t j = i; j < upto; j++) {
                word |= (uint64_t)code[run[j]] << held;
                held += length[run[j]];
            }
            store_64(to, word); /* at most 7 + 4 * 12 bits */
            to += held >> 3;
            word >>= held & ~7u;
            held &= 7;
        }
    }
}

#define STREAMS 4 /* lanes that are decoded side by side, so that none waits for its own table */
#define SPARE 32  /* symbols that one turn may write: 4 tables of up to 6, the last store 8 wide */

typedef struct {
    int64_t place; /* of the next byte to load */
    uint64_t word;
    uint32_t held; /* bits of `word` */
    uint8_t *to, *stop;
} lane_t;

static inline int64_t lane_ready(const lane_t *lane, int64_t size) {
    return lane->to <= lane->stop && lane->place + 8 <= size;
}

static inline void lane_turn_load(lane_t *lane, const uint8_t *stream) {
    lane->word |= load_64(stream + lane->place) << lane->held;
    lane->place += (63 - lane->held) >> 3;
    lane->held |= 56;
}

static inline void lane_turn_find(lane_t *lane, const uint64_t *several, uint64_t mask) {
    const uint64_t entry = several[lane->word & mask];
    store_64(lane->to, entry);
    lane->to += entry >> 48 & 0xff;
    lane->word >>= entry >> 56;
    lane->held -= (uint32_t)(entry >> 56);
}

/* Lanes of codes to symbols [n]. several[window]: up to 6 symbols, how many, and their bits; single[window]: a symbol
 * and its bits. Reads nothing outside of stream [size] and writes nothing outside of out [n], whatever the stream says,
 * if 0 <= begin[l] <= size. Returns a lane that does not end where the next begins, or -1. */
int64_t weightsmith_decoded(const uint8_t *stream, int64_t size, const int64_t *begin, int64_t n, int64_t lane,
                            const uint64_t *several, const uint16_t *single, int32_t window, uint8_t *out) {
    const uint64_t mask = ((uint64_t)1 << window) - 1;
    const int64_t lanes = (n + lane - 1) / lane;
    int64_t wrong = -1;
    for (int64_t first = 0; first < lanes; first += STREAMS) {
        const int count = lanes - first < STREAMS ? (int)(lanes - first) : STREAMS;
        lane_t here[STREAMS];
        uint8_t *end[STREAMS];
        for (int j = 0; j < count; j++) {
            const int64_t from = (first + j) * lane, left = n - from < lane ? n - from : lane;
            end[j] = out + from + left;
            here[j] = (lane_t){begin[first + j], 0, 0, out + from, left < SPARE ? NULL : end[j] - SPARE};
            if (left < SPARE) here[j].place = size; /* never ready */
        }
        if (count == STREAMS) {
            lane_t a = here[0], b = here[1], c = here[2], d = here[3]; /* of their own, so that they stay in registers */
            while (lane_ready(&a, size) & lane_ready(&b, size) & lane_ready(&c, size) & lane_ready(&d, size)) {
                lane_turn_load(&a, stream), lane_turn_load(&b, stream);
                lane_turn_load(&c, stream), lane_turn_load(&d, stream);
                for (int turn = 0; turn < 4; turn++) {
                    lane_turn_find(&a, several, mask), lane_turn_find(&b, several, mask);
                    lane_turn_find(&c, several, mask), lane_turn_find(&d, several, mask);
                }
            }
            here[0] = a, here[1] = b, here[2] = c, here[3] = d;
        }
        for (int j = 0; j < count; j++) {
            lane_t *own = here + j;
            if (own->stop == NULL)
                own->place = begin[first + j];
            else
                while (lane_ready(own, size)) {
                    lane_turn_load(own, stream);
                    for (int turn = 0; turn < 4; turn++) lane_turn_find(own, several, mask);
                }
            int64_t bit = own->place * 8 - own->held;
            for (; own->to < end[j]; own->to++) {
                const int64_t at = bit >> 3;
                uint32_t word = 0;
                for (int k = 0; k < 3 && at + k < size; k++) word |= (uint32_t)stream[at + k] << 8 * k;
                const uint16_t entry = single[word >> (bit & 7) & mask];
                *own->to = (uint8_t)entry;
                bit += entry >> 8;
            }
            if ((bit + 7) >> 3 != begin[first + j + 1]) wrong = first + j;
        }
    }
    return wrong;
}

#define LINES 256 /* rows of a weight whose columns are rounded together: 32 columns of them stay in the first cache */
#define HALVES_TO_EVEN 12582912.0f /* 1.5 * 2^23: adding it rounds to whole numbers; far beyond them all are clamped */

/* Round columns one after another; those after each make up for its error. See quantize/_gptq.py, rounded_columns. */
WIDE void weightsmith_rounded_columns(float *values, int64_t columns, int64_t rows, const float *factor, int64_t stride,
                                      const float *scale, const float *zero, const float *minimum, int64_t scale_step,
                                      int64_t zero_step, int64_t minimum_step, float lowest, float highest,
                                      float *errors, uint8_t *codes) {
    for (int64_t first = 0; first < rows; first += LINES) {
        int64_t count = rows - first < LINES ? rows - first : LINES;
        for (int64_t column = 0; column < columns; column++) {
            const float *now = values + column * rows + first;
            const float size = factor[column * stride + column];
            const float *step = scale + column * scale_step + first, *middle = zero + column * zero_step + first;
            const float *low = minimum + column * minimum_step + first;
            float *restrict error = errors + column * rows + first;
            uint8_t *restrict code = codes + column * rows + first;
            for (int64_t i = 0; i < count; i++) {
                float value = (now[i] - low[i]) / step[i];
                value = ((value + HALVES_TO_EVEN) - HALVES_TO_EVEN) + middle[i];
                value = value > lowest ? value : lowest;
                value = value < highest ? value : highest;
                code[i] = (uint8_t)(int32_t)value;
                error[i] = (now[i] - ((value - middle[i]) * step[i] + low[i])) / size;
            }
            for (int64_t later = column + 1; later < columns; later++) {
                float share = factor[column * stride + later];
                float *restrict moved = values + later * rows + first;
                for (int64_t i = 0; i < count; i++) moved[i] -= share * error[i];
            }
        }
    }
}
