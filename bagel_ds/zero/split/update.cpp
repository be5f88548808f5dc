// One pass of AdamW over a range of split masters; see split/update.py for what the arguments mean.
//
// The order of operations, with a fused multiply-add wherever two of them are fused there, is that of DeepSpeed's
// CPU Adam, so that with fp32 moments the results are the same bits. That fuses by hand what fills vectors, and leaves
// the last elements of a group to the compiler; so does this. Blocks of 1 KiB pass through the first-level cache; each
// loop in a block is one that compilers vectorize.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Arrays of 1 KiB: those of 4 KiB would share places in the cache, and take half as long again.
constexpr int64_t BLOCK = 256;
constexpr int32_t TIE = 0x8000;
constexpr float RATIO_CODES = 31.0f;
constexpr int32_t LEAST_CODE = 98 << 5;  // 2^-29 as the upper bits of fp32, sign and last 18 bits dropped
constexpr int32_t LAST_CODE = 1023;

enum Gradients { FP32_GRADIENTS, BF16_GRADIENTS };
enum Moments { FP32_MOMENTS, BF16_MOMENTS, PACKED_MOMENTS };
enum Average { NO_AVERAGE, FP32_AVERAGE, BF16_AVERAGE };

struct Step {
    float factor, beta1, beta1_rest, beta2, beta2_rest, bias2, eps, step_size, decay, bound, carried, weight;
    uint32_t seed, average_seed;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t random_bits(uint32_t seed, uint32_t index) {
    uint32_t x = (index * 0x9E3779B1u) ^ seed;
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    x ^= x >> 16;
    return x;
}

inline float deviation_of(int32_t code) { return float_of(uint32_t(code + LEAST_CODE) << 18); }

inline uint16_t rounded(float value, uint32_t below) { return (bits_of(value) + below) >> 16; }

template <int G, int M, int A>
void update_block(uint16_t* high, int16_t* low, const int64_t* tie, const int64_t* last_tie, int64_t first,
                  const void* gradients, void* exp_avg, void* exp_avg_sq, void* average, int64_t n, int64_t fused,
                  uint32_t index, const Step& s, std::vector<int64_t>& ties) {
    alignas(64) float master[BLOCK], m[BLOCK], v[BLOCK], g[BLOCK], root[BLOCK];
    for (int64_t i = 0; i < n; i++) master[i] = float_of((uint32_t(high[i]) << 16) + uint32_t(int32_t(low[i])));
    for (; tie < last_tie; tie++) {
        float& value = master[*tie - first];
        value = float_of(bits_of(value) + 2 * TIE);
    }

    const uint16_t* codes = static_cast<const uint16_t*>(exp_avg);
    for (int64_t i = 0; i < n; i++) {
        if (M == FP32_MOMENTS) {
            m[i] = static_cast<const float*>(exp_avg)[i];
            v[i] = static_cast<const float*>(exp_avg_sq)[i];
        } else if (M == BF16_MOMENTS) {
            m[i] = float_of(uint32_t(static_cast<const uint16_t*>(exp_avg)[i]) << 16);
            v[i] = float_of(uint32_t(static_cast<const uint16_t*>(exp_avg_sq)[i]) << 16);
        } else {
            const int32_t code = codes[i] >> 6;
            const float deviation = code == 0 ? 0.0f : deviation_of(code);
            v[i] = deviation * deviation;
            m[i] = float(int32_t(codes[i] & 63) - 32) * (s.bound / RATIO_CODES) * deviation;
        }
    }

    for (int64_t i = 0; i < n; i++) {
        g[i] = s.factor * (G == BF16_GRADIENTS ? float_of(uint32_t(static_cast<const uint16_t*>(gradients)[i]) << 16)
                                               : static_cast<const float*>(gradients)[i]);
    }
    for (int64_t i = 0; i < fused; i++) {
        m[i] = std::fma(g[i], s.beta1_rest, m[i] * s.beta1);
        v[i] = std::fma(g[i] * g[i], s.beta2_rest, v[i] * s.beta2);
        root[i] = std::sqrt(v[i]);
        const float direction = m[i] / std::fma(root[i], s.bias2, s.eps);
        if (s.decay != 0) master[i] = std::fma(master[i], s.decay, master[i]);
        master[i] = std::fma(direction, s.step_size, master[i]);
    }
    for (int64_t i = fused; i < n; i++) {
        m[i] = m[i] * s.beta1;
        m[i] = g[i] * s.beta1_rest + m[i];
        v[i] = v[i] * s.beta2;
        g[i] = g[i] * g[i];
        v[i] = g[i] * s.beta2_rest + v[i];
        g[i] = root[i] = std::sqrt(v[i]);
        g[i] = g[i] * s.bias2 + s.eps;
        g[i] = m[i] / g[i];
        if (s.decay != 0) master[i] += s.decay * master[i];
        master[i] = g[i] * s.step_size + master[i];
    }

    for (int64_t i = 0; i < n; i++) {
        if (M == FP32_MOMENTS) {
            static_cast<float*>(exp_avg)[i] = m[i];
            static_cast<float*>(exp_avg_sq)[i] = v[i];
            continue;
        }
        const uint32_t below = random_bits(s.seed, index + uint32_t(i));
        if (M == BF16_MOMENTS) {
            static_cast<uint16_t*>(exp_avg)[i] = rounded(m[i], below >> 16);
            static_cast<uint16_t*>(exp_avg_sq)[i] = rounded(v[i], below & 0xFFFF);
        } else {
            int32_t code = int32_t(bits_of(root[i]) >> 18) - LEAST_CODE;
            const float under = deviation_of(code), over = deviation_of(code + 1);
            const float chance = float(below & 0xFFFF) * (1.0f / 65536.0f);
            code += chance * (over * over - under * under) < v[i] - under * under ? 1 : 0;
            code = code < 1 ? 1 : code;
            code = code > LAST_CODE ? LAST_CODE : code;
            const float ratio = m[i] / deviation_of(code) * (RATIO_CODES / s.bound);
            const float nearest = std::floor(ratio + 0.5f);
            float step = nearest < -RATIO_CODES ? -RATIO_CODES : nearest;
            step = step > RATIO_CODES ? RATIO_CODES : step;
            // What the kept ratio lacks would have moved the master in later steps: it does so now.
            const float lacking = step == nearest && v[i] > 0 ? ratio - step : 0.0f;
            master[i] = std::fma(lacking, s.carried, master[i]);
            step = v[i] > 0 ? step : 0.0f;
            code = v[i] > 0 ? code : 0;
            static_cast<uint16_t*>(exp_avg)[i] = uint16_t((code << 6) | (int32_t(step) + 32));
        }
    }

    int32_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(master[i]);
        const uint32_t upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        const int32_t rest = int32_t(bits - (upper << 16));
        high[i] = uint16_t(upper);
        low[i] = int16_t(rest);
        found |= rest == TIE;
    }
    if (found) {
        for (int64_t i = 0; i < n; i++) {
            if (int32_t(bits_of(master[i]) - (uint32_t(high[i]) << 16)) == TIE) ties.push_back(first + i);
        }
    }

    for (int64_t i = 0; A != NO_AVERAGE && i < n; i++) {
        const float before = A == FP32_AVERAGE ? static_cast<const float*>(average)[i]
                                               : float_of(uint32_t(static_cast<const uint16_t*>(average)[i]) << 16);
        const float difference = master[i] - before;
        const float after = s.weight < 0.5f ? std::fma(s.weight, difference, before)
                                            : std::fma(s.weight - 1.0f, difference, master[i]);
        if (A == FP32_AVERAGE) {
            static_cast<float*>(average)[i] = after;
        } else {
            static_cast<uint16_t*>(average)[i] = rounded(after, random_bits(s.average_seed, index + uint32_t(i)) >> 16);
        }
    }
}

std::vector<std::vector<int64_t>> found_ties;

template <int G, int M, int A>
void update(uint16_t* high, int16_t* low, const int64_t* ties, int64_t tie_count, const void* gradients, void* exp_avg,
            void* exp_avg_sq, void* average, int64_t numel, int64_t fused, int64_t start,
            const Step& s, int threads) {
    constexpr int64_t gradient_bytes = G == BF16_GRADIENTS ? 2 : 4, moment_bytes = M == FP32_MOMENTS ? 4 : 2;
    constexpr int64_t average_bytes = A == BF16_AVERAGE ? 2 : 4;
    const int64_t blocks = (numel + BLOCK - 1) / BLOCK;
    found_ties.assign(threads, {});
#pragma omp parallel num_threads(threads)
    {
        // The blocks of a thread follow one another, and so do those of the next: ties stay in order.
        const int64_t workers = omp_get_num_threads(), worker = omp_get_thread_num();
        const int64_t begin = blocks * worker / workers, end = blocks * (worker + 1) / workers;
        std::vector<int64_t>& own = found_ties[worker];
        const int64_t *tie = ties, *last = ties + tie_count;
        while (tie < last && *tie < begin * BLOCK) tie++;
        for (int64_t block = begin; block < end; block++) {
            const int64_t first = block * BLOCK, n = numel - first < BLOCK ? numel - first : BLOCK;
            const int64_t* next = tie;
            while (next < last && *next < first + n) next++;
            update_block<G, M, A>(high + first, low + first, tie, next, first,
                                  static_cast<const char*>(gradients) + first * gradient_bytes,
                                  static_cast<char*>(exp_avg) + first * moment_bytes,
                                  static_cast<char*>(exp_avg_sq) + first * moment_bytes,
                                  static_cast<char*>(average) + first * average_bytes, n,
                                  std::min(std::max<int64_t>(fused - first, 0), n), uint32_t(start + first), s, own);
            tie = next;
        }
    }
}

template <int G, int M>
void with_average(int average_kind, uint16_t* high, int16_t* low, const int64_t* ties, int64_t tie_count,
                  const void* gradients, void* exp_avg, void* exp_avg_sq, void* average, int64_t numel, int64_t fused, int64_t start,
                  const Step& s, int threads) {
    auto chosen = average_kind == FP32_AVERAGE   ? update<G, M, FP32_AVERAGE>
                  : average_kind == BF16_AVERAGE ? update<G, M, BF16_AVERAGE>
                                                 : update<G, M, NO_AVERAGE>;
    chosen(high, low, ties, tie_count, gradients, exp_avg, exp_avg_sq, average, numel, fused, start, s, threads);
}

}  // namespace

extern "C" {

// Returns the number of ties that it leaves, for bagel_ds_ties.
int64_t bagel_ds_update(void* high, void* low, const int64_t* ties, int64_t tie_count, const void* gradients,
                        int gradient_kind, void* exp_avg, void* exp_avg_sq, int moment_kind, void* average,
                        int average_kind, int64_t numel, int64_t fused, int64_t start, const Step* step, int threads) {
    using Call = decltype(&with_average<0, 0>);
    static const Call calls[2][3] = {{with_average<0, 0>, with_average<0, 1>, with_average<0, 2>},
                                     {with_average<1, 0>, with_average<1, 1>, with_average<1, 2>}};
    calls[gradient_kind][moment_kind](average_kind, static_cast<uint16_t*>(high), static_cast<int16_t*>(low), ties,
                                      tie_count, gradients, exp_avg, exp_avg_sq, average, numel, fused, start, *step,
                                      threads);
    int64_t count = 0;
    for (const auto& each : found_ties) count += int64_t(each.size());
    return count;
}

void bagel_ds_ties(int64_t* positions) {
    for (const auto& each : found_ties) {
        std::memcpy(positions, each.data(), each.size() * sizeof(int64_t));
        positions += each.size();
    }
}
}
