// FlashAttention2 as a TensorRT plugin: IPluginV2DynamicExt, which TensorRT 8.6, 9.x and 10.x share, over the kernels'
// C ABI. The library registers itself when it is loaded. What the op is: plugins/flash_attention.py, from where its
// names come as macros; so do the cache's formats, from plugins/kv_format.py.
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "plugins/kernels/params.h"
#include "plugins/kernels/pascalvl.h"
#include "plugins/tensorrt/interface.h"

// Of TensorRT's library, which is loaded before this one.
extern "C" __attribute__((weak)) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;
extern "C" __attribute__((weak)) nvinfer1::ILogger* getLogger() noexcept;

namespace pascalvl {
namespace {

using namespace nvinfer1;

void report(const std::string& message) noexcept {
  const std::string text = PASCALVL_OP_NAME ": " + message;
  ILogger* logger = getLogger ? getLogger() : nullptr;
  if (logger) {
    logger->log(ILogger::Severity::kERROR, text.c_str());
  } else {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
}

// Runs what may throw; reports that, and returns `otherwise`.
template <typename Result, typename Work>
Result guarded(Result otherwise, Work work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    report(error.what());
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

std::string text(const Dims& dims) {
  std::string result = "[";
  for (int i = 0; i < dims.nbDims; ++i) result += (i ? ", " : "") + std::to_string(dims.d[i]);
  return result + "]";
}

// A cache's format: its name, and how the rows of keys and of values are stored.
struct KVFormat {
  const char* name;
  int32_t rows[2];
};
constexpr KVFormat kFormats[] = {PASCALVL_KV_FORMATS};
constexpr int32_t kNumFormats = int32_t(std::size(kFormats));

// What a node's attributes say, and whether it has inputs of recent tokens: TensorRT tells that a build alone. Also the
// bytes of a serialised plugin.
struct Attributes {
  static constexpr uint32_t kMagic = 0x41465650;  // "PVFA"
  static constexpr uint32_t kLayout = 2;
  uint32_t magic = kMagic;
  uint32_t layout = kLayout;
  int32_t causal = 0;
  float softmax_scale = 0;
  int32_t kv_format = 0;  // index of kFormats; only where causal
  int32_t recent = 0;
};
static_assert(sizeof(Attributes) == 24, "no padding is written");

int32_t parse_kv_format(const std::string& name) {
  std::string known;
  for (int32_t i = 0; i < kNumFormats; ++i) {
    if (name == kFormats[i].name) return i;
    known += std::string(i == 0 ? "" : i + 1 < kNumFormats ? ", " : " or ") + kFormats[i].name;
  }
  throw std::invalid_argument("attribute " PASCALVL_ATTR_KV_FORMAT " is '" + name + "'; expected " + known);
}

Attributes parse_fields(const PluginFieldCollection& collection) {
  Attributes attributes;
  bool has_scale = false;
  std::string kv_format;
  for (int32_t i = 0; i < collection.nbFields; ++i) {
    const PluginField& field = collection.fields[i];
    const std::string name = field.name ? field.name : "";
    const auto expect = [&](PluginFieldType type, const char* words) {
      require(field.data && field.type == type && field.length >= 1, "attribute " + name + " must be " + words);
    };
    if (name == PASCALVL_ATTR_CAUSAL) {
      expect(PluginFieldType::kINT32, "one int32");
      std::memcpy(&attributes.causal, field.data, sizeof attributes.causal);
      require(attributes.causal == 0 || attributes.causal == 1,
              "attribute " + name + " is " + std::to_string(attributes.causal) + "; expected 0 or 1");
    } else if (name == PASCALVL_ATTR_SOFTMAX_SCALE) {
      expect(PluginFieldType::kFLOAT32, "one float32");
      std::memcpy(&attributes.softmax_scale, field.data, sizeof attributes.softmax_scale);
      has_scale = true;
    } else if (name == PASCALVL_ATTR_KV_FORMAT) {
      // An empty text is what exported nodes have that read no cache; it may come without data.
      require(field.type == PluginFieldType::kCHAR && field.length >= 0, "attribute " + name + " must be a text");
      const auto* characters = static_cast<const char*>(field.data);
      kv_format = field.data ? std::string(characters, strnlen(characters, field.length)) : "";
    }
  }
  if (attributes.causal) attributes.kv_format = parse_kv_format(kv_format);
  require(has_scale, "attribute " PASCALVL_ATTR_SOFTMAX_SCALE " is missing");
  return attributes;
}

Attributes parse_bytes(const void* data, size_t length) {
  Attributes attributes;
  require(data && length == sizeof attributes, "a serialised plugin of " + std::to_string(length) +
                                                   " bytes; expected " + std::to_string(sizeof attributes) +
                                                   ": build the engine again");
  std::memcpy(&attributes, data, length);
  require(attributes.magic == Attributes::kMagic, "the serialised plugin is not this one's: build the engine again");
  require(attributes.layout == Attributes::kLayout,
          "the serialised plugin has layout " + std::to_string(attributes.layout) + "; expected " +
              std::to_string(Attributes::kLayout) + ": build the engine with this version of the plugin");
  const auto is_flag = [](int32_t value) { return value == 0 || value == 1; };
  require(is_flag(attributes.causal) && is_flag(attributes.recent) && attributes.kv_format >= 0 &&
              attributes.kv_format < kNumFormats,
          "the serialised plugin's attributes are out of range: build the engine again");
  return attributes;
}

// Inputs, in the node's order. kLengths: past_length, or cu_seqlens where not causal.
enum Input {
  kQuery,
  kKey,
  kValue,
  kLengths,
  kPastVisible,
  kPastKey,
  kPastValue,
  kPastScale,
  kRecentLength,
  kRecentKey,
  kRecentValue
};
constexpr int32_t kNumPacked = kLengths + 1, kNumPlain = kPastValue + 1, kNumQuantised = kPastScale + 1,
                  kNumWithRecent = kRecentValue + 1;

void expect_shape(const char* name, const Dims& found, std::initializer_list<int64_t> expected,
                  const char* or_else = "") {
  Dims dims{};
  for (const int64_t size : expected) dims.d[dims.nbDims++] = Extent(size);
  require(text(found) == text(dims),
          std::string(name) + " has shape " + text(found) + "; expected " + text(dims) + or_else);
}

class FlashAttention2 final : public IPluginV2DynamicExt {
 public:
  explicit FlashAttention2(const Attributes& attributes) : attributes_(attributes) {}

  const AsciiChar* getPluginType() const noexcept override { return PASCALVL_OP_NAME; }
  const AsciiChar* getPluginVersion() const noexcept override { return PASCALVL_OP_VERSION; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  // Loads the kernels: that cannot be done while a CUDA graph is captured.
  int32_t initialize() noexcept override {
    return guarded<int32_t>(1, [] { return check(pascalvl_load()), 0; });
  }
  void terminate() noexcept override {}
  size_t getSerializationSize() const noexcept override { return sizeof attributes_; }
  void serialize(void* buffer) const noexcept override { std::memcpy(buffer, &attributes_, sizeof attributes_); }
  void destroy() noexcept override { delete this; }
  void setPluginNamespace(const AsciiChar* name) noexcept override {
    guarded(0, [&] { return namespace_ = name ? name : "", 0; });
  }
  const AsciiChar* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  IPluginV2DynamicExt* clone() const noexcept override {
    return guarded<IPluginV2DynamicExt*>(nullptr, [&] {
      auto copy = std::make_unique<FlashAttention2>(attributes_);
      copy->namespace_ = namespace_;
      return copy.release();
    });
  }

  DataType getOutputDataType(int32_t, const DataType*, int32_t) const noexcept override { return DataType::kFLOAT; }

  // q [batch, num_heads, seq, head_dim] to [batch, seq, num_heads, value_dim].
  DimsExprs getOutputDimensions(int32_t, const DimsExprs* inputs, int32_t, IExprBuilder&) noexcept override {
    const DimsExprs &q = inputs[kQuery], &v = inputs[kValue];
    DimsExprs out{};
    out.nbDims = 4;
    out.d[0] = q.d[0], out.d[1] = q.d[2], out.d[2] = q.d[1], out.d[3] = v.d[3];
    return out;
  }

  bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    const int32_t least = !attributes_.causal ? kNumPacked : is_quantised() ? kNumQuantised : kNumPlain;
    const bool has_recent = is_quantised() && num_inputs == kNumWithRecent;
    if ((num_inputs != least && !has_recent) || num_outputs != 1) {
      report("found " + std::to_string(num_inputs) + " inputs and " + std::to_string(num_outputs) +
             " outputs; expected " + std::to_string(least) +
             (is_quantised() ? " or " + std::to_string(kNumWithRecent) : "") + " and 1");
      return false;
    }
    const DataType type = position < num_inputs ? input_type(position) : DataType::kFLOAT;
    return tensors[position].type == type && tensors[position].format == TensorFormat::kLINEAR;
  }

  void configurePlugin(const DynamicPluginTensorDesc*, int32_t num_inputs, const DynamicPluginTensorDesc*,
                       int32_t) noexcept override {
    attributes_.recent = num_inputs == kNumWithRecent;
  }

  // For these sizes, and for one new token: a profile for prompts takes those too, and decode needs other memory, with
  // a mask or without.
  size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t num_inputs, const PluginTensorDesc*,
                          int32_t) const noexcept override {
    return guarded<size_t>(0, [&] {
      pascalvl_attention_args args = sizes(inputs, num_inputs == kNumWithRecent);
      size_t most = 0;
      const auto count = [&] {
        size_t bytes = 0;
        check(pascalvl_attention_workspace(&args, &bytes));
        most = bytes > most ? bytes : most;
      };
      const int32_t* const recent = std::exchange(args.recent_length, nullptr);
      count();
      args.seq = 1;
      args.past_visible = nullptr;
      args.recent_length = recent;
      count();
      return most;
    });
  }

  int32_t enqueue(const PluginTensorDesc* descriptions, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guarded<int32_t>(1, [&] {
      pascalvl_attention_args args = sizes(descriptions, attributes_.recent);
      args.q = static_cast<const float*>(inputs[kQuery]);
      args.k = static_cast<const float*>(inputs[kKey]);
      args.v = static_cast<const float*>(inputs[kValue]);
      args.out = static_cast<float*>(outputs[0]);
      const auto* lengths = static_cast<const int32_t*>(inputs[kLengths]);
      if (args.causal) {
        args.past_length = lengths;
        if (args.past_visible) args.past_visible = static_cast<const int32_t*>(inputs[kPastVisible]);
        args.cache.key = const_cast<void*>(inputs[kPastKey]);
        args.cache.value = const_cast<void*>(inputs[kPastValue]);
        if (is_quantised()) {
          auto* scales = static_cast<uint16_t*>(const_cast<void*>(inputs[kPastScale]));
          args.cache.key_scale = scales;
          args.cache.value_scale = scales + int64_t(args.batch) * args.num_kv_heads * args.cache.capacity;
        }
        if (args.recent_length) {
          args.recent_length = static_cast<const int32_t*>(inputs[kRecentLength]);
          args.recent.key = const_cast<void*>(inputs[kRecentKey]);
          args.recent.value = const_cast<void*>(inputs[kRecentValue]);
        }
      } else {
        args.cu_seqlens = lengths;
      }
      size_t bytes = 0;
      check(pascalvl_attention_workspace(&args, &bytes));
      check(pascalvl_attention(&args, workspace, bytes, stream));
      return 0;
    });
  }

 private:
  bool is_quantised() const {
    return attributes_.causal && pascalvl::is_quantised(kFormats[attributes_.kv_format].rows[0]);
  }

  DataType input_type(int32_t position) const {
    switch (position) {
      case kLengths:
      case kPastVisible:
      case kRecentLength:
        return DataType::kINT32;
      case kPastKey:
      case kPastValue:
        return is_quantised()                                                         ? DataType::kINT32
               : kFormats[attributes_.kv_format].rows[0] == int32_t(PASCALVL_FLOAT16) ? DataType::kHALF
                                                                                      : DataType::kFLOAT;
      case kPastScale:
      case kRecentKey:
      case kRecentValue:
        return DataType::kHALF;
      default:
        return DataType::kFLOAT;
    }
  }

  // Elements of a cache's row, as the tensor that holds it has them: words, where they are codes.
  static int64_t row_elements(int32_t format, int32_t dim) {
    return row_bytes(format, dim) / (format == PASCALVL_FLOAT16 ? 2 : 4);
  }

  // The arguments of a call; for pointers, what is never read but looks like one.
  pascalvl_attention_args sizes(const PluginTensorDesc* inputs, bool recent) const {
    const Dims &q = inputs[kQuery].dims, &k = inputs[kKey].dims, &v = inputs[kValue].dims;
    for (const Dims* dims : {&q, &k, &v})
      require(dims->nbDims == 4, "q, k and v have 4 dimensions; found " + text(*dims));
    expect_shape("k", k, {q.d[0], k.d[1], q.d[2], q.d[3]});
    expect_shape("v", v, {q.d[0], k.d[1], q.d[2], v.d[3]});
    alignas(16) static char somewhere[16];
    const auto* values = reinterpret_cast<const float*>(somewhere);
    const auto* lengths = reinterpret_cast<const int32_t*>(somewhere);
    pascalvl_attention_args args{};
    args.q = args.k = args.v = values;
    args.out = reinterpret_cast<float*>(somewhere);
    args.batch = int32_t(q.d[0]);
    args.num_heads = int32_t(q.d[1]);
    args.num_kv_heads = int32_t(k.d[1]);
    args.seq = int32_t(q.d[2]);
    args.key_dim = int32_t(q.d[3]);
    args.value_dim = int32_t(v.d[3]);
    args.softmax_scale = attributes_.softmax_scale;
    args.causal = attributes_.causal;
    if (args.causal) {
      const auto& rows = kFormats[attributes_.kv_format].rows;
      const int64_t batch = args.batch, heads = args.num_kv_heads;
      const Dims &past = inputs[kPastKey].dims, &visible = inputs[kPastVisible].dims;
      require(past.nbDims == 4, "past_key has 4 dimensions; found " + text(past));
      const int64_t capacity = past.d[2];
      expect_shape("past_length", inputs[kLengths].dims, {batch});
      expect_shape("past_key", past, {batch, heads, capacity, row_elements(rows[0], args.key_dim)});
      expect_shape("past_value", inputs[kPastValue].dims,
                   {batch, heads, capacity, row_elements(rows[1], args.value_dim)});
      // One number for all slots is not looked at: it comes where all see all, and is at least the number of new
      // tokens.
      const bool is_mask = visible.nbDims != 2 || visible.d[1] != 1 || (capacity == 1 && !recent);
      if (is_mask) {
        expect_shape("past_visible", visible, {batch, capacity}, ", or 1 last for all slots alike");
      } else {
        expect_shape("past_visible", visible, {batch, 1});
      }
      args.past_length = lengths;
      args.past_visible = is_mask ? lengths : nullptr;
      args.cache.key = args.cache.value = somewhere;
      args.cache.key_format = rows[0];
      args.cache.value_format = rows[1];
      args.cache.capacity = int32_t(capacity);
      if (is_quantised()) {
        expect_shape("past_scale", inputs[kPastScale].dims, {2, batch, heads, capacity});
        args.cache.key_scale = args.cache.value_scale = somewhere;
        args.cache.rotated = args.key_dim == PASCALVL_ROTATED_DIM;
      }
      if (recent) {
        const Dims& key = inputs[kRecentKey].dims;
        require(key.nbDims == 4, "recent_key has 4 dimensions; found " + text(key));
        expect_shape("recent_length", inputs[kRecentLength].dims, {batch});
        expect_shape("recent_key", key, {batch, heads, key.d[2], args.key_dim});
        expect_shape("recent_value", inputs[kRecentValue].dims, {batch, heads, key.d[2], args.value_dim});
        args.recent_length = lengths;
        args.recent.key = args.recent.value = somewhere;
        args.recent.key_format = args.recent.value_format = PASCALVL_FLOAT16;
        args.recent.capacity = int32_t(key.d[2]);
      }
    } else {
      require(inputs[kLengths].dims.nbDims == 1, "cu_seqlens has 1 dimension; found " + text(inputs[kLengths].dims));
      args.cu_seqlens = lengths;
      args.num_sequences = int32_t(inputs[kLengths].dims.d[0]) - 1;
    }
    return args;
  }

  Attributes attributes_;
  std::string namespace_;
};

class Creator final : public IPluginCreator {
 public:
  const AsciiChar* getPluginName() const noexcept override { return PASCALVL_OP_NAME; }
  const AsciiChar* getPluginVersion() const noexcept override { return PASCALVL_OP_VERSION; }
  const PluginFieldCollection* getFieldNames() noexcept override {
    static const PluginField fields[] = {{PASCALVL_ATTR_CAUSAL, nullptr, PluginFieldType::kINT32, 1},
                                         {PASCALVL_ATTR_SOFTMAX_SCALE, nullptr, PluginFieldType::kFLOAT32, 1},
                                         {PASCALVL_ATTR_KV_FORMAT, nullptr, PluginFieldType::kCHAR, 1}};
    static const PluginFieldCollection collection{3, fields};
    return &collection;
  }
  IPluginV2* createPlugin(const AsciiChar*, const PluginFieldCollection* fields) noexcept override {
    return make([&] {
      require(fields, "the attributes are a null pointer");
      return parse_fields(*fields);
    });
  }
  IPluginV2* deserializePlugin(const AsciiChar*, const void* data, size_t length) noexcept override {
    return make([&] { return parse_bytes(data, length); });
  }
  void setPluginNamespace(const AsciiChar* name) noexcept override {
    guarded(0, [&] { return namespace_ = name ? name : "", 0; });
  }
  const AsciiChar* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  template <typename Parse>
  IPluginV2* make(Parse parse) noexcept {
    return guarded<IPluginV2*>(nullptr, [&] {
      auto plugin = std::make_unique<FlashAttention2>(parse());
      plugin->setPluginNamespace(namespace_.c_str());
      return plugin.release();
    });
  }

  std::string namespace_;
};

// TensorRT's parsers look a node up without its domain: the namespace is empty.
struct Registration {
  Registration() {
    if (!getPluginRegistry) return;  // without TensorRT: nothing to register with
    if (!getPluginRegistry()->registerCreator(creator, "")) report("TensorRT did not take the plugin's creator");
  }
  Creator creator;
} registration;

}  // namespace
}  // namespace pascalvl
