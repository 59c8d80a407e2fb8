// Helpers for the units of the instruction sets. See kernels.h for why all of it is in an unnamed namespace.
#pragma once
#include <math.h>
#include <string.h>
#include "api.h"
#include "kernels.h"

namespace {

using hfq::CodeRows;
using hfq::Quantized;
using hfq::Tile;
using hfq::kBlockWords;
using hfq::kCodeBlock;
using hfq::kPieceWords;

constexpr int64_t kCodesAhead = 1024;   // distance to prefetch in rows of integer codes, in words

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Walks words first..last in pieces of at most `longest` words that stay inside a group.
class Pieces {
public:
    Pieces(int64_t first, int64_t last, int64_t group_words, int64_t longest)
        : end_(first), last_(last), group_words_(group_words), longest_(longest) {
        group_ = first / group_words;
        left_ = group_words - (first - group_ * group_words);
        index_ = group_ * ((group_words + longest - 1) / longest) + (group_words - left_) / longest - 1;
    }
    bool next() {
        if (end_ >= last_) return false;
        if (left_ == 0) { group_++; left_ = group_words_; }
        begin_ = end_;
        end_ = lesser(begin_ + lesser(longest_, left_), last_);
        left_ -= end_ - begin_;
        index_++;
        return true;
    }
    int64_t begin() const { return begin_; }
    int64_t end() const { return end_; }
    int64_t group() const { return group_; }
    int64_t index() const { return index_; }   // number of the piece in the row, when calls begin at pieces

private:
    int64_t begin_ = 0, end_, last_, group_words_, longest_, group_, left_, index_;
};

// The words of a block of a row of integer codes, or if the row ends before the block, a copy filled up with zeros.
template <int WORDS>
inline const uint32_t* whole_block(const uint32_t* words, int64_t have, uint32_t (&copy)[WORDS]) {
    for (int i = 0; i < WORDS; i += 16) __builtin_prefetch(words + kCodesAhead + i);
    if (have >= WORDS) return words;
    memset(copy, 0, sizeof copy);
    memcpy(copy, words, (size_t)have * 4);
    return copy;
}

// Scale of int8 values whose largest magnitude has these bits; *inverse turns an input into a value.
inline float block_scale(uint32_t largest_bits, float* inverse) {
    float largest;
    memcpy(&largest, &largest_bits, 4);
    if (largest_bits >= 0x7f800000u) {  // an infinity or a NaN
        *inverse = 0;
        return NAN;
    }
    if (largest < 1e-36f) {  // 127 / largest would overflow
        *inverse = 1e38f;
        return 1e-38f;
    }
    *inverse = 127 / largest;
    return largest / 127;
}

}  // namespace
