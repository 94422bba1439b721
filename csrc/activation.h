#pragma once
// Names of the activations of networks.
#include <string>

namespace fastflow::cpu {

enum class Activation { relu, tanh, silu, elu };

inline Activation activation_of(const std::string& name) {
  return name == "relu"   ? Activation::relu
         : name == "tanh" ? Activation::tanh
         : name == "silu" ? Activation::silu
                          : Activation::elu;
}

}  // namespace fastflow::cpu
