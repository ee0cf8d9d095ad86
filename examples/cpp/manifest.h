// What a manifest must hold: the same entries, ranges and order of checks as hwmpq/artifact.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "json.h"

struct TensorSpec {
  std::string name, dtype;
  std::vector<int64_t> shape;
};

// What was compiled for one batch size.
struct Program {
  int64_t size = 1;
  std::string library;                 // its file
  std::vector<std::string> parameters; // in the order in which it takes them, after the inputs
};

struct Manifest {
  std::string target;
  std::vector<std::string> cpu_flags;
  std::vector<Program> programs; // the first is that of the shapes in `inputs`
  std::vector<TensorSpec> inputs, outputs;
  Json files; // name -> SHA-256
  int threads = 1;
};

// A manifest's bytes, its signature checked already. Throws Refused.
Manifest read_manifest(const std::string &raw);

// Bytes of an element; 0 for a type that a border of a network or a parameter cannot have.
int dtype_bytes(const std::string &dtype);

// Bytes of a tensor.
size_t nbytes(const TensorSpec &spec);

std::string sha256(const std::string &bytes); // in lower-case hexadecimal digits
