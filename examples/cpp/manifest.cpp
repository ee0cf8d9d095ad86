#include "manifest.h"

#include <openssl/evp.h>

#include <algorithm>
#include <map>
#include <set>

namespace {

using Kind = Json::Kind;

constexpr int64_t kVersion = 1, kMostThreads = 1024, kMostElements = int64_t{1} << 31;
const char kKind[] = "hwmpq-artifact";

bool is_name(const Json &value) {
  return value.is(Kind::String) && !value.text.empty() &&
         std::all_of(value.text.begin(), value.text.end(),
                     [](char c) { return static_cast<uint8_t>(c) >= 0x20; });
}

bool are_names(const Json &value) {
  return value.is(Kind::List) && std::all_of(value.items.begin(), value.items.end(), is_name);
}

std::vector<std::string> texts(const Json &value) {
  std::vector<std::string> found;
  for (const Json &item : value.items) found.push_back(item.text);
  return found;
}

bool are_different(const std::vector<std::string> &names) {
  return std::set<std::string>(names.begin(), names.end()).size() == names.size();
}

bool is_tensor(const Json &value) {
  const Json *name = value.find("name"), *dtype = value.find("dtype"), *shape = value.find("shape");
  if (!name || !is_name(*name) || !dtype || !dtype->is(Kind::String) || !dtype_bytes(dtype->text) ||
      !shape || !shape->is(Kind::List))
    return false;
  int64_t count = 1;
  for (const Json &extent : shape->items) {
    if (!extent.is(Kind::Integer) || extent.integer <= 0 || extent.integer > kMostElements)
      return false;
    count *= extent.integer;
    if (count > kMostElements) return false;
  }
  return true;
}

std::vector<TensorSpec> tensors(const Json &list) {
  std::vector<TensorSpec> found;
  for (const Json &entry : list.items) {
    TensorSpec spec{entry.find("name")->text, entry.find("dtype")->text, {}};
    for (const Json &extent : entry.find("shape")->items) spec.shape.push_back(extent.integer);
    found.push_back(std::move(spec));
  }
  return found;
}

bool are_tensors(const Json &value) {
  if (!value.is(Kind::List) || value.items.empty() ||
      !std::all_of(value.items.begin(), value.items.end(), is_tensor))
    return false;
  std::vector<std::string> names;
  for (const Json &entry : value.items) names.push_back(entry.find("name")->text);
  return are_different(names);
}

bool is_target(const Json &value) {
  const Json *name = value.find("name"), *flags = value.find("cpu_flags");
  return name && is_name(*name) && flags && are_names(*flags);
}

bool are_different_names(const Json &value) {
  return are_names(value) && are_different(texts(value));
}

bool is_batch(const Json &value) {
  const Json *size = value.find("size"), *library = value.find("library");
  const Json *parameters = value.find("parameters");
  return library && is_name(*library) && size && size->is(Kind::Integer) && size->integer > 0 &&
         size->integer <= kMostElements && parameters && are_different_names(*parameters);
}

bool is_hash(const Json &value) {
  return value.is(Kind::String) && value.text.size() == 64 &&
         value.text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

bool are_objects(const Json &value) {
  return value.is(Kind::Object) && std::all_of(value.items.begin(), value.items.end(),
                                               [](const Json &v) { return v.is(Kind::Object); });
}

bool good(const std::string &key, const Json &value) {
  if (key == "target") return is_target(value);
  if (key == "threads")
    return value.is(Kind::Integer) && value.integer > 0 && value.integer <= kMostThreads;
  if (key == "inputs" || key == "outputs") return are_tensors(value);
  if (key == "assignment")
    return value.is(Kind::Object) && std::all_of(value.items.begin(), value.items.end(), is_name);
  if (key == "calls") return are_names(value);
  if (key == "parameters") return are_different_names(value);
  if (key == "interface") return is_hash(value);
  if (key == "kernels") return are_objects(value);
  if (key == "batches")
    return value.is(Kind::List) && std::all_of(value.items.begin(), value.items.end(), is_batch);
  return value.is(Kind::Object);
}

std::vector<Json> batches_of(const Json &manifest) {
  const Json *batches = manifest.find("batches");
  return batches ? batches->items : std::vector<Json>();
}

// Do the batch sizes differ, and can every input and output be so long?
bool batches_fit(const Json &manifest) {
  std::set<int64_t> sizes, firsts;
  const std::vector<Json> batches = batches_of(manifest);
  for (const Json &batch : batches) sizes.insert(batch.find("size")->integer);
  for (const char *kind : {"inputs", "outputs"})
    for (const TensorSpec &spec : tensors(*manifest.find(kind))) {
      firsts.insert(spec.shape.empty() ? 0 : spec.shape[0]);
      int64_t row = 1;
      for (size_t i = 1; i < spec.shape.size(); ++i) row *= spec.shape[i];
      if (!sizes.empty() && row > kMostElements / *sizes.rbegin()) return false;
    }
  return batches.empty() || (sizes.size() == batches.size() && firsts.size() == 1 &&
                             !sizes.count(*firsts.begin()));
}

std::string interface_of(const Json &manifest) {
  std::string lines;
  for (const std::string kind : {"inputs", "outputs"})
    for (const TensorSpec &spec : tensors(*manifest.find(kind))) {
      lines += kind + ' ' + spec.name + ' ' + spec.dtype + ' ';
      for (size_t i = 0; i < spec.shape.size(); ++i)
        lines += (i ? "," : "") + std::to_string(spec.shape[i]);
      lines += '\n';
    }
  for (const std::string kind : {"calls", "parameters"})
    for (const std::string &name : texts(*manifest.find(kind))) lines += kind + ' ' + name + '\n';
  for (const Json &batch : batches_of(manifest)) {
    lines += "batch " + std::to_string(batch.find("size")->integer) + ' ' +
             batch.find("library")->text + '\n';
    for (const std::string &name : texts(*batch.find("parameters")))
      lines += "parameters " + name + '\n';
  }
  return sha256(lines);
}

} // namespace

int dtype_bytes(const std::string &dtype) {
  static const std::map<std::string, int> kBytes = {
      {"float64", 8}, {"float32", 4}, {"float16", 2}, {"int64", 8}, {"int32", 4}, {"int16", 2},
      {"int8", 1}, {"uint64", 8}, {"uint32", 4}, {"uint16", 2}, {"uint8", 1}, {"bool", 1}};
  const auto found = kBytes.find(dtype);
  return found == kBytes.end() ? 0 : found->second;
}

size_t nbytes(const TensorSpec &spec) {
  size_t bytes = dtype_bytes(spec.dtype);
  for (int64_t extent : spec.shape) bytes *= extent;
  return bytes;
}

std::string sha256(const std::string &bytes) {
  unsigned char digest[32];
  unsigned int size = 0;
  if (!EVP_Digest(bytes.data(), bytes.size(), digest, &size, EVP_sha256(), nullptr))
    throw Refused("OpenSSL cannot compute SHA-256");
  std::string text;
  for (unsigned char byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

Manifest read_manifest(const std::string &raw) {
  const Json found = parse_json(raw);
  const Json *kind = found.find("kind"), *version = found.find("version");
  if (!kind || !kind->is(Kind::String) || kind->text != kKind) throw Refused("no artifact");
  if (!version || !version->is(Kind::Integer) || version->integer != kVersion)
    throw Refused("unknown version; this program reads version " + std::to_string(kVersion));
  if (found.find("library")) throw Refused("an artifact for a GPU: this program runs on CPUs");
  for (const char *key : {"target", "threads", "inputs", "outputs", "assignment", "calls",
                          "parameters", "files", "interface"})
    if (!found.find(key) || !good(key, *found.find(key)))
      throw Refused(std::string("the manifest is damaged: no ") + key);
  for (const char *key : {"kernels", "versions", "latency_s", "accuracy", "batches"})
    if (found.find(key) && !good(key, *found.find(key)))
      throw Refused(std::string("the manifest is damaged: no ") + key);
  if (!batches_fit(found)) throw Refused("the manifest is damaged: no batches");
  if (interface_of(found) != found.find("interface")->text)
    throw Refused("inputs, outputs, calls or parameters in the manifest were changed");
  Manifest manifest;
  manifest.target = found.find("target")->find("name")->text;
  manifest.cpu_flags = texts(*found.find("target")->find("cpu_flags"));
  manifest.inputs = tensors(*found.find("inputs"));
  manifest.outputs = tensors(*found.find("outputs"));
  const std::vector<int64_t> &shape = manifest.inputs[0].shape;
  manifest.programs.push_back(
      {shape.empty() ? 1 : shape[0], "model.so", texts(*found.find("parameters"))});
  for (const Json &batch : batches_of(found))
    manifest.programs.push_back({batch.find("size")->integer, batch.find("library")->text,
                                 texts(*batch.find("parameters"))});
  manifest.files = *found.find("files");
  manifest.threads = static_cast<int>(found.find("threads")->integer);
  return manifest;
}
