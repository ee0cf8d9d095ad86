#include "model.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <tvm/ffi/container/array.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>

namespace ffi = tvm::ffi;

namespace {

constexpr int kPooledAllocator = 2;  // VirtualMachine.POOLED_ALLOCATOR of tvm/runtime/vm.py
constexpr int kShareAllCores = -3;   // ThreadGroup::kSpecifyThreadShareAllCore
constexpr size_t kAlignment = 64;    // what compiled code expects of a tensor

// Closes a descriptor at the end of a scope.
struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) close(number);
  }
};

struct Allocator {
  void AllocData(DLTensor *tensor) {
    const size_t size = (ffi::GetDataSize(*tensor) + kAlignment) / kAlignment * kAlignment;
    tensor->data = std::aligned_alloc(kAlignment, size);
    if (!tensor->data) throw std::bad_alloc();
  }
  void FreeData(DLTensor *tensor) { std::free(tensor->data); }
};

ffi::Tensor tensor(const std::vector<int64_t> &shape, const std::string &dtype,
                   const std::string &bytes) {
  ffi::Tensor made = ffi::Tensor::FromNDAlloc(Allocator(), ffi::ShapeView(shape.data(), shape.size()),
                                              ffi::StringToDLDataType(dtype), {kDLCPU, 0});
  if (bytes.size() != ffi::GetDataSize(*made.GetDLTensorPtr()))
    throw Refused("a tensor of " + std::to_string(bytes.size()) + " bytes where " +
                  std::to_string(ffi::GetDataSize(*made.GetDLTensorPtr())) + " are expected");
  std::copy(bytes.begin(), bytes.end(), static_cast<char *>(made.data_ptr()));
  return made;
}

// A link to a descriptor in a folder of our own, for a scope.
struct Link {
  std::string folder, path;

  explicit Link(int descriptor)
      : folder(std::filesystem::temp_directory_path() / "hwmpq-XXXXXX") {
    if (!mkdtemp(folder.data())) throw Refused("no folder for temporary files");
    path = folder + "/model.so";
    if (symlink(("/proc/self/fd/" + std::to_string(descriptor)).c_str(), path.c_str()))
      throw Refused("no link in " + folder);
  }
  ~Link() {
    unlink(path.c_str());
    rmdir(folder.c_str());
  }
};

// A sealed, nameless copy in memory is loaded: no file can change after its check. Under a name
// used before, dlopen(3) would hand out the library that was loaded then: hence the link.
ffi::Module load_library(const std::string &code) {
  const Descriptor file{memfd_create("model.so", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  size_t at = 0;
  for (ssize_t count; at < code.size(); at += count)
    if ((count = write(file.number, &code[at], code.size() - at)) <= 0)
      throw Refused("no memory for the library");
  const int seals = F_SEAL_SEAL | F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK;
  if (fcntl(file.number, F_ADD_SEALS, seals)) throw Refused("the library cannot be sealed");
  const auto load = ffi::Function::GetGlobalRequired("ffi.Module.load_from_file.so");
  const Link link(file.number);
  return load(link.path, "so").cast<ffi::Module>();
}

void use_threads(int threads) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof allowed, &allowed);
  ffi::Array<ffi::String> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &allowed)) cores.push_back(std::to_string(core));
  const int count = std::min(threads, static_cast<int>(cores.size()));
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kShareAllCores, count, cores);
}

std::string bytes_of(const ffi::Tensor &found) {
  return {static_cast<const char *>(found.data_ptr()), ffi::GetDataSize(*found.GetDLTensorPtr())};
}

} // namespace

Model::Model(Artifact artifact, int threads) : manifest_(std::move(artifact.manifest)) {
  if (threads > 1 && manifest_.threads == 1) throw Refused("it was built for one thread");
  if (manifest_.threads > 1) use_threads(threads ? threads : manifest_.threads);
  try {
    library_ = load_library(artifact.library);
    machine_ = (*(*library_)->GetFunction("vm_load_executable"))().cast<ffi::Module>();
    (*(*machine_)->GetFunction("vm_initialization"))(static_cast<int>(kDLCPU), 0, kPooledAllocator);
    main_ = (*machine_)->GetFunction("main");
  } catch (const ffi::Error &error) {
    throw Refused("the library cannot be loaded: " + std::string(error.message()));
  }
  arguments_.resize(manifest_.inputs.size());
  for (const Parameter &parameter : artifact.parameters)
    arguments_.emplace_back(tensor(parameter.shape, parameter.dtype, parameter.bytes));
}

void Model::set_inputs(const std::vector<std::string> &inputs) {
  if (inputs.size() != manifest_.inputs.size())
    throw Refused(std::to_string(manifest_.inputs.size()) + " inputs are expected");
  for (size_t i = 0; i < inputs.size(); ++i)
    arguments_[i] = tensor(manifest_.inputs[i].shape, manifest_.inputs[i].dtype, inputs[i]);
}

ffi::Any Model::call() {
  ffi::Any result;
  const std::vector<ffi::AnyView> views(arguments_.begin(), arguments_.end());
  (*main_).CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  return result;
}

std::vector<std::string> Model::run(const std::vector<std::string> &inputs) {
  set_inputs(inputs);
  const ffi::Any result = call();
  if (const auto one = result.as<ffi::Tensor>()) return {bytes_of(*one)};
  std::vector<std::string> outputs;
  for (const ffi::Tensor &found : result.cast<ffi::Array<ffi::Tensor>>())
    outputs.push_back(bytes_of(found));
  return outputs;
}

double Model::time(int count) {
  if (arguments_[0] == nullptr) {
    std::vector<std::string> zeros;
    for (const TensorSpec &spec : manifest_.inputs) {
      size_t bytes = dtype_bytes(spec.dtype);
      for (int64_t extent : spec.shape) bytes *= extent;
      zeros.emplace_back(bytes, '\0');
    }
    set_inputs(zeros);
  }
  const auto began = std::chrono::steady_clock::now();
  for (int i = 0; i < count; ++i) call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}
