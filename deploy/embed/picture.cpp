#include "picture.hpp"

#include <algorithm>
#include <cmath>

namespace {

constexpr long kMaxPixels = 64'000'000;

// Weights of one output row or column: an antialiased triangle filter, as Pillow's Image.BILINEAR.
struct Weights {
    int first = 0;
    std::vector<float> values;
};

std::vector<Weights> triangle(int in, int out) {
    const double scale = static_cast<double>(in) / out, radius = std::max(scale, 1.0);
    std::vector<Weights> all(static_cast<size_t>(out));
    for (int row = 0; row < out; ++row) {
        const double centre = (row + 0.5) * scale;
        const int first = static_cast<int>(std::clamp(std::floor(centre - radius + 0.5), 0.0, in - 1.0));
        const int last = static_cast<int>(std::clamp(std::floor(centre + radius + 0.5), first + 1.0, static_cast<double>(in)));
        std::vector<double> exact;
        double sum = 0;
        for (int at = first; at < last; ++at) {
            exact.push_back(std::max(0.0, 1.0 - std::abs((at + 0.5 - centre) / radius)));
            sum += exact.back();
        }
        Weights &weights = all[static_cast<size_t>(row)];
        weights.first = first;
        for (const double weight : exact) weights.values.push_back(static_cast<float>(weight / sum));
    }
    return all;
}

// One plane (height, width) -> (to_height, to_width): rows first, then columns.
std::vector<float> resized(const std::vector<float> &plane, int height, int width, int to_height, int to_width) {
    const auto in = static_cast<size_t>(width), out = static_cast<size_t>(to_width);
    std::vector<float> tall(static_cast<size_t>(to_height) * in), small(static_cast<size_t>(to_height) * out);
    const auto rows = triangle(height, to_height), columns = triangle(width, to_width);
    for (size_t row = 0; row < rows.size(); ++row)
        for (size_t i = 0; i < rows[row].values.size(); ++i)
            for (size_t x = 0; x < in; ++x)
                tall[row * in + x] += rows[row].values[i] * plane[(static_cast<size_t>(rows[row].first) + i) * in + x];
    for (size_t row = 0; row < rows.size(); ++row)
        for (size_t x = 0; x < out; ++x)
            for (size_t i = 0; i < columns[x].values.size(); ++i)
                small[row * out + x] += columns[x].values[i] * tall[row * in + static_cast<size_t>(columns[x].first) + i];
    return small;
}

// Channel `which` of the model's input as float, before its resize; grey by ITU-R BT.601.
std::vector<float> plane_of(const Picture &picture, int channels, int which) {
    const size_t count = static_cast<size_t>(picture.width) * static_cast<size_t>(picture.height);
    std::vector<float> plane(count);
    for (size_t i = 0; i < count; ++i) {
        const unsigned char *pixel = &picture.pixels[i * static_cast<size_t>(picture.channels)];
        if (picture.channels == 1) plane[i] = pixel[0];
        else if (channels == 3) plane[i] = pixel[which];
        else plane[i] = 0.299f * pixel[0] + 0.587f * pixel[1] + 0.114f * pixel[2];
    }
    return plane;
}

bool space(unsigned char byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

// A whole number of a PNM header: white space before it, in which comments run from # to the end of their line, then digits, then
// one byte of white space, behind which `at` is left. Pixels follow the last one's, whatever they look like.
long header_number(Bytes file, size_t &at) {
    while (at < file.size && (space(file.data[at]) || file.data[at] == '#')) {
        if (file.data[at] == '#')
            while (at < file.size && file.data[at] != '\n' && file.data[at] != '\r') ++at;
        else ++at;
    }
    long value = 0;
    size_t digits = 0;
    for (; at < file.size && file.data[at] >= '0' && file.data[at] <= '9' && digits < 9; ++at, ++digits)
        value = value * 10 + (file.data[at] - '0');
    if (digits == 0 || at >= file.size || !space(file.data[at]))
        throw Refused("the picture's header is damaged: a number and white space were expected at byte " + std::to_string(at));
    ++at;
    return value;
}

} // namespace

Picture read_picture(const std::string &path) {
    const Mapped mapped(path);
    const Bytes file = mapped.bytes();
    if (file.size < 8 || file.data[0] != 'P' || (file.data[1] != '5' && file.data[1] != '6') || !space(file.data[2]))
        throw Refused("no binary PGM or PPM; convert it: convert in.png out.ppm");
    Picture picture;
    picture.channels = file.data[1] == '5' ? 1 : 3;
    size_t at = 2;
    const long width = header_number(file, at), height = header_number(file, at), top = header_number(file, at);
    if (width < 1 || height < 1 || width > kMaxPixels / height || top != 255)
        throw Refused("it is " + std::to_string(width) + " x " + std::to_string(height) + " with a maximum of " + std::to_string(top) +
                      "; 1 to 64 million pixels with 255 were expected");
    picture.width = static_cast<int>(width);
    picture.height = static_cast<int>(height);
    const size_t bytes = static_cast<size_t>(width * height * picture.channels);
    if (file.size - at < bytes) throw Refused("it is truncated");
    picture.pixels.assign(file.data + at, file.data + at + bytes);
    return picture;
}

std::vector<float> preprocess(const Picture &picture, const Preprocessing &to) {
    int height = to.height, width = to.width;
    if (to.fit == "letterbox") {
        const double scale = std::max(double(picture.height) / to.height, double(picture.width) / to.width);
        height = std::max(1, static_cast<int>(std::nearbyint(picture.height / scale)));
        width = std::max(1, static_cast<int>(std::nearbyint(picture.width / scale)));
    }
    const int top = (to.height - height) / 2, left = (to.width - width) / 2;
    const bool same = picture.height == height && picture.width == width;
    std::vector<float> input;
    for (int channel = 0; channel < to.channels; ++channel) {
        auto plane = plane_of(picture, to.channels, channel);
        if (!same) plane = resized(plane, picture.height, picture.width, height, width);
        std::vector<float> padded(static_cast<size_t>(to.height) * static_cast<size_t>(to.width)); // black
        for (int row = 0; row < height; ++row)
            std::copy_n(plane.begin() + static_cast<long>(row) * width, width,
                        padded.begin() + static_cast<long>(top + row) * to.width + left);
        const float mean = to.mean[static_cast<size_t>(channel)], deviation = to.deviation[static_cast<size_t>(channel)];
        for (const float pixel : padded) input.push_back(pixel * (1 / (255 * deviation)) - mean / deviation);
    }
    return input;
}
