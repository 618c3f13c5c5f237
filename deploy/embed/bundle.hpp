// A bundle as edgekit leaves it: a slot of `edgekit install`, or a packed one, whose files are used where they lie in memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

// What is wrong, in words for whoever called the program.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Bytes {
    const unsigned char *data = nullptr;
    size_t size = 0;
};

// A file in memory, read only, for as long as this lives.
class Mapped {
  public:
    explicit Mapped(const std::string &path);
    ~Mapped();
    Mapped(Mapped &&other) noexcept : bytes_(other.bytes_) { other.bytes_ = {}; }
    Mapped(const Mapped &) = delete;
    Mapped &operator=(const Mapped &) = delete;
    Mapped &operator=(Mapped &&) = delete;
    Bytes bytes() const { return bytes_; }

  private:
    Bytes bytes_;
};

// The entries of a packed bundle: a zip of stored files, at most 1024 of them and below 4 GiB. Refuses every other zip.
std::map<std::string, Bytes> stored_entries(Bytes zip);

// How a picture becomes the model's input, as the manifest says.
struct Preprocessing {
    int width = 0, height = 0, channels = 0;
    std::array<float, 3> mean{}, deviation{};
    std::string fit;
};

struct Bundle {
    std::string input, output;       // names of the graph's first input and output
    std::vector<std::string> labels; // may be empty
    Preprocessing preprocessing;
    Bytes graph; // ONNX; its sha256 is the manifest's
    std::vector<Mapped> files;
};

// Opens ROOT/current of an install, or, with `verified`, a packed bundle that `edgekit verify` has accepted.
Bundle open_bundle(const std::string &path, bool verified);
