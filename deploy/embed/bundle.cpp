#include "bundle.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr size_t kMaxFiles = 1024;
constexpr size_t kMaxManifest = 16u << 20;

uint32_t number(Bytes from, size_t at, size_t bytes) {
    uint32_t value = 0;
    for (size_t i = bytes; i-- > 0;) value = value << 8 | from.data[at + i];
    return value;
}

// The part [at, at + size) of a file; refuses one that reaches beyond `end`.
Bytes part(Bytes from, size_t at, size_t size, size_t end) {
    if (end > from.size || at > end || size > end - at) throw Refused("a record of the zip reaches beyond its place");
    return {from.data + at, size};
}

// Where the end record lies: its comment, the signature, reaches to the last byte of the file.
size_t end_record(Bytes zip) {
    if (zip.size < 22) throw Refused("it is too short for a zip");
    for (size_t comment = 0; comment <= 65535 && comment + 22 <= zip.size; ++comment) {
        const size_t at = zip.size - 22 - comment;
        if (number(zip, at, 4) == 0x06054b50 && number(zip, at + 20, 2) == comment) return at;
    }
    throw Refused("it is no zip");
}

std::string sha256(Bytes bytes) {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int length = 0;
    if (EVP_Digest(bytes.data, bytes.size, digest, &length, EVP_sha256(), nullptr) != 1) throw Refused("no sha256 here");
    static const char digits[] = "0123456789abcdef";
    std::string text;
    for (unsigned int i = 0; i < length; ++i) {
        text += digits[digest[i] >> 4];
        text += digits[digest[i] & 15];
    }
    return text;
}

// A number of the manifest that must be a whole one in low..high: only such a one may become an int.
int whole(const Json &value, int low, int high) {
    if (!value.is_number_integer() || value < low || value > high) throw Refused("a size in the manifest is out of range");
    return value.get<int>();
}

// A text of the manifest as an error may show it: short, and without what moves a terminal's cursor.
std::string shown(const Json &value) {
    if (!value.is_string()) return "no text";
    std::string text = value.get<std::string>().substr(0, 60);
    std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c > 0x7e; }, '?');
    return text;
}

// Softmax and labels are what one task means; others may take pictures, too, and answer with something else.
void check_task(const Json &task) {
    if (task == "image-classification") return;
    throw Refused("the bundle's task is " + shown(task) + ", image-classification was expected; for others: edgekit scan");
}

Preprocessing preprocessing_of(const Json &spec) {
    if (!spec.is_object() || spec.at("kind") != "image")
        throw Refused("the model takes " + (spec.is_object() ? shown(spec.at("kind")) : "tensors") + ", image was expected");
    Preprocessing out;
    out.width = whole(spec.at("width"), 1, 8192);
    out.height = whole(spec.at("height"), 1, 8192);
    out.channels = whole(spec.at("channels"), 1, 3);
    const auto mean = spec.at("mean").get<std::vector<float>>(), deviation = spec.at("std").get<std::vector<float>>();
    const auto channels = static_cast<size_t>(out.channels);
    if (out.channels == 2 || mean.size() != channels || deviation.size() != channels) throw Refused("mean and std do not fit");
    for (size_t i = 0; i < channels; ++i) {
        if (!(deviation[i] > 0) || !std::isfinite(deviation[i]) || !std::isfinite(mean[i]))
            throw Refused("mean and std must be finite, std above 0");
        out.mean[i] = mean[i];
        out.deviation[i] = deviation[i];
    }
    out.fit = spec.value("fit", "stretch");
    if (out.fit != "stretch" && out.fit != "letterbox")
        throw Refused("fit is " + shown(spec.at("fit")) + ", stretch or letterbox was expected");
    return out;
}

// Names, shapes, labels and preprocessing; `read` gives the bytes of a file of the bundle.
template <typename Read> Bundle described(Bytes manifest, Read read) {
    if (manifest.size > kMaxManifest) throw Refused("the manifest is too large");
    const Json json = Json::parse(manifest.data, manifest.data + manifest.size);
    if (json.at("format") != 1) throw Refused("the manifest's format is newer than this program");
    check_task(json.at("task"));
    Bundle bundle;
    bundle.preprocessing = preprocessing_of(json.at("preprocessing"));
    const Json &input = json.at("inputs").at(0);
    const Preprocessing &to = bundle.preprocessing;
    const Json &shape = input.at("shape");
    if (input.at("dtype") != "float32" || shape.size() != 4) throw Refused("the model's input is not float32 (n, c, h, w)");
    if (shape[1] != to.channels || shape[2] != to.height || shape[3] != to.width) throw Refused("input and preprocessing differ");
    bundle.input = input.at("name").get<std::string>();
    bundle.output = json.at("outputs").at(0).at("name").get<std::string>();
    bundle.labels = json.value("labels", std::vector<std::string>{});
    const Json &files = json.at("files");
    const std::string graph = files.contains("model.int8.onnx") ? "model.int8.onnx" : "model.onnx";
    bundle.graph = read(graph);
    if (files.at(graph) != sha256(bundle.graph)) throw Refused(graph + " is damaged: its sha256 is not the manifest's");
    return bundle;
}

Bundle from_pack(const std::string &path) {
    Mapped file(path);
    auto entries = stored_entries(file.bytes());
    const auto read = [&](const std::string &name) {
        const auto found = entries.find(name);
        if (found == entries.end()) throw Refused("the pack has no " + name);
        return found->second;
    };
    Bundle bundle = described(read("manifest.json"), read);
    bundle.files.push_back(std::move(file));
    return bundle;
}

// Only install writes ROOT/slots/a or b with ROOT/state.json above: it checked the signature before it unpacked anything.
Bundle from_slot(const fs::path &path) {
    const fs::path slot = fs::canonical(path), root = slot.parent_path().parent_path();
    if (slot.parent_path().filename() != "slots" || !fs::is_regular_file(root / "state.json"))
        throw Refused("no slot of an install; install the pack: edgekit install F.zip --root DIR --pub KEY");
    std::vector<Mapped> files;
    const auto read = [&](const std::string &name) {
        files.emplace_back((slot / name).string());
        return files.back().bytes();
    };
    Bundle bundle = described(read("manifest.json"), read);
    bundle.files = std::move(files);
    return bundle;
}

} // namespace

Mapped::Mapped(const std::string &path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe would be waited for
    if (file < 0) throw Refused(std::strerror(errno));
    struct stat about {};
    const bool usable = fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0;
    void *where = usable ? mmap(nullptr, static_cast<size_t>(about.st_size), PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    close(file);
    if (where == MAP_FAILED) throw Refused("no file with anything in it");
    bytes_ = {static_cast<const unsigned char *>(where), static_cast<size_t>(about.st_size)};
}

Mapped::~Mapped() {
    if (bytes_.data) munmap(const_cast<unsigned char *>(bytes_.data), bytes_.size);
}

std::map<std::string, Bytes> stored_entries(Bytes zip) {
    const size_t end = end_record(zip);
    const size_t count = number(zip, end + 10, 2), size = number(zip, end + 12, 4), start = number(zip, end + 16, 4);
    if (count > kMaxFiles || number(zip, end + 4, 4) != 0 || number(zip, end + 8, 2) != count || start > end || size != end - start)
        throw Refused("its table is not where it says");
    std::map<std::string, Bytes> entries;
    size_t at = start;
    for (size_t i = 0; i < count; ++i) {
        part(zip, at, 46, end);
        const size_t bytes = number(zip, at + 24, 4), place = number(zip, at + 42, 4), named = number(zip, at + 28, 2);
        if (number(zip, at, 4) != 0x02014b50) throw Refused("its table is damaged");
        if (number(zip, at + 10, 2) != 0 || number(zip, at + 20, 4) != bytes || (number(zip, at + 8, 2) & 1))
            throw Refused("its files are compressed or encrypted; packs store them as they are");
        const Bytes name = part(zip, at + 46, named, end);
        part(zip, place, 30, start);
        if (number(zip, place, 4) != 0x04034b50 || number(zip, place + 26, 2) != named ||
            std::memcmp(part(zip, place + 30, named, start).data, name.data, named) != 0)
            throw Refused("its table and its files differ");
        const Bytes contents = part(zip, place + 30 + named + number(zip, place + 28, 2), bytes, start);
        if (!entries.emplace(std::string(name.data, name.data + named), contents).second)
            throw Refused("it holds a name more than once");
        at += 46 + named + number(zip, at + 30, 2) + number(zip, at + 32, 2);
    }
    if (at != end) throw Refused("its table is longer than it says");
    return entries;
}

Bundle open_bundle(const std::string &path, bool verified) {
    try {
        if (fs::is_directory(path)) return from_slot(path);
        if (!verified) throw Refused("a pack must be verified first: edgekit verify F.zip --pub KEY, then --verified F.zip");
        return from_pack(path);
    } catch (const Json::exception &error) {
        throw Refused(std::string("the manifest is damaged: ") + error.what());
    } catch (const fs::filesystem_error &error) {
        throw Refused(error.code().message());
    }
}
