// The shapes that a plan of pieces is made of: arithmetic only, no CUDA.
#ifndef KVBM_SHAPES_H
#define KVBM_SHAPES_H

#include <cstdint>
#include <vector>

#include "kvbm_cuda.h"

namespace kvbm {

// Pieces of a block that follow each other on both sides, as one.
struct Run {
  uint64_t source, destination;  // offsets in a block
  uint64_t nbytes;
};

// depth x height rows of width bytes, each dimension at a pitch on either side; a height or depth of 1 has none.
struct Shape {
  uint64_t source, destination;
  uint64_t width;
  uint64_t height = 1, depth = 1;
  uint64_t source_pitch = 0, destination_pitch = 0;
  uint64_t source_slice = 0, destination_slice = 0;

  uint64_t source_span() const { return (depth - 1) * source_slice + (height - 1) * source_pitch + width; }
  uint64_t destination_span() const {
    return (depth - 1) * destination_slice + (height - 1) * destination_pitch + width;
  }
};

// The runs of one block. With `is_source_only` the destination may lie anyhow.
std::vector<Run> join_pieces(const kvbm_cuda_plan& plan, bool is_source_only);
// The fewest pieces of one length that the runs can be cut into: that length is a multiple of piece_nbytes.
uint64_t common_nbytes(const std::vector<Run>& runs);
// All runs of all blocks, joined across blocks too.
std::vector<Shape> flat_shapes(const kvbm_cuda_plan& plan, const std::vector<Run>& runs);
// As few shapes as there are: rows at a pitch within a block, and blocks at a pitch, become one.
std::vector<Shape> pitched_shapes(const kvbm_cuda_plan& plan, const std::vector<Run>& runs);

}  // namespace kvbm

#endif
