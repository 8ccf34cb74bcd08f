// The part of TensorRT's plugin interface that the plugins use: TensorRT's own headers where there are some
// (PASCALVL_TENSORRT_HEADERS), else these declarations, whose layout in memory is the same. PASCALVL_TENSORRT_MAJOR is
// 8 (for 8.6 and 9.x) or 10. Names, order and signatures of virtual functions are the interface; nothing here may move.
#pragma once

#ifdef PASCALVL_TENSORRT_HEADERS

#include <NvInferRuntime.h>

#else

#include <cstddef>
#include <cstdint>

struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudnnContext;
struct cublasContext;

namespace nvinfer1 {

#if PASCALVL_TENSORRT_MAJOR == 10
using Extent = int64_t;
constexpr int32_t kVersion = 100000;
#else
using Extent = int32_t;
constexpr int32_t kVersion = 8600;
#endif
using AsciiChar = char;

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3 };
enum class TensorFormat : int32_t { kLINEAR = 0 };
using PluginFormat = TensorFormat;
enum class PluginFieldType : int32_t { kFLOAT32 = 1, kINT32 = 5, kCHAR = 6 };

struct Dims {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  Extent d[MAX_DIMS];
};

class IDimensionExpr;
class IGpuAllocator;

namespace apiv {

struct VRoot {
  virtual ~VRoot() noexcept = default;
};

// Only its first function is used.
class VExprBuilder : public VRoot {
 public:
  virtual const IDimensionExpr* constant(Extent value) = 0;
};

}  // namespace apiv

class IExprBuilder {
 public:
  const IDimensionExpr* constant(Extent value) noexcept { return mImpl->constant(value); }

 protected:
  apiv::VExprBuilder* mImpl;
  virtual ~IExprBuilder() noexcept = default;
};

struct DimsExprs {
  int32_t nbDims;
  const IDimensionExpr* d[Dims::MAX_DIMS];
};

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};

struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min;
  Dims max;
#if PASCALVL_TENSORRT_MAJOR == 10
  Dims opt;
#endif
};

struct PluginField {
  const AsciiChar* name;
  const void* data;
  PluginFieldType type;
  int32_t length;
  PluginField(const AsciiChar* name = nullptr, const void* data = nullptr, PluginFieldType type = {},
              int32_t length = 0) noexcept
      : name(name), data(data), type(type), length(length) {}
};

struct PluginFieldCollection {
  int32_t nbFields;
  const PluginField* fields;
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1 };
  virtual void log(Severity severity, const AsciiChar* message) noexcept = 0;
  virtual ~ILogger() = default;
};

class IPluginV2 {
 public:
  virtual int32_t getTensorRTVersion() const noexcept = 0;
  virtual const AsciiChar* getPluginType() const noexcept = 0;
  virtual const AsciiChar* getPluginVersion() const noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual Dims getOutputDimensions(int32_t index, const Dims* inputs, int32_t count) noexcept = 0;
  virtual bool supportsFormat(DataType type, PluginFormat format) const noexcept = 0;
  virtual void configureWithFormat(const Dims* inputs, int32_t num_inputs, const Dims* outputs, int32_t num_outputs,
                                   DataType type, PluginFormat format, int32_t max_batch) noexcept = 0;
  virtual int32_t initialize() noexcept = 0;
  virtual void terminate() noexcept = 0;
  virtual size_t getWorkspaceSize(int32_t max_batch) const noexcept = 0;
  virtual int32_t enqueue(int32_t batch, const void* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept = 0;
  virtual size_t getSerializationSize() const noexcept = 0;
  virtual void serialize(void* buffer) const noexcept = 0;
  virtual void destroy() noexcept = 0;
  virtual IPluginV2* clone() const noexcept = 0;
  virtual void setPluginNamespace(const AsciiChar* name) noexcept = 0;
  virtual const AsciiChar* getPluginNamespace() const noexcept = 0;
  virtual ~IPluginV2() noexcept = default;
};

class IPluginV2Ext : public IPluginV2 {
 public:
  virtual DataType getOutputDataType(int32_t index, const DataType* types, int32_t count) const noexcept = 0;
  virtual bool isOutputBroadcastAcrossBatch(int32_t index, const bool* broadcast, int32_t count) const noexcept = 0;
  virtual bool canBroadcastInputAcrossBatch(int32_t index) const noexcept = 0;
  virtual void configurePlugin(const Dims* inputs, int32_t num_inputs, const Dims* outputs, int32_t num_outputs,
                               const DataType* input_types, const DataType* output_types, const bool* input_broadcast,
                               const bool* output_broadcast, PluginFormat format, int32_t max_batch) noexcept = 0;
  virtual void attachToContext(cudnnContext*, cublasContext*, IGpuAllocator*) noexcept {}
  virtual void detachFromContext() noexcept {}
  IPluginV2Ext* clone() const noexcept override = 0;

 protected:
  void configureWithFormat(const Dims*, int32_t, const Dims*, int32_t, DataType, PluginFormat,
                           int32_t) noexcept override {}
};

// What it inherits and does not use is answered here, once for all.
class IPluginV2DynamicExt : public IPluginV2Ext {
 public:
  IPluginV2DynamicExt* clone() const noexcept override = 0;
  virtual DimsExprs getOutputDimensions(int32_t index, const DimsExprs* inputs, int32_t count,
                                        IExprBuilder& builder) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t num_inputs,
                                         int32_t num_outputs) noexcept = 0;
  virtual void configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                               const DynamicPluginTensorDesc* outputs, int32_t num_outputs) noexcept = 0;
  virtual size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t num_inputs, const PluginTensorDesc* outputs,
                                  int32_t num_outputs) const noexcept = 0;
  virtual int32_t enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc* output_descriptions,
                          const void* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept = 0;

 protected:
  static constexpr int32_t kKind = 3;  // in the upper byte of the version
  int32_t getTensorRTVersion() const noexcept override { return kKind << 24 | kVersion; }

 private:
  void configurePlugin(const Dims*, int32_t, const Dims*, int32_t, const DataType*, const DataType*, const bool*,
                       const bool*, PluginFormat, int32_t) noexcept final {}
  bool supportsFormat(DataType, PluginFormat) const noexcept final { return false; }
  Dims getOutputDimensions(int32_t, const Dims*, int32_t) noexcept final { return Dims{-1, {}}; }
  bool isOutputBroadcastAcrossBatch(int32_t, const bool*, int32_t) const noexcept final { return false; }
  bool canBroadcastInputAcrossBatch(int32_t) const noexcept final { return true; }
  size_t getWorkspaceSize(int32_t) const noexcept final { return 0; }
  int32_t enqueue(int32_t, const void* const*, void* const*, void*, cudaStream_t) noexcept final { return 1; }
};

#if PASCALVL_TENSORRT_MAJOR == 10
enum class APILanguage : int32_t { kCPP = 0 };

struct InterfaceInfo {
  const char* kind;
  int32_t major;
  int32_t minor;
};

class IVersionedInterface {
 public:
  virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
  virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
  virtual ~IVersionedInterface() noexcept = default;
};

class IPluginCreator : public IVersionedInterface {
 public:
#else
class IPluginCreator {
 public:
  virtual int32_t getTensorRTVersion() const noexcept { return kVersion; }
#endif
  virtual const AsciiChar* getPluginName() const noexcept = 0;
  virtual const AsciiChar* getPluginVersion() const noexcept = 0;
  virtual const PluginFieldCollection* getFieldNames() noexcept = 0;
  virtual IPluginV2* createPlugin(const AsciiChar* name, const PluginFieldCollection* fields) noexcept = 0;
  virtual IPluginV2* deserializePlugin(const AsciiChar* name, const void* data, size_t length) noexcept = 0;
  virtual void setPluginNamespace(const AsciiChar* name) noexcept = 0;
  virtual const AsciiChar* getPluginNamespace() const noexcept = 0;
#if PASCALVL_TENSORRT_MAJOR == 10
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V1", 1, 0}; }
#else
  virtual ~IPluginCreator() = default;
#endif
};

// Only its first function is used.
class IPluginRegistry {
 public:
  virtual bool registerCreator(IPluginCreator& creator, const AsciiChar* name_space) noexcept = 0;
};

}  // namespace nvinfer1

#endif
