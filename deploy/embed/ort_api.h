// Declarations of ONNX Runtime's C API, version 1, as far as this example calls it. No package that this repository builds with
// carries ONNX Runtime's own header; these are the same names and types at the same places. Version 1 of the table has 102
// pointers and can no longer change: ONNX Runtime asserts so where it builds. Its own header, where the compiler finds one, wins.
#pragma once

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#define EMBED_ORT_API ORT_API_VERSION
#else
#include <cstddef>
#include <cstdint>
#define EMBED_ORT_API 1

extern "C" {
struct OrtEnv;
struct OrtStatus;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtMemoryInfo;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 };
enum OrtAllocatorType { OrtDeviceAllocator = 0 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1 };

struct OrtApi {
    void *before_message[2];
    const char *(*GetErrorMessage)(const OrtStatus *);
    OrtStatus *(*CreateEnv)(OrtLoggingLevel, const char *, OrtEnv **);
    void *before_session[4];
    OrtStatus *(*CreateSessionFromArray)(const OrtEnv *, const void *, size_t, const OrtSessionOptions *, OrtSession **);
    OrtStatus *(*Run)(OrtSession *, const OrtRunOptions *, const char *const *, const OrtValue *const *, size_t,
                      const char *const *, size_t, OrtValue **);
    OrtStatus *(*CreateSessionOptions)(OrtSessionOptions **);
    void *before_threads[13];
    OrtStatus *(*SetIntraOpNumThreads)(OrtSessionOptions *, int);
    void *before_tensor[24];
    OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *, size_t, const int64_t *, size_t,
                                                 ONNXTensorElementDataType, OrtValue **);
    void *before_data[1];
    OrtStatus *(*GetTensorMutableData)(OrtValue *, void **);
    void *before_type[8];
    OrtStatus *(*GetTensorElementType)(const OrtTensorTypeAndShapeInfo *, ONNXTensorElementDataType *);
    void *before_count[3];
    OrtStatus *(*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo *, size_t *);
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorTypeAndShapeInfo **);
    void *before_memory[3];
    OrtStatus *(*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo **);
    void *before_release[22];
    void (*ReleaseEnv)(OrtEnv *);
    void (*ReleaseStatus)(OrtStatus *);
    void (*ReleaseMemoryInfo)(OrtMemoryInfo *);
    void (*ReleaseSession)(OrtSession *);
    void (*ReleaseValue)(OrtValue *);
    void *before_shape[2];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *);
    void (*ReleaseSessionOptions)(OrtSessionOptions *);
    void *last[1];
};

struct OrtApiBase {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)();
};

const OrtApiBase *OrtGetApiBase();
}

static_assert(sizeof(OrtApi) == 102 * sizeof(void *), "version 1 of the table");
static_assert(offsetof(OrtApi, CreateSessionFromArray) == 8 * sizeof(void *), "as in onnxruntime_c_api.h");
static_assert(offsetof(OrtApi, SetIntraOpNumThreads) == 24 * sizeof(void *), "as in onnxruntime_c_api.h");
static_assert(offsetof(OrtApi, CreateTensorWithDataAsOrtValue) == 49 * sizeof(void *), "as in onnxruntime_c_api.h");
static_assert(offsetof(OrtApi, GetTensorTypeAndShape) == 65 * sizeof(void *), "as in onnxruntime_c_api.h");
static_assert(offsetof(OrtApi, CreateCpuMemoryInfo) == 69 * sizeof(void *), "as in onnxruntime_c_api.h");
static_assert(offsetof(OrtApi, ReleaseEnv) == 92 * sizeof(void *), "as in onnxruntime_c_api.h");
#endif
