// Pillow's bicubic resize of RGB pictures, with the same bits, on AVX2.
//
// Two passes, each rounded to 8 bits: the width first, or the height first where more than twice as many rows as
// columns go. A sample is the sum of its taps' pixels times whole weights of 2^-22. A weight is split into
// hi * 2^11 + lo, both of which fit 16 bits, so that one vpmaddwd multiplies two taps; sums are exact in 32 bits.
// Nothing is kept whole between the passes: the second one follows the first at the distance of its filter.
//
// In: rows of 4 bytes per pixel (R, G, B, unused). Out: rows of 3. Reads and writes nothing outside them.
// W H are the columns and rows before, w h after. A tap is one source pixel of a result's filter.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr int kOne = 22;    // bits of a weight of 1
constexpr int kSplit = 11;  // bits of lo
constexpr int kGroup = 4;   // rows that the horizontal pass takes at a time
constexpr double kSupport = 2.0;

using Bytes = std::vector<uint8_t>;
using Words = std::vector<int32_t>;
using Rows = const uint8_t* const*;

// Keys' cubic with a = -1/2. The order of operations is Pillow's, here and below: weights must round alike.
double keys(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

// The filters of one side: `first[i]` is the first tap of result i, `weights[start[i] ..]` its weights.
struct Filters {
    std::vector<int64_t> first, start;
    Words weights;
    int64_t most = 0;  // taps of the largest

    Filters(int64_t before, int64_t after) : first(after), start(after + 1) {
        const double scale = static_cast<double>(before) / after, widened = std::max(scale, 1.0);
        const double support = kSupport * widened, narrowed = 1.0 / widened;
        std::vector<double> exact;
        for (int64_t i = 0; i < after; i++) {
            const double center = (i + 0.5) * scale;
            const int64_t from = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
            const int64_t to = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), before);
            double sum = 0.0;
            exact.clear();
            for (int64_t x = 0; x < to - from; x++) {
                exact.push_back(keys((x + from - center + 0.5) * narrowed));
                sum += exact.back();
            }
            for (double weight : exact) {
                if (sum != 0.0) weight /= sum;
                weights.push_back(static_cast<int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << kOne)));
            }
            first[i] = from;
            start[i + 1] = static_cast<int64_t>(weights.size());
            most = std::max(most, to - from);
        }
    }

    int64_t taps(int64_t i) const { return start[i + 1] - start[i]; }
};

// Puts a weight in the place of tap `at` among pairs that are stored as (lo of both, hi of both), 16 bits each.
void put(int32_t* pairs, int64_t at, int32_t weight) {
    const int16_t halves[2] = {static_cast<int16_t>(weight & ((1 << kSplit) - 1)),
                               static_cast<int16_t>(weight >> kSplit)};
    int32_t* pair = pairs + at / 2 * 2;
    for (int i = 0; i < 2; i++) std::memcpy(reinterpret_cast<char*>(pair + i) + at % 2 * 2, &halves[i], 2);
}

// The filters of a row: each result has `taps` of them, an even number, from pixel `first` on. Taps that a filter does
// not have weigh 0, and the last filters begin earlier so that all end inside a row of `width` pixels.
struct RowFilters {
    std::vector<int64_t> first;
    Words pairs;
    int64_t taps, width;

    RowFilters(int64_t before, int64_t after) {
        const Filters filters(before, after);
        taps = (filters.most + 1) / 2 * 2;
        width = std::max(before, taps);
        pairs.resize(after * taps);
        for (int64_t x = 0; x < after; x++) {
            first.push_back(std::min(filters.first[x], width - taps));
            for (int64_t i = 0; i < filters.taps(x); i++)
                put(&pairs[x * taps], filters.first[x] - first[x] + i, filters.weights[filters.start[x] + i]);
        }
    }
};

// The filters of a column, on pairs of rows (0, 1), (2, 3) ...: result y has those from `first[y]` to `last[y]`.
struct ColumnFilters {
    std::vector<int64_t> first, last, start;
    Words pairs;
    int64_t most = 0;  // pairs of the largest

    ColumnFilters(int64_t before, int64_t after) {
        const Filters filters(before, after);
        for (int64_t y = 0; y < after; y++) {
            first.push_back(filters.first[y] / 2);
            last.push_back((filters.first[y] + filters.taps(y) - 1) / 2);
            const int64_t count = last[y] - first[y] + 1;
            most = std::max(most, count);
            start.push_back(static_cast<int64_t>(pairs.size()));
            pairs.resize(pairs.size() + 2 * count);
            for (int64_t i = 0; i < filters.taps(y); i++)
                put(&pairs[start[y]], filters.first[y] % 2 + i, filters.weights[filters.start[y] + i]);
        }
    }
};

struct Sums {
    __m256i lo = _mm256_set1_epi32(1 << (kOne - 1)), hi = _mm256_setzero_si256();

    void add(__m256i pixels, const int32_t* pair) {
        lo = _mm256_add_epi32(lo, _mm256_madd_epi16(pixels, _mm256_set1_epi32(pair[0])));
        hi = _mm256_add_epi32(hi, _mm256_madd_epi16(pixels, _mm256_set1_epi32(pair[1])));
    }
    __m256i rounded() const {  // may lie outside 0..255
        return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(hi, kSplit), lo), kOne);
    }
};

// --- Along rows, four of them at a time

// Two pixels of each of two rows as (pixel 0, pixel 1) of R, G, B, X, 16 bits each; `skip` 0 or 2 pixels before them.
template <int skip>
__m256i spread(__m256i pixels) {
    constexpr int s = skip * 4;
    const __m128i order = _mm_setr_epi8(s, -1, s + 4, -1, s + 1, -1, s + 5, -1, s + 2, -1, s + 6, -1, s + 3, -1, s + 7, -1);
    return _mm256_shuffle_epi8(pixels, _mm256_broadcastsi128_si256(order));
}

__m256i both(__m128i a, __m128i b) { return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1); }

// Result x of four rows, 16 bits each, clipped to 0..255: R G B X of row 0, of 2, of 1, of 3.
inline __m256i filtered(const RowFilters& filters, int64_t x, const Rows in) {
    Sums first, second;
    const int32_t* pair = &filters.pairs[x * filters.taps];
    int64_t at = filters.first[x] * 4, left = filters.taps;
    const auto four = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[row] + at)); };
    const auto two = [&](int row) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in[row] + at)); };
    for (; left >= 4; left -= 4, at += 16, pair += 4) {
        const __m256i a = both(four(0), four(1)), b = both(four(2), four(3));
        first.add(spread<0>(a), pair), second.add(spread<0>(b), pair);
        first.add(spread<2>(a), pair + 2), second.add(spread<2>(b), pair + 2);
    }
    if (left) first.add(spread<0>(both(two(0), two(1))), pair), second.add(spread<0>(both(two(2), two(3))), pair);
    const __m256i words = _mm256_packus_epi32(first.rounded(), second.rounded());
    return _mm256_min_epu16(words, _mm256_set1_epi16(255));
}

// To pictures: rows of 3 bytes per pixel.
void filter_rows(const RowFilters& filters, int64_t w, const Rows in, uint8_t* const* out) {
    for (int64_t x = 0; x < w; x++) {
        const __m256i words = filtered(filters, x, in);
        alignas(16) uint32_t pixels[kGroup];
        const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_store_si128(reinterpret_cast<__m128i*>(pixels), packed);
        constexpr int row_of[kGroup] = {0, 2, 1, 3};
        // The fourth byte is that of the next pixel, which is written next, but for the last one.
        const size_t bytes = x + 1 < w ? 4 : 3;
        if (bytes == 4)
            for (int i = 0; i < kGroup; i++) std::memcpy(out[row_of[i]] + 3 * x, &pixels[i], 4);
        else
            for (int i = 0; i < kGroup; i++) std::memcpy(out[row_of[i]] + 3 * x, &pixels[i], 3);
    }
}

// To what the vertical pass reads: samples of two rows side by side, 16 bits each. Writes 4 bytes more per line.
void filter_rows(const RowFilters& filters, int64_t w, const Rows in, int32_t* above, int32_t* below) {
    for (int64_t x = 0; x < w; x++) {
        const __m256i words = filtered(filters, x, in);
        const __m128i even = _mm256_castsi256_si128(words), odd = _mm256_extracti128_si256(words, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(above + 3 * x), _mm_unpacklo_epi16(even, odd));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(below + 3 * x), _mm_unpackhi_epi16(even, odd));
    }
}

// --- Along columns

__m256i bytes_of(const Sums (&sums)[4]) {
    const __m256i a = _mm256_packs_epi32(sums[0].rounded(), sums[1].rounded());
    const __m256i b = _mm256_packs_epi32(sums[2].rounded(), sums[3].rounded());
    return _mm256_packus_epi16(a, b);
}

// One row of `samples` results from pairs of rows as the horizontal pass leaves them; reads up to the next 32 samples.
void filter_columns(const int32_t* const* lines, int64_t count, const int32_t* pairs, int64_t samples, uint8_t* out) {
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t at = 0; at < samples; at += 32) {
        Sums sums[4];
        for (int64_t k = 0; k < count; k++)
            for (int i = 0; i < 4; i++)
                sums[i].add(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines[k] + at + 8 * i)), pairs + 2 * k);
        const __m256i bytes = _mm256_permutevar8x32_epi32(bytes_of(sums), in_order);
        if (samples - at >= 32) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), bytes);
        } else {
            alignas(32) uint8_t rest[32];
            _mm256_store_si256(reinterpret_cast<__m256i*>(rest), bytes);
            std::memcpy(out + at, rest, samples - at);
        }
    }
}

// 32 samples, or the 4 of one pixel.
template <int samples>
__m256i loaded(const uint8_t* from) {
    if (samples == 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    int32_t pixel;
    std::memcpy(&pixel, from, 4);
    return _mm256_castsi128_si256(_mm_cvtsi32_si128(pixel));
}

template <int samples>
__m256i filtered(const Rows rows, int64_t count, int64_t H, const int32_t* pairs, int64_t first, int64_t at) {
    const __m256i zero = _mm256_setzero_si256();
    Sums sums[4];
    for (int64_t k = 0; k < count; k++, pairs += 2) {
        const int64_t row = 2 * (first + k);
        const __m256i a = loaded<samples>(rows[row] + at), b = loaded<samples>(rows[std::min(row + 1, H - 1)] + at);
        const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
        sums[0].add(_mm256_unpacklo_epi8(low, zero), pairs);
        sums[1].add(_mm256_unpackhi_epi8(low, zero), pairs);
        sums[2].add(_mm256_unpacklo_epi8(high, zero), pairs);
        sums[3].add(_mm256_unpackhi_epi8(high, zero), pairs);
    }
    return bytes_of(sums);
}

// Row y of the results, of pixels of 4 bytes, from the picture's own rows.
void filter_columns(const ColumnFilters& filters, int64_t y, const Rows rows, int64_t W, int64_t H, uint8_t* out) {
    const int64_t first = filters.first[y], count = filters.last[y] - first + 1, bytes = 4 * W;
    const int32_t* pairs = &filters.pairs[filters.start[y]];
    int64_t at = 0;
    for (; at + 32 <= bytes; at += 32)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), filtered<32>(rows, count, H, pairs, first, at));
    for (; at < bytes; at += 4) {
        const int32_t pixel = _mm256_cvtsi256_si32(filtered<4>(rows, count, H, pairs, first, at));
        std::memcpy(out + at, &pixel, 4);
    }
}

// --- Whole pictures

void drop_fourth(const uint8_t* row, int64_t w, uint8_t* out) {
    for (int64_t x = 0; x < w; x++) std::memcpy(out + 3 * x, row + 4 * x, 3);
}

// Four rows from `row` on, the last one again where there are fewer; copies that are long enough for the filters.
struct Group {
    const uint8_t* rows[kGroup];
    Bytes copies;

    void take(const Rows all, int64_t row, int64_t W, int64_t H, int64_t width) {
        if (width > W && copies.empty()) copies.resize(4 * width * kGroup);
        for (int i = 0; i < kGroup; i++) {
            rows[i] = all[std::min(row + i, H - 1)];
            if (width > W) rows[i] = static_cast<uint8_t*>(std::memcpy(&copies[4 * width * i], rows[i], 4 * W));
        }
    }
};

struct Picture {
    Rows rows;
    int64_t W, H;
    uint8_t* out;
    int64_t w, h;

    // Pointers to four rows of the result, the last one again where there are fewer.
    void results(int64_t y, uint8_t** found) const {
        for (int i = 0; i < kGroup; i++) found[i] = out + 3 * w * std::min(y + i, h - 1);
    }

    void width_only() const {
        const RowFilters filters(W, w);
        Group group;
        uint8_t* results_[kGroup];
        for (int64_t y = 0; y < h; y += kGroup) {
            group.take(rows, y, W, H, filters.width);
            results(y, results_);
            filter_rows(filters, w, group.rows, results_);
        }
    }

    void width_first() const {
        const RowFilters across(W, w);
        const ColumnFilters down(H, h);
        const int64_t line = (3 * w + 31) / 32 * 32 + 48;  // and not a multiple of 4096 bytes, or lines share cache sets
        const int64_t kept = down.most / 2 + 2;            // groups: two pairs each
        Words ring(kept * 2 * line);
        const auto line_of = [&](int64_t pair) { return &ring[(pair / 2 % kept * 2 + pair % 2) * line]; };
        std::vector<const int32_t*> lines(down.most);
        Group group;
        int64_t next = down.first[0] / 2;  // group that is made next
        for (int64_t y = 0; y < h; y++) {
            for (; next <= down.last[y] / 2; next++) {
                group.take(rows, kGroup * next, W, H, across.width);
                filter_rows(across, w, group.rows, line_of(2 * next), line_of(2 * next + 1));
            }
            const int64_t count = down.last[y] - down.first[y] + 1;
            for (int64_t k = 0; k < count; k++) lines[k] = line_of(down.first[y] + k);
            filter_columns(lines.data(), count, &down.pairs[down.start[y]], 3 * w, out + 3 * w * y);
        }
    }

    void height_only() const {
        const ColumnFilters down(H, h);
        Bytes row(4 * W);
        for (int64_t y = 0; y < h; y++) {
            filter_columns(down, y, rows, W, H, row.data());
            drop_fourth(row.data(), w, out + 3 * w * y);
        }
    }

    void height_first() const {
        const ColumnFilters down(H, h);
        const RowFilters across(W, w);
        Bytes lines(4 * across.width * kGroup);
        const uint8_t* group[kGroup];
        uint8_t* results_[kGroup];
        for (int64_t y = 0; y < h; y += kGroup) {
            for (int i = 0; i < kGroup; i++) {
                group[i] = &lines[4 * across.width * std::min<int64_t>(i, h - 1 - y)];
                if (y + i < h) filter_columns(down, y + i, rows, W, H, &lines[4 * across.width * i]);
            }
            results(y, results_);
            filter_rows(across, w, group, results_);
        }
    }

    void resize() const {
        const int64_t columns = W - w, gone = H - h;
        if (columns == 0 && gone == 0)
            for (int64_t y = 0; y < h; y++) drop_fourth(rows[y], w, out + 3 * w * y);
        else if (gone == 0)
            width_only();
        else if (columns == 0)
            height_only();
        else if (gone > 0 && gone > 2 * columns)
            height_first();
        else
            width_first();
    }
};

}  // namespace

// `rows`: H pointers to rows of W pixels of 4 bytes. `out`: [h, w, 3] bytes. All sides are at least 1.
// Returns 0, or 1 where there is too little memory.
extern "C" int bagel_ds_resize(const uint8_t* const* rows, int64_t W, int64_t H, uint8_t* out, int64_t w, int64_t h) {
    try {
        Picture{rows, W, H, out, w, h}.resize();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
