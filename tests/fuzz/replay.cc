// SPDX-License-Identifier: Apache-2.0
// Feeds the fuzzer's inputs to it without libFuzzer, in any build:
//
//   fuzz_replay [file or directory...] [--random N] [--seed S]
//
// gives it each file, then N pseudo-random inputs. One that ends the process is named by its seed, and can be repeated with
// --random 1 --seed S.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

namespace fs = std::filesystem;

constexpr size_t kMostBytes = 1024;

void replay_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "fuzz_replay: %s cannot be read\n", path.c_str());
    std::exit(2);
  }
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::fprintf(stderr, "%s\n", path.filename().c_str());
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
}

void replay(const fs::path& path) {
  if (!fs::is_directory(path)) return replay_file(path);
  std::vector<fs::path> files(fs::directory_iterator(path), fs::directory_iterator{});
  std::sort(files.begin(), files.end());
  for (const fs::path& file : files) replay_file(file);
}

void run_random(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint8_t> bytes(random() % kMostBytes);
  std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<uint8_t>(random()); });
  std::fprintf(stderr, "\rseed %llu", static_cast<unsigned long long>(seed));
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t num_random = 0;
  uint64_t first_seed = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--random" && i + 1 < argc)
      num_random = std::stoull(argv[++i]);
    else if (argument == "--seed" && i + 1 < argc)
      first_seed = std::stoull(argv[++i]);
    else
      replay(argument);
  }
  for (uint64_t i = 0; i < num_random; ++i) run_random(first_seed + i);
  std::fprintf(stderr, "\n");
  return 0;
}
