// JSON as hwmpq's manifests are written, read strictly: UTF-8, no name twice in one object.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// What is wrong with an artifact or with the use of it.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Json {
  enum class Kind { Null, Bool, Integer, Number, String, List, Object };

  Kind kind = Kind::Null;
  int64_t integer = 0;     // an Integer beyond 64 bits is a Number here
  std::string text;        // of a String
  std::vector<Json> items; // of a List; of an Object, its values
  std::vector<std::string> names; // of an Object, in order

  bool is(Kind other) const { return kind == other; }
  // The value of that name; null where this is no object or lacks it.
  const Json *find(const std::string &name) const;
};

// Throws Refused.
Json parse_json(const std::string &text);
