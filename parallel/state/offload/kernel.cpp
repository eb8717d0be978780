// One pass of AdamW over fp32 state: gradient in (fp32 or bf16), state in place or into other memory, weight out.
//
// The order of operations is that of torch's fused AdamW on the CPU, so that results are the same bits. torch works in
// vectors and finishes each tensor element by element; compilers contract multiplications and additions in the two parts
// in ways of their own, which differ only in the second moment. The caller finds out which by trying.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

struct Segment {
    const float *p, *m, *v;
    float *p_out, *m_out, *v_out;
    const void *gradient;
    void *weight;
    int64_t numel, tail;  // elements; where those begin that torch does one by one
    double lr, beta1, beta2, eps, decay, step;
    int32_t gradient_is_bf16, weight_kind, maximize, unused;  // weight_kind: 0 none, 1 fp32, 2 bf16
};

struct Rounding {
    int32_t body, tail;  // of the second moment: 0 nothing fused, 1 the gradient's part, 2 the decayed part
};

namespace {

inline float widen(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline uint16_t narrow(float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float load(const float *from, int64_t i) { return from[i]; }
inline float load(const uint16_t *from, int64_t i) { return widen(from[i]); }
inline void store(float *to, int64_t i, float value) { to[i] = value; }
inline void store(uint16_t *to, int64_t i, float value) { to[i] = narrow(value); }
struct Nowhere {};
inline void store(Nowhere *, int64_t, float) {}

template <int FUSED>
inline float second_moment(float v, float beta2, float rest, float g) {
    if (FUSED == 1) return __builtin_fmaf(rest * g, g, v * beta2);
    if (FUSED == 2) return __builtin_fmaf(v, beta2, (rest * g) * g);
    return v * beta2 + (rest * g) * g;
}

template <int FUSED, bool SMALL, typename G, typename W>
void update(const Segment &s, int64_t begin, int64_t end) {
    const double correction1 = 1 - std::pow(s.beta1, s.step), correction2 = 1 - std::pow(s.beta2, s.step);
    const float size = static_cast<float>(-(s.lr / correction1)), root2 = static_cast<float>(std::sqrt(correction2));
    const float rest1 = static_cast<float>(1 - s.beta1), rest2 = static_cast<float>(1 - s.beta2);
    const float beta2 = static_cast<float>(s.beta2), eps = static_cast<float>(s.eps);
    const float kept = s.decay != 0 ? static_cast<float>(1 - s.lr * s.decay) : 1.0f;
    const float sign = s.maximize ? -1.0f : 1.0f;
    const float towards = SMALL ? rest1 : rest1 - 1.0f;
    const G *gradient = static_cast<const G *>(s.gradient);
    W *weight = static_cast<W *>(s.weight);
    const float *p = s.p, *m = s.m, *v = s.v;
    float *p_out = s.p_out, *m_out = s.m_out, *v_out = s.v_out;
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    for (int64_t i = begin; i < end; ++i) {  // old and new state may be the same memory, element by element
        const float g = load(gradient, i) * sign;
        const float old = m[i];
        const float first = __builtin_fmaf(towards, g - old, SMALL ? old : g);
        const float second = second_moment<FUSED>(v[i], beta2, rest2, g);
        const float value = p[i] * kept + (size * first) / (std::sqrt(second) / root2 + eps);
        m_out[i] = first;
        v_out[i] = second;
        p_out[i] = value;
        store(weight, i, value);
    }
}

template <int FUSED, typename G, typename W>
void by_moment(const Segment &s, int64_t begin, int64_t end) {
    if (std::fabs(static_cast<float>(1 - s.beta1)) < 0.5f) update<FUSED, true, G, W>(s, begin, end);
    else update<FUSED, false, G, W>(s, begin, end);
}

template <int FUSED, typename G>
void by_weight(const Segment &s, int64_t begin, int64_t end) {
    if (s.weight_kind == 0) by_moment<FUSED, G, Nowhere>(s, begin, end);
    else if (s.weight_kind == 1) by_moment<FUSED, G, float>(s, begin, end);
    else by_moment<FUSED, G, uint16_t>(s, begin, end);
}

template <int FUSED>
void by_gradient(const Segment &s, int64_t begin, int64_t end) {
    if (s.gradient_is_bf16) by_weight<FUSED, uint16_t>(s, begin, end);
    else by_weight<FUSED, float>(s, begin, end);
}

void part(const Segment &s, int32_t fused, int64_t begin, int64_t end) {
    if (begin >= end) return;
    if (fused == 1) by_gradient<1>(s, begin, end);
    else if (fused == 2) by_gradient<2>(s, begin, end);
    else by_gradient<0>(s, begin, end);
}

// elements [begin, end) of all segments one after the other
void range(const Segment *segments, int64_t count, Rounding rounding, int64_t begin, int64_t end) {
    for (int64_t k = 0, start = 0; k < count && start < end; start += segments[k++].numel) {
        const Segment &s = segments[k];
        const int64_t first = begin > start ? begin - start : 0;
        const int64_t last = end - start < s.numel ? end - start : s.numel;
        part(s, rounding.body, first, last < s.tail ? last : s.tail);
        part(s, rounding.tail, first > s.tail ? first : s.tail, last);
    }
}

}  // namespace

extern "C" void heteromesh_adamw(const Segment *segments, int64_t count, const Rounding *rounding, int32_t threads) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; ++k) total += segments[k].numel;
    const int64_t most = total / 65536 + 1;  // a thread must be worth its start
    const int64_t workers = threads < most ? threads : most;
    const int64_t share = (total / workers + 15) / 16 * 16;
    std::vector<std::thread> team;
    for (int64_t w = 1; w < workers; ++w) {
        const int64_t begin = w * share, end = w + 1 == workers ? total : (w + 1) * share;
        try {
            team.emplace_back(range, segments, count, *rounding, begin, end);
        } catch (...) {  // no more threads to be had
            range(segments, count, *rounding, begin, end);
        }
    }
    range(segments, count, *rounding, 0, workers == 1 ? total : share);
    for (auto &each : team) each.join();
}
