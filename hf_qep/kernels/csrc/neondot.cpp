// NEON with the dot product instructions of Armv8.2.
#include <arm_neon.h>

namespace {

inline int32x4_t dot(int32x4_t acc, int8x16_t a, int8x16_t b) { return vdotq_s32(acc, a, b); }

template <int LANE> inline int32x4_t dot_lane(int32x4_t acc, int8x16_t a, int8x16_t b) {
    return vdotq_laneq_s32(acc, a, b, LANE);
}

}  // namespace

#include "neonint8.h"

const hfq::Int8 hfq::kDotInt8 = {4, quantize, any_tile};
const hfq::CodesInt8 hfq::kDotCodes = {quantize_codes, any_code_rows};
