// A PGM or PPM picture, and how it becomes the model's input: the arithmetic of edgekit/preprocess/image.py.
#pragma once

#include <string>
#include <vector>

#include "bundle.hpp"

struct Picture {
    int width = 0, height = 0, channels = 0; // 1 or 3
    std::vector<unsigned char> pixels;       // (height, width, channels)
};

// Binary PGM (P5) or PPM (P6) of 8 bits, at most 64 million pixels.
Picture read_picture(const std::string &path);

// float32 (1, channels, height, width).
std::vector<float> preprocess(const Picture &picture, const Preprocessing &to);
