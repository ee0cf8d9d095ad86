#include "artifact.h"

#include <dirent.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <set>

#include "cpu.h"

namespace {

const std::string kManifest = "manifest.json", kSignature = "manifest.sig";
const std::string kParameters = "parameters.safetensors";
constexpr off_t kMostManifest = off_t{1} << 26, kMostSignature = 64;
constexpr uint64_t kMostHeader = 100u << 20;

// The rest of a descriptor's regular file; closes it. Links, pipes and devices are refused unread.
std::string read_descriptor(int descriptor, const std::string &name, off_t most = -1) {
  if (descriptor < 0) throw Refused("no file " + name);
  struct stat about;
  std::string bytes;
  bool good = fstat(descriptor, &about) == 0 && S_ISREG(about.st_mode) &&
              (most < 0 || about.st_size <= most);
  if (good) {
    bytes.resize(about.st_size);
    size_t at = 0;
    for (ssize_t count; at < bytes.size(); at += count)
      if ((count = read(descriptor, &bytes[at], bytes.size() - at)) <= 0) break;
    bytes.resize(at);
  }
  close(descriptor);
  if (!good) throw Refused("no regular file, or too long: " + name);
  return bytes;
}

std::string read_in(const std::string &folder, const std::string &name, off_t most = -1) {
  const int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  return read_descriptor(open((folder + '/' + name).c_str(), flags), name, most);
}

std::set<std::string> names_in(const std::string &folder) {
  const std::unique_ptr<DIR, int (*)(DIR *)> opened(opendir(folder.c_str()), closedir);
  if (!opened) throw Refused("cannot read " + folder);
  std::set<std::string> found;
  while (const dirent *entry = readdir(opened.get()))
    if (std::strcmp(entry->d_name, ".") && std::strcmp(entry->d_name, ".."))
      found.insert(entry->d_name);
  return found;
}

void check_signature(const std::string &manifest, const std::string &signature,
                     const std::string &key) {
  if (signature.empty()) throw Refused("not signed");
  const std::string pem = read_file(key);
  const std::unique_ptr<BIO, int (*)(BIO *)> bio(BIO_new_mem_buf(pem.data(), pem.size()), BIO_free);
  const std::unique_ptr<EVP_PKEY, void (*)(EVP_PKEY *)> public_key(
      PEM_read_bio_PUBKEY(bio.get(), nullptr, nullptr, nullptr), EVP_PKEY_free);
  if (!public_key || EVP_PKEY_id(public_key.get()) != EVP_PKEY_ED25519)
    throw Refused("no public ed25519 key: " + key);
  const std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX *)> context(EVP_MD_CTX_new(),
                                                                    EVP_MD_CTX_free);
  const auto *bytes = reinterpret_cast<const unsigned char *>(manifest.data());
  const auto *sent = reinterpret_cast<const unsigned char *>(signature.data());
  if (EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, public_key.get()) != 1 ||
      EVP_DigestVerify(context.get(), sent, signature.size(), bytes, manifest.size()) != 1)
    throw Refused("the signature does not fit " + key);
}

void check_names(const std::string &folder, const Manifest &manifest) {
  const Json &files = manifest.files;
  std::set<std::string> present = names_in(folder), needed = {kParameters};
  for (const Program &program : manifest.programs) needed.insert(program.library);
  for (const std::string &name : needed)
    if (!files.find(name)) throw Refused("the manifest does not list " + name);
  for (const std::string &name : files.names) {
    if (name.empty() || name == "." || name == ".." || name == kManifest || name == kSignature ||
        name.find_first_of(std::string("/\\\0", 3)) != std::string::npos)
      throw Refused("file name in the manifest: " + name);
    if (!present.erase(name)) throw Refused("no file " + name);
  }
  present.erase(kManifest);
  present.erase(kSignature);
  if (!present.empty()) throw Refused("a file that is not listed: " + *present.begin());
}

void check_cpu(const Manifest &manifest) {
  const std::set<std::string> flags = cpu_flags();
  if (flags.empty()) return; // this system does not tell: the library itself is the next check
  for (const std::string &flag : manifest.cpu_flags)
    if (!flags.count(flag))
      throw Refused("this CPU cannot run an artifact for " + manifest.target + ": no " + flag);
}

void ask_for_tiles(const Manifest &manifest) {
  const std::vector<std::string> &flags = manifest.cpu_flags;
  if (std::count(flags.begin(), flags.end(), "amx_tile") && !may_use_tiles())
    throw Refused("Linux refuses this process the AMX tile registers");
}

std::map<std::string, Parameter> read_parameters(const std::string &raw, const Manifest &manifest) {
  static const std::map<std::string, std::string> kTypes = {
      {"F64", "float64"}, {"F32", "float32"}, {"F16", "float16"}, {"I64", "int64"},
      {"I32", "int32"}, {"I16", "int16"}, {"I8", "int8"}, {"U64", "uint64"},
      {"U32", "uint32"}, {"U16", "uint16"}, {"U8", "uint8"}, {"BOOL", "bool"}};
  const Refused damaged("no readable safetensors file: " + kParameters);
  uint64_t size = 0;
  if (raw.size() < sizeof size) throw damaged;
  std::memcpy(&size, raw.data(), sizeof size); // little-endian, as all machines that run this
  if (size > raw.size() - sizeof size || size > kMostHeader) throw damaged;
  const Json header = parse_json(raw.substr(sizeof size, size));
  const size_t body = sizeof size + size;
  std::set<std::string> names;
  for (const Program &program : manifest.programs)
    names.insert(program.parameters.begin(), program.parameters.end());
  std::map<std::string, Parameter> found;
  for (const std::string &name : names) {
    const Json *entry = header.find(name);
    const Json *dtype = entry ? entry->find("dtype") : nullptr;
    const Json *shape = entry ? entry->find("shape") : nullptr;
    const Json *offsets = entry ? entry->find("data_offsets") : nullptr;
    if (!dtype || !kTypes.count(dtype->text) || !shape || !offsets || offsets->items.size() != 2)
      throw damaged;
    Parameter parameter{kTypes.at(dtype->text), {}, {}};
    int64_t bytes = dtype_bytes(parameter.dtype);
    for (const Json &extent : shape->items) {
      if (!extent.is(Json::Kind::Integer) || extent.integer < 0 ||
          __builtin_mul_overflow(bytes, extent.integer, &bytes))
        throw damaged;
      parameter.shape.push_back(extent.integer);
    }
    const int64_t begin = offsets->items[0].integer, end = offsets->items[1].integer;
    if (begin < 0 || end < begin || end - begin != bytes ||
        static_cast<uint64_t>(end) > raw.size() - body)
      throw damaged;
    parameter.bytes = raw.substr(body + begin, bytes);
    found.emplace(name, std::move(parameter));
  }
  return found;
}

} // namespace

std::string read_file(const std::string &path) {
  return read_descriptor(open(path.c_str(), O_RDONLY | O_CLOEXEC), path);
}

Artifact open_artifact(const std::string &folder, const std::vector<std::string> &keys) {
  const std::string raw = read_in(folder, kManifest, kMostManifest);
  if (!keys.empty()) {
    std::string signature;
    if (names_in(folder).count(kSignature))
      signature = read_in(folder, kSignature, kMostSignature);
    for (const std::string &key : keys) check_signature(raw, signature, key);
  }
  Artifact artifact{read_manifest(raw), {}, {}};
  const Manifest &manifest = artifact.manifest;
  check_names(folder, manifest);
  check_cpu(manifest);
  std::set<std::string> libraries;
  for (const Program &program : manifest.programs) libraries.insert(program.library);
  std::string parameters;
  for (const std::string &name : manifest.files.names) {
    std::string bytes = read_in(folder, name);
    const Json &expected = *manifest.files.find(name);
    if (!expected.is(Json::Kind::String) || sha256(bytes) != expected.text)
      throw Refused("file " + name + " was changed");
    if (name == kParameters) parameters = bytes;
    if (libraries.count(name)) artifact.libraries[name] = std::move(bytes);
  }
  artifact.parameters = read_parameters(parameters, manifest);
  ask_for_tiles(manifest);
  return artifact;
}

Artifact take_embedded(const std::string &raw, const std::string &parameters) {
  Artifact artifact{read_manifest(raw), {}, {}};
  artifact.manifest.programs.resize(1); // what --system-lib compiles
  check_cpu(artifact.manifest);
  const Json *expected = artifact.manifest.files.find(kParameters);
  if (!expected || sha256(parameters) != expected->text)
    throw Refused("file " + kParameters + " was changed");
  artifact.parameters = read_parameters(parameters, artifact.manifest);
  ask_for_tiles(artifact.manifest);
  return artifact;
}
