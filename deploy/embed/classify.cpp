// An edgekit bundle in a C++ program: ONNX Runtime's C API, no Python.
//
//   classify ROOT/current PICTURE...            a slot of edgekit install
//   classify --verified F.zip PICTURE...        a packed bundle that edgekit verify has just accepted
//
// Prints a line for each picture (PGM or PPM): its label, and the score as Model.open gives it. Without a picture the bundle is
// only checked. Ends with 0; 1 where a bundle or picture is refused; 2 where the words are wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "bundle.hpp"
#include "ort_api.h"
#include "picture.hpp"

namespace {

const OrtApi *api() {
    static const OrtApi *table = OrtGetApiBase()->GetApi(EMBED_ORT_API);
    if (!table) throw Refused("this libonnxruntime is older than the header");
    return table;
}

void check(OrtStatus *status) {
    if (!status) return;
    const std::string words = api()->GetErrorMessage(status);
    api()->ReleaseStatus(status);
    throw Refused("ONNX Runtime: " + words);
}

template <typename T> using Held = std::unique_ptr<T, void (*)(T *)>;

// What a function of the API makes, released by another one.
template <typename T, typename Make> Held<T> make(void (*release)(T *), Make &&call) {
    T *made = nullptr;
    check(call(&made));
    return {made, release};
}

class Model {
  public:
    explicit Model(const Bundle &bundle)
        : bundle_(bundle), environment_(make<OrtEnv>(api()->ReleaseEnv, [](OrtEnv **out) {
              return api()->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "edgekit", out);
          })),
          session_(nullptr, api()->ReleaseSession), memory_(make<OrtMemoryInfo>(api()->ReleaseMemoryInfo, [](OrtMemoryInfo **out) {
              return api()->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, out);
          })) {
        auto options = make<OrtSessionOptions>(api()->ReleaseSessionOptions, api()->CreateSessionOptions);
        check(api()->SetIntraOpNumThreads(options.get(), 1));
        session_ = make<OrtSession>(api()->ReleaseSession, [&](OrtSession **out) {
            return api()->CreateSessionFromArray(environment_.get(), bundle.graph.data, bundle.graph.size, options.get(), out);
        });
    }

    // The softmax of the model's answer.
    std::vector<float> scores(const Picture &picture) {
        auto pixels = preprocess(picture, bundle_.preprocessing);
        const Preprocessing &to = bundle_.preprocessing;
        const int64_t shape[] = {1, to.channels, to.height, to.width};
        auto input = make<OrtValue>(api()->ReleaseValue, [&](OrtValue **out) {
            return api()->CreateTensorWithDataAsOrtValue(memory_.get(), pixels.data(), pixels.size() * sizeof(float), shape, 4,
                                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, out);
        });
        const char *from = bundle_.input.c_str(), *into = bundle_.output.c_str();
        const OrtValue *given = input.get();
        auto output = make<OrtValue>(api()->ReleaseValue, [&](OrtValue **out) {
            return api()->Run(session_.get(), nullptr, &from, &given, 1, &into, 1, out);
        });
        auto about = make<OrtTensorTypeAndShapeInfo>(api()->ReleaseTensorTypeAndShapeInfo, [&](OrtTensorTypeAndShapeInfo **out) {
            return api()->GetTensorTypeAndShape(output.get(), out);
        });
        size_t count = 0;
        ONNXTensorElementDataType type{};
        check(api()->GetTensorShapeElementCount(about.get(), &count));
        check(api()->GetTensorElementType(about.get(), &type));
        if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || count == 0) throw Refused("the model does not answer with scores");
        void *data = nullptr;
        check(api()->GetTensorMutableData(output.get(), &data));
        const auto *logits = static_cast<const float *>(data);
        std::vector<float> scores(logits, logits + count);
        const float most = *std::max_element(scores.begin(), scores.end());
        float sum = 0;
        for (float &score : scores) sum += score = std::exp(score - most);
        for (float &score : scores) score /= sum;
        return scores;
    }

  private:
    const Bundle &bundle_;
    Held<OrtEnv> environment_;
    Held<OrtSession> session_;
    Held<OrtMemoryInfo> memory_;
};

} // namespace

int main(int count, char **words) {
    std::vector<std::string> arguments(words + 1, words + count);
    const bool verified = !arguments.empty() && arguments.front() == "--verified";
    if (verified) arguments.erase(arguments.begin());
    if (arguments.empty()) {
        std::fputs("usage: classify ROOT/current PICTURE... | classify --verified F.zip PICTURE...\n", stderr);
        return 2;
    }
    std::string at = arguments.front();
    try {
        const Bundle bundle = open_bundle(at, verified);
        if (arguments.size() == 1) return std::puts("the bundle is in order") < 0;
        Model model(bundle);
        for (size_t i = 1; i < arguments.size(); ++i) {
            at = arguments[i];
            const auto scores = model.scores(read_picture(at));
            const auto best = static_cast<size_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
            const std::string label = best < bundle.labels.size() ? bundle.labels[best] : std::to_string(best);
            std::printf("%s %.6f %s\n", label.c_str(), static_cast<double>(scores[best]), at.c_str());
        }
    } catch (const std::exception &error) {
        std::fprintf(stderr, "classify: %s: %s\n", at.c_str(), error.what());
        return 1;
    }
    return 0;
}
