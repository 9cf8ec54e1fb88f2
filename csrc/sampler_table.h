// The layout of a row of a sampler's table, which fastdiff/samplers/table.py explains.
#pragma once

namespace fastdiff {

// The columns; those of the history follow, one a slot.
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
