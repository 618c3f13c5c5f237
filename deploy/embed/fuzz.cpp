// Feeds the readers with changed files: `fuzz F.zip ROUNDS SEED`, or a picture. Built with sanitizers, a fault ends it.
// Most changes go where the zip's own records and the manifest lie, and a changed manifest is what no signature protects here.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>

#include "picture.hpp"

int main(int count, char **words) {
    if (count != 4) return 2;
    std::ifstream file(words[1], std::ios::binary);
    const std::vector<char> good{std::istreambuf_iterator<char>(file), {}};
    if (good.size() < 8) return 2;
    const bool picture = good[0] == 'P' && good[1] != 'K';
    const std::string place = std::string(words[1]) + ".mutant";
    std::mt19937 random(static_cast<unsigned>(std::atoi(words[3])));
    const auto below = [&](size_t limit) { return std::uniform_int_distribution<size_t>(0, limit - 1)(random); };
    long accepted = 0, refused = 0;
    for (int round = std::atoi(words[2]); round > 0; --round) {
        auto bytes = good;
        const size_t tail = std::min<size_t>(bytes.size(), 2048), head = std::min<size_t>(bytes.size(), 8192);
        for (size_t change = 1 + below(4); change > 0; --change) {
            const size_t kind = below(8), at = kind < 4 ? bytes.size() - 1 - below(tail) : below(kind < 7 ? head : bytes.size());
            static const unsigned char odd[] = {0x00, 0x01, 0x7f, 0x80, 0xff, '{', '"', '9', '-'};
            bytes[at] = static_cast<char>(below(2) ? odd[below(sizeof odd)] : below(256));
        }
        if (below(8) == 0) bytes.resize(1 + below(bytes.size()));
        std::ofstream(place, std::ios::binary).write(bytes.data(), static_cast<long>(bytes.size()));
        try {
            if (picture) preprocess(read_picture(place), {8, 8, 3, {}, {1, 1, 1}, "letterbox"});
            else open_bundle(place, true);
            ++accepted;
        } catch (const Refused &) {
            ++refused;
        }
    }
    std::remove(place.c_str());
    std::printf("%ld refused, %ld accepted\n", refused, accepted);
    return 0;
}
