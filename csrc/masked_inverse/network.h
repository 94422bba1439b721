#pragma once
// The network of masked_inverse and masked_solve as the CUDA kernels read it.
#include <algorithm>
#include <cmath>

#include "block.h"
#include "masked_inverse/arguments.h"

namespace fastflow {

constexpr int64_t MAX_HIDDEN_LAYERS = 32;        // of the kernels
constexpr int64_t MAX_UNITS = int64_t(1) << 24;  // of a network

template <typename T>
FASTFLOW_HD T activated(T v, cpu::Activation activation) {
  switch (activation) {
    case cpu::Activation::relu: return v < 0 ? T(0) : v;  // NaN stays NaN
    case cpu::Activation::tanh: return std::tanh(v);
    case cpu::Activation::silu: {
      const T e = std::exp(-std::abs(v));  // does not overflow
      return v * (v < 0 ? e : T(1)) / (1 + e);
    }
    default: return v > 0 ? v : std::expm1(v);
  }
}

// Layers as in MaskedNetwork. A block of threads has a row of memory for each unit of layers `first` to
// `first` + last, and for the units that SKIP adds to later ones.
struct KernelNetwork {
  // Bits besides those of the op: a later layer adds these units; the next layer activates them first.
  static constexpr int KEPT = 16, BEFORE_NEXT = 32;

  struct Layer {
    int64_t weights;  // the first weight of the matrix
    int width, columns, added, gates;
    int units, kept;  // the first row of memory of its units, and of those that are kept
    int flags;
    bool wide;  // four neighbors of a row of the matrix are aligned
  };
  Layer layer[MAX_HIDDEN_LAYERS + 2] = {};
  int features, each, last, rows;  // rows: of memory

  KernelNetwork(const char* op, const MaskedNetwork& net, const Tensor& weights, int first)
      : features(static_cast<int>(net.features)), each(static_cast<int>(net.each)) {
    STD_TORCH_CHECK(net.last <= MAX_HIDDEN_LAYERS, op, ": widths: got ", net.last,
                    " hidden layers, expected at most ", MAX_HIDDEN_LAYERS);
    STD_TORCH_CHECK(net.features + net.total() < MAX_UNITS, op, ": got ", net.features + net.total(),
                    " features, units and parameters, expected less than ", MAX_UNITS);
    last = static_cast<int>(net.last);
    const auto* data = static_cast<const char*>(weights.const_data_ptr());
    const int64_t element = weights.scalar_type() == ScalarType::Double ? 8 : 4;
    int64_t memory = 0, kept[2] = {0, 0};  // of even and odd layers, each in place of the one before
    for (int l = 0; l <= last + 1; ++l) {
      Layer& to = layer[l];
      to.weights = net.weights[l];
      to.width = static_cast<int>(net.sizes[l]);
      to.columns = l ? layer[l - 1].width : 0;
      to.added = static_cast<int>(net.added[l]), to.gates = static_cast<int>(net.gates[l]);
      to.flags = static_cast<int>(l ? net.flags(l) : 0);
      if (l > 0 && l <= last && net.flags(l + 1) & BEFORE) to.flags |= BEFORE_NEXT;
      if (l + 2 <= last && net.flags(l + 2) & SKIP) to.flags |= KEPT;
      if (to.flags & (KEPT | SKIP)) kept[l % 2] = std::max(kept[l % 2], net.sizes[l]);
      to.wide = to.columns % 4 == 0 &&
                reinterpret_cast<uintptr_t>(data + to.weights * element) % (4 * element) == 0;
      if (l < first || l > last + first) continue;
      to.units = static_cast<int>(memory);
      memory += net.sizes[l];
    }
    for (int l = 0; l <= last; ++l) layer[l].kept = static_cast<int>(memory + (l % 2 ? kept[0] : 0));
    rows = static_cast<int>(memory + kept[0] + kept[1]);
  }
};

}  // namespace fastflow
