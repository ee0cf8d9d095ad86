#include "model.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
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

struct Model::Compiled {
  ffi::Optional<ffi::Module> library, machine; // the machine lives in the library
  ffi::Optional<ffi::Function> main;
  std::vector<ffi::Any> arguments; // inputs, then parameters

  ffi::Any call() const {
    ffi::Any result;
    const std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
    (*main).CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
    return result;
  }
};

Model::Model(Artifact artifact, int threads) : manifest_(std::move(artifact.manifest)) {
  if (threads > 1 && manifest_.threads == 1) throw Refused("it was built for one thread");
  if (manifest_.threads > 1) use_threads(threads ? threads : manifest_.threads);
  std::map<std::string, ffi::Tensor> parameters; // batch sizes share what is packed alike for them
  for (const auto &[name, one] : artifact.parameters)
    parameters.emplace(name, tensor(one.shape, one.dtype, one.bytes));
  for (const Program &program : manifest_.programs) {
    Compiled compiled;
    try {
      compiled.library = artifact.libraries.empty()
                             ? ffi::Function::GetGlobalRequired("ffi.SystemLib")().cast<ffi::Module>()
                             : load_library(artifact.libraries.at(program.library));
      compiled.machine = (*(*compiled.library)->GetFunction("vm_load_executable"))()
                             .cast<ffi::Module>();
      const auto initialize = (*compiled.machine)->GetFunction("vm_initialization");
      (*initialize)(static_cast<int>(kDLCPU), 0, kPooledAllocator);
      compiled.main = (*compiled.machine)->GetFunction("main");
    } catch (const ffi::Error &error) {
      throw Refused("the library cannot be loaded: " + std::string(error.message()));
    }
    compiled.arguments.resize(manifest_.inputs.size());
    for (const std::string &name : program.parameters)
      compiled.arguments.emplace_back(parameters.at(name));
    programs_.push_back(std::make_shared<Compiled>(std::move(compiled)));
  }
}

Model::Compiled &Model::take(const std::vector<std::string> &inputs) {
  const std::vector<TensorSpec> &specs = manifest_.inputs;
  if (inputs.size() != specs.size())
    throw Refused(std::to_string(specs.size()) + " inputs are expected");
  size_t which = 0; // where no size fits, the first tells what is expected
  const size_t row = nbytes(specs[0]) / manifest_.programs[0].size;
  for (size_t i = 1; i < programs_.size(); ++i)
    if (inputs[0].size() == row * manifest_.programs[i].size) which = i;
  for (size_t i = 0; i < inputs.size(); ++i) {
    std::vector<int64_t> shape = specs[i].shape;
    if (which) shape[0] = manifest_.programs[which].size;
    programs_[which]->arguments[i] = tensor(shape, specs[i].dtype, inputs[i]);
  }
  return *programs_[which];
}

std::vector<std::string> Model::run(const std::vector<std::string> &inputs) {
  const ffi::Any result = take(inputs).call();
  if (const auto one = result.as<ffi::Tensor>()) return {bytes_of(*one)};
  std::vector<std::string> outputs;
  for (const ffi::Tensor &found : result.cast<ffi::Array<ffi::Tensor>>())
    outputs.push_back(bytes_of(found));
  return outputs;
}

double Model::time(int count) {
  std::vector<std::string> zeros;
  for (const TensorSpec &spec : manifest_.inputs) zeros.emplace_back(nbytes(spec), '\0');
  const Compiled &program = take(zeros);
  const auto began = std::chrono::steady_clock::now();
  for (int i = 0; i < count; ++i) program.call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}
