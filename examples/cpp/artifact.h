// A folder opened as an artifact: nothing of it is used before it was compared with its hash.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "manifest.h"

struct Parameter {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

struct Artifact {
  Manifest manifest;
  std::string library;               // the bytes of model.so, as they were checked
  std::vector<Parameter> parameters; // in the order of the manifest
};

// keys: files of public keys (PEM), each of which must have signed it. Throws Refused for what
// hwmpq.load refuses: see hwmpq/artifact/__init__.py.
Artifact open_artifact(const std::string &folder, const std::vector<std::string> &keys);

// A regular file, whole. Throws Refused.
std::string read_file(const std::string &path);
