// hwmpq_runner run ARTIFACT --input x.bin ... --output y.bin ...   raw tensors: C order, no header
// hwmpq_runner bench ARTIFACT [--rounds N]      seconds per call as one JSON object
// hwmpq_runner check ARTIFACT ...               loads each; a line for each: ok, or refused and why
// A program with an artifact linked into it takes that one and no ARTIFACT.
// Options of all: --require-signature KEY.pub (beside the key that HWMPQ_REQUIRE_SIGNATURE names),
// --threads N. Exit codes: 0 done, 2 refused or wrong usage.
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include "embedded.h"
#include "model.h"

namespace {

constexpr double kEpoch = 0.02; // seconds of calls behind one sample

struct Options {
  std::vector<std::string> artifacts, inputs, outputs, keys;
  int rounds = 24, threads = 0;
};

int positive(const std::string &text) {
  char *end = nullptr;
  const long number = std::strtol(text.c_str(), &end, 10);
  if (*end || number < 1 || number > 1'000'000) throw Refused("a number is expected: " + text);
  return static_cast<int>(number);
}

Options read_options(int count, char **words) {
  Options found;
  if (const char *policy = std::getenv("HWMPQ_REQUIRE_SIGNATURE"); policy && *policy)
    found.keys.push_back(policy);
  for (int i = 2; i < count; ++i) {
    const std::string word = words[i];
    if (word.rfind("--", 0) != 0) {
      found.artifacts.push_back(word);
      continue;
    }
    if (i + 1 == count) throw Refused(word + " needs a value");
    const std::string value = words[++i];
    if (word == "--input") found.inputs.push_back(value);
    else if (word == "--output") found.outputs.push_back(value);
    else if (word == "--require-signature") found.keys.push_back(value);
    else if (word == "--rounds") found.rounds = positive(value);
    else if (word == "--threads") found.threads = positive(value);
    else throw Refused("unknown option " + word);
  }
  return found;
}

Model load(const Options &options, const std::string &folder) {
  return Model(open_artifact(folder, options.keys), options.threads);
}

Model load_one(const Options &options) {
#ifdef HWMPQ_EMBEDDED
  if (!options.artifacts.empty()) throw Refused("this program runs the artifact inside it only");
  return Model(open_embedded(), options.threads);
#else
  if (options.artifacts.size() != 1) throw Refused("one ARTIFACT is expected");
  return load(options, options.artifacts[0]);
#endif
}

int run(const Options &options) {
  Model model = load_one(options);
  std::vector<std::string> inputs;
  for (const std::string &path : options.inputs) inputs.push_back(read_file(path));
  if (options.outputs.size() != model.manifest().outputs.size())
    throw Refused(std::to_string(model.manifest().outputs.size()) + " outputs are expected");
  const std::vector<std::string> outputs = model.run(inputs);
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::ofstream file(options.outputs[i], std::ios::binary);
    if (!file.write(outputs[i].data(), outputs[i].size()).flush())
      throw Refused("cannot write " + options.outputs[i]);
  }
  return 0;
}

int bench(const Options &options) {
  Model model = load_one(options);
  model.time(1);
  int count = 1;
  while (model.time(count) < kEpoch && count < 1 << 24) count *= 2;
  std::vector<double> samples;
  for (int i = 0; i < options.rounds; ++i) samples.push_back(model.time(count) / count);
  std::sort(samples.begin(), samples.end());
  std::cout << "{\"latency_s\": {\"median\": " << samples[samples.size() / 2]
            << ", \"min\": " << samples[0] << ", \"p90\": " << samples[samples.size() * 9 / 10]
            << ", \"samples\": " << samples.size() << "}}" << std::endl;
  return 0;
}

int check(const Options &options) {
  bool good = true;
  for (const std::string &folder : options.artifacts) {
    std::string line = "ok " + folder;
    try {
      load(options, folder);
    } catch (const Refused &error) {
      line = "refused " + folder + ": " + error.what();
      good = false;
    }
    std::replace(line.begin(), line.end(), '\n', ' ');
    std::cout << line << std::endl;
  }
  return good ? 0 : 2;
}

} // namespace

int main(int count, char **words) {
  try {
    const Options options = read_options(count, words);
    const std::string command = count > 1 ? words[1] : "";
    if (command == "check" && !options.artifacts.empty()) return check(options);
    if (command == "run") return run(options);
    if (command == "bench") return bench(options);
    throw Refused("usage: hwmpq_runner run|bench|check ARTIFACT ...");
  } catch (const std::exception &error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 2;
  }
}
