// Joins pieces to runs and runs to pitched shapes.
//
//     one block, runs at a pitch          blocks at a pitch (slice), each a multiple of the rows' pitch
//     |run|....|run|....|run|             |run|....|run|....  ........  |run|....|run|....
//     |< pitch>|                          |<          slice           >|
#include "shapes.h"

#include <numeric>

namespace kvbm {
namespace {

constexpr uint64_t kMostPitch = 0x7fffffff;  // of the runtime's pitched copies
constexpr uint64_t kMostRows = 0x7fffffff;
constexpr uint64_t kLeastRows = 4;  // any two rows stand at some pitch: fewer are no pattern, and are copied as rows

// A step that both sides can be copied with: forwards, over the row itself, and not beyond the limit.
bool is_pitch(uint64_t pitch, uint64_t width) { return pitch >= width && pitch <= kMostPitch; }

// The pitches of a block's runs, when they are equally long and equally far apart; false where they are not.
bool find_pitch(const std::vector<Run>& runs, uint64_t* source, uint64_t* destination) {
  if (runs.size() < kLeastRows) return false;
  *source = runs[1].source - runs[0].source;
  *destination = runs[1].destination - runs[0].destination;
  for (std::size_t i = 1; i < runs.size(); ++i) {
    if (runs[i].nbytes != runs[0].nbytes || runs[i].source - runs[i - 1].source != *source ||
        runs[i].destination - runs[i - 1].destination != *destination) {
      return false;
    }
  }
  return is_pitch(*source, runs[0].nbytes) && is_pitch(*destination, runs[0].nbytes);
}

// Rows of one shape each: neighbours of one width that stand equally far apart become one shape.
std::vector<Shape> stack_rows(const std::vector<Shape>& rows) {
  std::vector<Shape> shapes;
  for (const Shape& row : rows) {
    if (!shapes.empty()) {
      Shape& last = shapes.back();
      const uint64_t source = row.source - (last.source + (last.height - 1) * last.source_pitch);
      const uint64_t destination = row.destination - (last.destination + (last.height - 1) * last.destination_pitch);
      const bool is_second = last.height == 1 && is_pitch(source, row.width) && is_pitch(destination, row.width);
      const bool is_next = last.height > 1 && last.height < kMostRows && source == last.source_pitch &&
                           destination == last.destination_pitch;
      if (row.width == last.width && (is_second || is_next)) {
        last.source_pitch = source;
        last.destination_pitch = destination;
        ++last.height;
        continue;
      }
    }
    shapes.push_back(row);
  }
  std::vector<Shape> kept;
  for (const Shape& shape : shapes) {
    if (shape.height >= kLeastRows) {
      kept.push_back(shape);
      continue;
    }
    for (uint64_t y = 0; y < shape.height; ++y) {
      kept.push_back({shape.source + y * shape.source_pitch, shape.destination + y * shape.destination_pitch,
                      shape.width});
    }
  }
  return kept;
}

// Blocks whose rows have one pitch: neighbours that stand a whole number of rows apart become one 3-D shape.
std::vector<Shape> stack_blocks(const std::vector<Shape>& blocks) {
  std::vector<Shape> shapes;
  for (const Shape& block : blocks) {
    if (!shapes.empty()) {
      Shape& last = shapes.back();
      const uint64_t source = block.source - (last.source + (last.depth - 1) * last.source_slice);
      const uint64_t destination = block.destination - (last.destination + (last.depth - 1) * last.destination_slice);
      const auto is_slice = [&](uint64_t slice, uint64_t pitch) {
        return slice % pitch == 0 && slice / pitch >= block.height && slice / pitch <= kMostRows;
      };
      const bool is_second =
          last.depth == 1 && is_slice(source, block.source_pitch) && is_slice(destination, block.destination_pitch);
      const bool is_next =
          last.depth > 1 && source == last.source_slice && destination == last.destination_slice;
      if (is_second || is_next) {
        last.source_slice = source;
        last.destination_slice = destination;
        ++last.depth;
        continue;
      }
    }
    shapes.push_back(block);
  }
  return shapes;
}

}  // namespace

std::vector<Run> join_pieces(const kvbm_cuda_plan& plan, bool is_source_only) {
  const uint64_t nbytes = static_cast<uint64_t>(plan.piece_nbytes);
  std::vector<Run> runs;
  for (int64_t j = 0; j < plan.num_pieces; ++j) {
    const uint64_t source = plan.source_pieces[j];
    const uint64_t destination = is_source_only ? 0 : plan.destination_pieces[j];
    if (!runs.empty() && source == runs.back().source + runs.back().nbytes &&
        (is_source_only || destination == runs.back().destination + runs.back().nbytes)) {
      runs.back().nbytes += nbytes;
    } else {
      runs.push_back({source, destination, nbytes});
    }
  }
  return runs;
}

uint64_t common_nbytes(const std::vector<Run>& runs) {
  uint64_t nbytes = 0;
  for (const Run& run : runs) nbytes = std::gcd(nbytes, run.nbytes);
  return nbytes;
}

std::vector<Shape> flat_shapes(const kvbm_cuda_plan& plan, const std::vector<Run>& runs) {
  std::vector<Shape> shapes;
  shapes.reserve(static_cast<std::size_t>(plan.num_blocks) * runs.size());
  for (int64_t i = 0; i < plan.num_blocks; ++i) {
    for (const Run& run : runs) {
      const uint64_t source = plan.source_blocks[i] + run.source;
      const uint64_t destination = plan.destination_blocks[i] + run.destination;
      if (!shapes.empty() && source == shapes.back().source + shapes.back().width &&
          destination == shapes.back().destination + shapes.back().width) {
        shapes.back().width += run.nbytes;
      } else {
        shapes.push_back({source, destination, run.nbytes});
      }
    }
  }
  return shapes;
}

std::vector<Shape> pitched_shapes(const kvbm_cuda_plan& plan, const std::vector<Run>& runs) {
  uint64_t source_pitch = 0, destination_pitch = 0;
  if (!find_pitch(runs, &source_pitch, &destination_pitch)) return stack_rows(flat_shapes(plan, runs));
  std::vector<Shape> blocks;
  for (int64_t i = 0; i < plan.num_blocks; ++i) {
    Shape block{plan.source_blocks[i] + runs[0].source, plan.destination_blocks[i] + runs[0].destination,
                runs[0].nbytes};
    block.height = runs.size();
    block.source_pitch = source_pitch;
    block.destination_pitch = destination_pitch;
    blocks.push_back(block);
  }
  return stack_blocks(blocks);
}

}  // namespace kvbm
