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
  // File -> its bytes, as they were checked; none where the network is a part of this program.
  std::map<std::string, std::string> libraries;
  std::map<std::string, Parameter> parameters;
};

// keys: files of public keys (PEM), each of which must have signed it. Throws Refused for what
// hwmpq.load refuses: see hwmpq/artifact/__init__.py.
Artifact open_artifact(const std::string &folder, const std::vector<std::string> &keys);

// An artifact whose library was linked into this program, from the bytes of its manifest and of its
// parameters. Throws Refused.
Artifact take_embedded(const std::string &manifest, const std::string &parameters);

// A regular file, whole. Throws Refused.
std::string read_file(const std::string &path);
