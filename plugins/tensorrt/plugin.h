// What the library's plugins share: errors through TensorRT's logger, attributes read from a node's fields, a plugin's
// life, its creator, and its registration when the library is loaded. IPluginV2DynamicExt is the interface that
// TensorRT 8.6, 9.x and 10.x share. Names come as macros from the ops' definitions in Python.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "plugins/kernels/pascalvl.h"
#include "plugins/tensorrt/interface.h"

// Of TensorRT's library, which is loaded before this one.
extern "C" __attribute__((weak)) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;
extern "C" __attribute__((weak)) nvinfer1::ILogger* getLogger() noexcept;

namespace pascalvl {
namespace {

using namespace nvinfer1;

void report(const char* op, const std::string& message) noexcept {
  const std::string text = std::string(op) + ": " + message;
  ILogger* logger = getLogger ? getLogger() : nullptr;
  if (logger) {
    logger->log(ILogger::Severity::kERROR, text.c_str());
  } else {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
}

// Runs what may throw; reports that, and returns `otherwise`.
template <typename Result, typename Work>
Result guarded(const char* op, Result otherwise, Work work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    report(op, error.what());
  }
  return otherwise;
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// Of a call of the kernels' library: its own sentence, where it failed.
void check(int status) {
  if (status != PASCALVL_OK) throw std::runtime_error(pascalvl_last_error());
}

[[maybe_unused]] std::string text(const Dims& dims) {
  std::string result = "[";
  for (int i = 0; i < dims.nbDims; ++i) result += (i ? ", " : "") + std::to_string(dims.d[i]);
  return result + "]";
}

// The attributes of a node.
class Fields {
 public:
  explicit Fields(const PluginFieldCollection& collection) : collection_(collection) {}

  // One number of `type`, whose name is `words`; false where there is no such attribute.
  template <typename Number>
  bool read(const char* name, PluginFieldType type, const char* words, Number& number) const {
    const PluginField* field = find(name);
    if (!field) return false;
    require(field->data && field->type == type && field->length >= 1,
            std::string("attribute ") + name + " must be one " + words);
    std::memcpy(&number, field->data, sizeof number);
    return true;
  }
  bool read(const char* name, int32_t& number) const { return read(name, PluginFieldType::kINT32, "int32", number); }
  bool read(const char* name, float& number) const { return read(name, PluginFieldType::kFLOAT32, "float32", number); }
  // A text; an empty one may come without data.
  bool read(const char* name, std::string& value) const {
    const PluginField* field = find(name);
    if (!field) return false;
    require(field->type == PluginFieldType::kCHAR && field->length >= 0,
            std::string("attribute ") + name + " must be a text");
    const auto* characters = static_cast<const char*>(field->data);
    value = field->data ? std::string(characters, strnlen(characters, field->length)) : "";
    return true;
  }

 private:
  const PluginField* find(const char* name) const {
    for (int32_t i = 0; i < collection_.nbFields; ++i) {
      if (collection_.fields[i].name && !std::strcmp(collection_.fields[i].name, name)) return &collection_.fields[i];
    }
    return nullptr;
  }

  const PluginFieldCollection& collection_;
};

// A plugin's life. `Op` is the plugin's class: it has kName, kVersion, and Attributes, a struct without padding that
// begins with the members magic and layout, is what a serialised plugin consists of, and is made by Op::parse from
// Fields; Op::validate throws where they are out of range.
template <typename Op, typename Attributes>
class Plugin : public IPluginV2DynamicExt {
 public:
  explicit Plugin(const Attributes& attributes) : attributes_(attributes) {}

  const AsciiChar* getPluginType() const noexcept override { return Op::kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return Op::kVersion; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  // Loads the kernels: that cannot be done while a CUDA graph is captured.
  int32_t initialize() noexcept override {
    return guarded<int32_t>(Op::kName, 1, [] { return check(pascalvl_load()), 0; });
  }
  void terminate() noexcept override {}
  size_t getSerializationSize() const noexcept override { return sizeof attributes_; }
  void serialize(void* buffer) const noexcept override { std::memcpy(buffer, &attributes_, sizeof attributes_); }
  void destroy() noexcept override { delete this; }
  void setPluginNamespace(const AsciiChar* name) noexcept override {
    guarded(Op::kName, 0, [&] { return namespace_ = name ? name : "", 0; });
  }
  const AsciiChar* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  IPluginV2DynamicExt* clone() const noexcept override {
    return guarded<IPluginV2DynamicExt*>(Op::kName, nullptr, [&] {
      auto copy = std::make_unique<Op>(attributes_);
      copy->setPluginNamespace(namespace_.c_str());
      copy->has_workspace_ = has_workspace_;
      return copy.release();
    });
  }

  // One that cannot be told is no workspace of 0: then nothing runs.
  size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t, const PluginTensorDesc*,
                          int32_t) const noexcept final {
    has_workspace_ = false;
    return guarded<size_t>(Op::kName, 0, [&] {
      const size_t bytes = static_cast<const Op*>(this)->workspace_bytes(inputs);
      has_workspace_ = true;
      return bytes;
    });
  }

  DataType getOutputDataType(int32_t, const DataType*, int32_t) const noexcept override { return DataType::kFLOAT; }
  void configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                       int32_t) noexcept override {}

 protected:
  // supportsFormatCombination, where the plugin takes so many inputs and the tensor asked for should have a type.
  bool supports(const PluginTensorDesc& tensor, DataType type, int32_t num_inputs, int32_t expected,
                int32_t num_outputs) const noexcept {
    if (num_inputs != expected || num_outputs != this->getNbOutputs()) {
      report(Op::kName, "found " + std::to_string(num_inputs) + " inputs and " + std::to_string(num_outputs) +
                            " outputs; expected " + std::to_string(expected) + " and " +
                            std::to_string(this->getNbOutputs()));
      return false;
    }
    return tensor.type == type && tensor.format == TensorFormat::kLINEAR;
  }

  void require_workspace() const {
    require(has_workspace_, "it could not tell the workspace that it needs, see above");
  }

  Attributes attributes_;

 private:
  std::string namespace_;
  mutable bool has_workspace_ = true;  // what an engine was built with was told at its build
};

template <typename Op>
class Creator final : public IPluginCreator {
 public:
  const AsciiChar* getPluginName() const noexcept override { return Op::kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return Op::kVersion; }
  const PluginFieldCollection* getFieldNames() noexcept override {
    static const PluginFieldCollection collection{sizeof Op::kFields / sizeof Op::kFields[0], Op::kFields};
    return &collection;
  }
  IPluginV2* createPlugin(const AsciiChar*, const PluginFieldCollection* fields) noexcept override {
    return make([&] {
      require(fields, "the attributes are a null pointer");
      return Op::parse(Fields(*fields));
    });
  }
  IPluginV2* deserializePlugin(const AsciiChar*, const void* data, size_t length) noexcept override {
    return make([&] { return read(data, length); });
  }
  void setPluginNamespace(const AsciiChar* name) noexcept override {
    guarded(Op::kName, 0, [&] { return namespace_ = name ? name : "", 0; });
  }
  const AsciiChar* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  static auto read(const void* data, size_t length) {
    typename Op::Attributes attributes;
    const typename Op::Attributes expected;
    require(data && length == sizeof attributes, "a serialised plugin of " + std::to_string(length) +
                                                     " bytes; expected " + std::to_string(sizeof attributes) +
                                                     ": build the engine again");
    std::memcpy(&attributes, data, length);
    require(attributes.magic == expected.magic, "the serialised plugin is not this one's: build the engine again");
    require(attributes.layout == expected.layout,
            "the serialised plugin has layout " + std::to_string(attributes.layout) + "; expected " +
                std::to_string(expected.layout) + ": build the engine with this version of the plugin");
    Op::validate(attributes);
    return attributes;
  }

  template <typename Parse>
  IPluginV2* make(Parse parse) noexcept {
    return guarded<IPluginV2*>(Op::kName, nullptr, [&] {
      auto plugin = std::make_unique<Op>(parse());
      plugin->setPluginNamespace(namespace_.c_str());
      return plugin.release();
    });
  }

  std::string namespace_;
};

// TensorRT's parsers look a node up without its domain: the namespace is empty.
template <typename Op>
struct Registration {
  Registration() {
    if (!getPluginRegistry) return;  // without TensorRT: nothing to register with
    if (!getPluginRegistry()->registerCreator(creator, "")) report(Op::kName, "TensorRT did not take the creator");
  }
  Creator<Op> creator;
};

}  // namespace
}  // namespace pascalvl
