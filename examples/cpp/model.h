// An artifact loaded into TVM's runtime. One instance per thread, or a lock around it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "artifact.h"

class Model {
public:
  // threads: 0 for as many as it was built for. Throws Refused.
  Model(Artifact artifact, int threads);

  const Manifest &manifest() const { return manifest_; }

  // inputs: bytes of each, in C order, at one of the batch sizes; outputs alike. Throws Refused for
  // a wrong number or size.
  std::vector<std::string> run(const std::vector<std::string> &inputs);

  // Seconds of `count` calls on inputs of zeros, at the first batch size.
  double time(int count);

private:
  struct Compiled; // a program with its arguments, in TVM's types

  // The program for the inputs' batch size, with these inputs.
  Compiled &take(const std::vector<std::string> &inputs);

  Manifest manifest_;
  std::vector<std::shared_ptr<Compiled>> programs_; // as in the manifest
};
