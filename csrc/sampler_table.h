// The layout of a row of a sampler's table. fastdiff/samplers/table.py says what each column means,
// and a test compares the enumeration with COLUMNS of fastdiff/ops/sampler_step.py.
#pragma once

namespace fastdiff {

// The columns. Those of the history's slots follow, one a slot.
enum SamplerColumn {
  kGuidance,
  kRescale,
  kX0X,
  kX0M,
  kClipMin,
  kClipMax,
  kQuantile,
  kOutX,
  kOutX0,
  kOutM,
  kNoise,
  kLogvar,
  kLogvarV,
  kKeepX,
  kKeepX0,
  kKeepM,
  kKeepNoise,
  kSlot,
  kSamplerColumns,
};

constexpr int kSamplerDepth = 8;  // slots of the history, at most

}  // namespace fastdiff
