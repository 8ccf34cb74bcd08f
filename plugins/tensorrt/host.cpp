// Drives a plugin as TensorRT does, without TensorRT: a registry and a logger of its own, which a plugin's library that
// is loaded afterwards finds, and a node's life (create, serialise, deserialise, initialise, clone, configure, enqueue)
// behind C functions. It sees the plugin through TensorRT's interface alone.
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "plugins/tensorrt/interface.h"

// A tensor: its type by TensorRT's numbers, and its sizes.
struct pascalvl_host_tensor {
  int32_t type;
  int32_t num_dims;
  int64_t dims[nvinfer1::Dims::MAX_DIMS];
};

namespace pascalvl {
namespace {

using namespace nvinfer1;

thread_local std::string messages;  // of the plugin, and of what failed here

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

template <typename Work>
int guarded(Work work) noexcept {
  try {
    messages.clear();
    work();
    return 0;
  } catch (const std::exception& error) {
    messages += error.what();
    return 1;
  }
}

class Logger final : public ILogger {
 public:
  void log(Severity, const AsciiChar* message) noexcept override { messages += std::string(message) + ". "; }
};

class Registry final : public IPluginRegistry {
 public:
  bool registerCreator(IPluginCreator& creator, const AsciiChar*) noexcept override {
    creators.push_back(&creator);
    return true;
  }
  std::vector<IPluginCreator*> creators;
};

Registry registry;
Logger logger;

struct Destroy {
  void operator()(IPluginV2* plugin) const { plugin->destroy(); }
};
using Owned = std::unique_ptr<IPluginV2DynamicExt, Destroy>;

Owned owned(IPluginV2* plugin, const char* doing) {
  require(plugin, std::string("the plugin's creator did not ") + doing);
  return Owned(static_cast<IPluginV2DynamicExt*>(plugin));
}

// The plugin of an engine, and its clone in an execution context.
struct Node {
  Owned engine, context;

  ~Node() {
    context->detachFromContext();
    engine->terminate();
  }
};

PluginTensorDesc description(const pascalvl_host_tensor& tensor) {
  PluginTensorDesc result{};
  result.dims.nbDims = tensor.num_dims;
  for (int i = 0; i < tensor.num_dims; ++i) result.dims.d[i] = Extent(tensor.dims[i]);
  result.type = DataType(tensor.type);
  result.format = TensorFormat::kLINEAR;
  result.scale = 1;
  return result;
}

std::vector<PluginTensorDesc> descriptions(const pascalvl_host_tensor* tensors, int32_t count) {
  std::vector<PluginTensorDesc> result;
  for (int32_t i = 0; i < count; ++i) result.push_back(description(tensors[i]));
  return result;
}

// A size is an expression of the builder's: here a pointer to the number.
class Numbers final : public apiv::VExprBuilder {
 public:
  const IDimensionExpr* constant(Extent value) override {
    values_.push_back(value);
    return reinterpret_cast<const IDimensionExpr*>(&values_.back());
  }

 private:
  std::deque<int64_t> values_;  // which stay where they are
};

class Builder final : public IExprBuilder {
 public:
  Builder() { mImpl = &numbers_; }
  ~Builder() noexcept override = default;

 private:
  Numbers numbers_;
};

DynamicPluginTensorDesc exactly(const PluginTensorDesc& tensor) {
  DynamicPluginTensorDesc result{};
  result.desc = tensor;
  result.min = result.max = tensor.dims;
#if PASCALVL_TENSORRT_MAJOR == 10
  result.opt = tensor.dims;
#endif
  return result;
}

}  // namespace
}  // namespace pascalvl

using namespace pascalvl;

extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
extern "C" nvinfer1::ILogger* getLogger() noexcept { return &logger; }

extern "C" {

const char* pascalvl_host_messages() { return messages.c_str(); }

// Makes a node of a plugin, and tells how many outputs it has: what a parser, a build and the loading of an engine do
// to it, in turn.
int pascalvl_host_create(const char* name, const char* version, const char* const* names, const void* const* data,
                         const int32_t* types, const int32_t* lengths, int32_t count, void** node,
                         int32_t* num_outputs) {
  return guarded([&] {
    IPluginCreator* creator = nullptr;
    for (IPluginCreator* candidate : registry.creators) {
      if (!std::strcmp(candidate->getPluginName(), name) && !std::strcmp(candidate->getPluginVersion(), version)) {
        creator = candidate;
      }
    }
    require(creator, std::string("there is no plugin ") + name + " version " + version);
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < count; ++i) fields.emplace_back(names[i], data[i], PluginFieldType(types[i]), lengths[i]);
    const PluginFieldCollection collection{count, fields.data()};
    const Owned parsed = owned(creator->createPlugin("node", &collection), "take the attributes");
    const Owned built = owned(parsed->clone(), "clone");
    std::vector<char> bytes(built->getSerializationSize());
    built->serialize(bytes.data());
    auto made = std::make_unique<Node>();
    made->engine = owned(creator->deserializePlugin("node", bytes.data(), bytes.size()), "take its own bytes");
    made->context = owned(made->engine->clone(), "clone");
    require(made->engine->initialize() == 0, "the plugin could not be initialised");
    made->context->attachToContext(nullptr, nullptr, nullptr);
    *num_outputs = made->context->getNbOutputs();
    *node = made.release();
  });
}

void pascalvl_host_destroy(void* node) { delete static_cast<Node*>(node); }

// Asks the plugin for its outputs and its workspace with inputs of these sizes, and configures it for them.
int pascalvl_host_prepare(void* node, const pascalvl_host_tensor* inputs, int32_t count, pascalvl_host_tensor* outputs,
                          size_t* workspace) {
  return guarded([&] {
    IPluginV2DynamicExt& plugin = *static_cast<Node*>(node)->context;
    const int32_t num_outputs = plugin.getNbOutputs();
    std::vector<PluginTensorDesc> tensors = descriptions(inputs, count);
    std::vector<DimsExprs> sizes(count);
    for (int32_t i = 0; i < count; ++i) {
      sizes[i].nbDims = inputs[i].num_dims;
      for (int d = 0; d < inputs[i].num_dims; ++d) {
        sizes[i].d[d] = reinterpret_cast<const IDimensionExpr*>(&inputs[i].dims[d]);
      }
    }
    std::vector<DataType> types;
    for (const PluginTensorDesc& tensor : tensors) types.push_back(tensor.type);
    Builder builder;
    for (int32_t i = 0; i < num_outputs; ++i) {
      pascalvl_host_tensor& output = outputs[i];
      const DimsExprs found = plugin.getOutputDimensions(i, sizes.data(), count, builder);
      output.type = int32_t(plugin.getOutputDataType(i, types.data(), count));
      output.num_dims = found.nbDims;
      for (int d = 0; d < found.nbDims; ++d) output.dims[d] = *reinterpret_cast<const int64_t*>(found.d[d]);
      tensors.push_back(description(output));
    }
    for (int32_t i = 0; i < count + num_outputs; ++i) {
      require(plugin.supportsFormatCombination(i, tensors.data(), count, num_outputs),
              "the plugin does not take tensor number " + std::to_string(i) + " of its " + std::to_string(count) +
                  " inputs and " + std::to_string(num_outputs) + (num_outputs == 1 ? " output" : " outputs"));
    }
    std::vector<DynamicPluginTensorDesc> ranges;
    for (const PluginTensorDesc& tensor : tensors) ranges.push_back(exactly(tensor));
    plugin.configurePlugin(ranges.data(), count, &ranges[count], num_outputs);
    *workspace = plugin.getWorkspaceSize(tensors.data(), count, &tensors[count], num_outputs);
  });
}

// Runs the plugin; pointers are to the memory that its library computes on.
int pascalvl_host_enqueue(void* node, const pascalvl_host_tensor* inputs, int32_t count,
                          const pascalvl_host_tensor* outputs, const void* const* input_pointers,
                          void* const* output_pointers, void* workspace, void* stream) {
  return guarded([&] {
    IPluginV2DynamicExt& plugin = *static_cast<Node*>(node)->context;
    const std::vector<PluginTensorDesc> tensors = descriptions(inputs, count);
    const std::vector<PluginTensorDesc> results = descriptions(outputs, plugin.getNbOutputs());
    const int32_t status = plugin.enqueue(tensors.data(), results.data(), input_pointers, output_pointers, workspace,
                                          static_cast<cudaStream_t>(stream));
    require(status == 0, "the plugin returned status " + std::to_string(status));
  });
}

}  // extern "C"
