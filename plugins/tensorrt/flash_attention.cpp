// FlashAttention2 as a TensorRT plugin over the kernels' C ABI. What the op is: plugins/ops/flash_attention/op.py.
#include <algorithm>
#include <cmath>

#include "plugins/kernels/params.h"
#include "plugins/tensorrt/plugin.h"

namespace pascalvl {
namespace {

// The cache's formats.
struct KVFormat {
  const char* name;
  int32_t key, value;  // pascalvl_format
};
constexpr KVFormat kFormats[] = {PASCALVL_KV_FORMATS};
constexpr int32_t kNumFormats = sizeof kFormats / sizeof kFormats[0];

bool is_quantised(const KVFormat& format) { return format.key == PASCALVL_INT8 || format.key == PASCALVL_INT4; }

// Type of the tensors that rows of a format come in: of halves and codes, words.
DataType row_type(int32_t format) { return format == PASCALVL_FLOAT32 ? DataType::kFLOAT : DataType::kINT32; }

// What a node's attributes say; also the bytes of a serialised plugin.
struct Attributes {
  static constexpr uint32_t kMagic = 0x41465650;  // "PVFA"
  static constexpr uint32_t kLayout = 3;
  uint32_t magic = kMagic;
  uint32_t layout = kLayout;
  int32_t causal = 0;
  float softmax_scale = 0;
  int32_t kv_format = 0;  // number in kFormats; only where causal
};
static_assert(sizeof(Attributes) == 20, "no padding is written");

int32_t parse_kv_format(const std::string& name) {
  std::string known;
  for (int32_t i = 0; i < kNumFormats; ++i) {
    if (name == kFormats[i].name) return i;
    known += (i ? ", " : "") + std::string(kFormats[i].name);
  }
  throw std::invalid_argument("attribute " PASCALVL_ATTR_KV_FORMAT " is '" + name + "'; expected one of " + known);
}

// Inputs, in the node's order: those from kVisible on where causal, from kPastScale on as the cache has them.
enum Input { kQuery, kKey, kValue, kLengths, kVisible, kPastKey, kPastValue, kPastScale };

class FlashAttention2 final : public Plugin<FlashAttention2, Attributes> {
 public:
  using Attributes = pascalvl::Attributes;
  using Plugin::Plugin;
  static constexpr const char* kName = PASCALVL_OP_NAME;
  static constexpr const char* kVersion = PASCALVL_OP_VERSION;
  static inline const PluginField kFields[] = {{PASCALVL_ATTR_CAUSAL, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_ATTR_SOFTMAX_SCALE, nullptr, PluginFieldType::kFLOAT32, 1},
                                               {PASCALVL_ATTR_KV_FORMAT, nullptr, PluginFieldType::kCHAR, 1}};

  static Attributes parse(const Fields& fields) {
    Attributes attributes;
    std::string kv_format;  // an empty text is what exported nodes have that read no cache
    fields.read(PASCALVL_ATTR_CAUSAL, attributes.causal);
    fields.read(PASCALVL_ATTR_KV_FORMAT, kv_format);
    require(attributes.causal == 0 || attributes.causal == 1,
            "attribute " PASCALVL_ATTR_CAUSAL " is " + std::to_string(attributes.causal) + "; expected 0 or 1");
    if (attributes.causal) attributes.kv_format = parse_kv_format(kv_format);
    require(fields.read(PASCALVL_ATTR_SOFTMAX_SCALE, attributes.softmax_scale),
            "attribute " PASCALVL_ATTR_SOFTMAX_SCALE " is missing");
    validate(attributes);
    return attributes;
  }

  // What the kernels would refuse, in whatever bytes claim to be a plugin too.
  static void validate(const Attributes& a) {
    require((a.causal == 0 || a.causal == 1) && a.kv_format >= 0 && a.kv_format < (a.causal ? kNumFormats : 1),
            "the serialised plugin's attributes are out of range: build the engine again");
    require(std::fabs(a.softmax_scale) <= PASCALVL_MAX_SOFTMAX_SCALE,
            "attribute " PASCALVL_ATTR_SOFTMAX_SCALE " is " + std::to_string(a.softmax_scale) +
                "; expected a number of " + std::to_string(int(PASCALVL_MAX_SOFTMAX_SCALE)) + " at most");
  }

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
    const DataType type = position < num_inputs ? input_type(position) : DataType::kFLOAT;
    return supports(tensors[position], type, num_inputs, num_inputs_expected(), num_outputs);
  }

  // For these sizes and for all that a profile of them takes: one new token too, with which decode needs other memory
  // where there is no mask, and fewer tokens and sequences, whose past is cut into more splits.
  size_t workspace_bytes(const PluginTensorDesc* inputs) const {
    pascalvl_attention_args args = sizes(inputs);
    size_t most = 0;
    const auto count = [&] {
      size_t bytes = 0;
      check(pascalvl_attention_workspace(&args, &bytes));
      most = std::max(most, bytes);
    };
    count();
    if (!args.causal) return most;
    const int32_t* const visible = args.past_visible;
    // With the tokens of whole tiles the most is needed of all that make as many tiles.
    const int32_t of_tile = std::max(1, prefill_rows(args.value_dim) / (args.num_heads / args.num_kv_heads));
    for (const int32_t seq = args.seq; args.batch > 0; --args.batch) {
      args.past_visible = visible;
      for (args.seq = seq; args.seq > 0; args.seq = (args.seq - 1) / of_tile * of_tile) count();
      args.seq = 1, args.past_visible = nullptr;
      count();
    }
    return most;
  }

  int32_t enqueue(const PluginTensorDesc* descriptions, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guarded<int32_t>(kName, 1, [&] {
      pascalvl_attention_args args = sizes(descriptions);
      size_t bytes = 0;
      check(pascalvl_attention_workspace(&args, &bytes));  // before the sizes are multiplied here
      require_workspace();
      args.q = static_cast<const float*>(inputs[kQuery]);
      args.k = static_cast<const float*>(inputs[kKey]);
      args.v = static_cast<const float*>(inputs[kValue]);
      args.out = static_cast<float*>(outputs[0]);
      const auto* lengths = static_cast<const int32_t*>(inputs[kLengths]);
      if (args.causal) {
        args.past_length = lengths;
        if (args.past_visible) args.past_visible = static_cast<const int32_t*>(inputs[kVisible]);
        args.cache.key = const_cast<void*>(inputs[kPastKey]);
        args.cache.value = const_cast<void*>(inputs[kPastValue]);
        if (is_quantised(format())) {
          auto* scales = static_cast<uint16_t*>(const_cast<void*>(inputs[kPastScale]));
          args.cache.key_scale = scales;
          args.cache.value_scale = scales + int64_t(args.batch) * args.num_kv_heads * args.cache.capacity;
        }
      } else {
        args.cu_seqlens = lengths;
      }
      check(pascalvl_attention(&args, workspace, bytes, stream));
      return 0;
    });
  }

 private:
  const KVFormat& format() const { return kFormats[attributes_.kv_format]; }

  int32_t num_inputs_expected() const {
    if (!attributes_.causal) return kLengths + 1;
    return is_quantised(format()) ? kPastScale + 1 : kPastValue + 1;
  }

  DataType input_type(int32_t position) const {
    switch (position) {
      case kQuery:
      case kKey:
      case kValue:
        return DataType::kFLOAT;
      case kPastKey:
        return row_type(format().key);
      case kPastValue:
        return row_type(format().value);
      default:
        return DataType::kINT32;
    }
  }

  static void expect(const Dims& dims, const Dims& expected, const char* name, const char* or_else = "") {
    const bool same = dims.nbDims == expected.nbDims && std::equal(dims.d, dims.d + dims.nbDims, expected.d);
    require(same, std::string(name) + " has shape " + text(dims) + "; expected " + text(expected) + or_else);
  }

  // TensorRT 10 has sizes of 64 bits.
  static int32_t size(const Dims& dims, int32_t axis) {
    const auto result = int32_t(dims.d[axis]);
    require(result == dims.d[axis], "a tensor has shape " + text(dims) + "; expected sizes of 32 bits");
    return result;
  }

  // Elements of a row in its tensor's type: floats or words.
  static int32_t row_elements(int32_t format, int32_t dim) {
    return int32_t(pascalvl_row_bytes(format, dim) / sizeof(uint32_t));
  }

  // The arguments of a call; for pointers, what is never read but looks like one.
  pascalvl_attention_args sizes(const PluginTensorDesc* inputs) const {
    const Dims &q = inputs[kQuery].dims, &k = inputs[kKey].dims, &v = inputs[kValue].dims;
    for (const Dims* dims : {&q, &k, &v})
      require(dims->nbDims == 4, "q, k and v have 4 dimensions; found " + text(*dims));
    expect(k, {4, {q.d[0], k.d[1], q.d[2], q.d[3]}}, "k");
    expect(v, {4, {q.d[0], k.d[1], q.d[2], v.d[3]}}, "v");
    require(inputs[kLengths].dims.nbDims == 1,
            "past_length and cu_seqlens have 1 dimension; found " + text(inputs[kLengths].dims));
    alignas(16) static char somewhere[16];
    const auto* values = reinterpret_cast<const float*>(somewhere);
    const auto* lengths = reinterpret_cast<const int32_t*>(somewhere);
    pascalvl_attention_args args{};
    args.q = args.k = args.v = values;
    args.out = reinterpret_cast<float*>(somewhere);
    args.batch = size(q, 0);
    args.num_heads = size(q, 1);
    args.num_kv_heads = size(k, 1);
    args.seq = size(q, 2);
    args.key_dim = size(q, 3);
    args.value_dim = size(v, 3);
    args.softmax_scale = attributes_.softmax_scale;
    args.causal = attributes_.causal;
    if (args.causal) {
      const Dims &past = inputs[kPastKey].dims, &visible = inputs[kVisible].dims;
      require(past.nbDims == 4, "the past has 4 dimensions; found " + text(past));
      const auto capacity = past.d[2];
      expect(past, {4, {k.d[0], k.d[1], capacity, row_elements(format().key, args.key_dim)}}, "the past of keys");
      expect(inputs[kPastValue].dims, {4, {k.d[0], k.d[1], capacity, row_elements(format().value, args.value_dim)}},
             "the past of values");
      expect(inputs[kLengths].dims, {1, {k.d[0]}}, "past_length");
      args.past_length = lengths;
      // One number for all slots is not looked at: it comes where all new tokens see them.
      if (visible.nbDims != 2 || visible.d[1] != 1 || capacity == 1) {
        expect(visible, {2, {k.d[0], capacity}}, "past_visible", ", or 1 last for all slots alike");
        args.past_visible = lengths;
      } else {
        expect(visible, {2, {k.d[0], 1}}, "past_visible");
      }
      args.cache.key = args.cache.value = somewhere;
      args.cache.key_format = format().key;
      args.cache.value_format = format().value;
      args.cache.capacity = size(past, 2);
      if (is_quantised(format())) {
        require(capacity % 2 == 0, "a quantised cache has an even capacity; found " + std::to_string(capacity));
        expect(inputs[kPastScale].dims, {4, {2, k.d[0], k.d[1], capacity / 2}}, "past_scale");
        args.cache.key_scale = args.cache.value_scale = somewhere;
        args.cache.rotated = args.key_dim == PASCALVL_ROTATED_DIM;
      }
    } else {
      args.cu_seqlens = lengths;
      args.num_sequences = std::max(size(inputs[kLengths].dims, 0), 1) - 1;
    }
    return args;
  }
};

Registration<FlashAttention2> registration;

}  // namespace
}  // namespace pascalvl
