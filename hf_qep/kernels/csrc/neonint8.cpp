// NEON without the dot product instructions: products of bytes are widened and summed in pairs.
#include <arm_neon.h>

namespace {

// acc[i] += the four products of bytes 4i .. 4i + 3.
inline int32x4_t dot(int32x4_t acc, int8x16_t a, int8x16_t b) {
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(acc, vpaddq_s16(low, high));  // a pair is at most 2 * 128 * 127 = 32512
}

// The same with four bytes of b, dword LANE, for all i.
template <int LANE> inline int32x4_t dot_lane(int32x4_t acc, int8x16_t a, int8x16_t b) {
    return dot(acc, a, vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(b), LANE)));
}

}  // namespace

#include "neonint8.h"

const hfq::Int8 hfq::kNeonInt8 = {4, quantize, any_tile};
const hfq::CodesInt8 hfq::kNeonCodes = {quantize_codes, any_code_rows};
