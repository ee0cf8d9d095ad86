// An artifact loaded into TVM's runtime. One instance per thread, or a lock around it.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <string>
#include <vector>

#include "artifact.h"

class Model {
public:
  // threads: 0 for as many as it was built for. Throws Refused.
  Model(Artifact artifact, int threads);

  const Manifest &manifest() const { return manifest_; }

  // inputs: bytes of each, in C order; outputs alike. Throws Refused for a wrong number or size.
  std::vector<std::string> run(const std::vector<std::string> &inputs);

  // Seconds of `count` calls on inputs of zeros.
  double time(int count);

private:
  void set_inputs(const std::vector<std::string> &inputs);
  tvm::ffi::Any call();

  Manifest manifest_;
  tvm::ffi::Optional<tvm::ffi::Module> library_, machine_; // the machine lives in the library
  tvm::ffi::Optional<tvm::ffi::Function> main_;
  std::vector<tvm::ffi::Any> arguments_; // inputs, then parameters
};
