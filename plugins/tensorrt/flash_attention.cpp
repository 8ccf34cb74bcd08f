// FlashAttention2 as a TensorRT plugin over the kernels' C ABI. What the op is: plugins/ops/flash_attention/op.py.
#include <algorithm>

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
  static constexpr uint32_t kLayout = PASCALVL_SERIALISED_LAYOUT;
  uint32_t magic = kMagic;
  uint32_t layout = kLayout;
  int32_t causal = 0;
  float softmax_scale = 0, epsilon = 0;
  int32_t num_heads = 0, num_kv_heads = 0, head_dim = 0, value_dim = 0;
  int32_t kv_format = 0;  // number in kFormats; only where causal
};
static_assert(sizeof(Attributes) == 40, "no padding is written");

int32_t parse_kv_format(const std::string& name) {
  std::string known;
  for (int32_t i = 0; i < kNumFormats; ++i) {
    if (name == kFormats[i].name) return i;
    known += (i ? ", " : "") + std::string(kFormats[i].name);
  }
  throw std::invalid_argument("attribute " PASCALVL_ATTR_KV_FORMAT " is '" + name + "'; expected one of " + known);
}

// Inputs and outputs in the node's order: where causal, scales only where quantised; and where not.
enum Input { kQkv, kQNorm, kKNorm, kRopeCos, kRopeSin, kPastLength, kPastVisible, kPastKey, kPastValue, kPastScale };
enum Output { kOut, kNewKey, kNewValue, kNewScale };
enum PackedInput { kPackedQkv, kPackedCos, kPackedSin, kCuSeqlens };

class FlashAttention2 final : public Plugin<FlashAttention2, Attributes> {
 public:
  using Attributes = pascalvl::Attributes;
  using Plugin::Plugin;
  static constexpr const char* kName = PASCALVL_OP_NAME;
  static constexpr const char* kVersion = PASCALVL_OP_VERSION;
  static inline const PluginField kFields[] = {{PASCALVL_ATTR_CAUSAL, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_ATTR_NUM_HEADS, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_ATTR_NUM_KV_HEADS, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_ATTR_HEAD_DIM, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_ATTR_VALUE_DIM, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_ATTR_SOFTMAX_SCALE, nullptr, PluginFieldType::kFLOAT32, 1},
                                               {PASCALVL_ATTR_EPSILON, nullptr, PluginFieldType::kFLOAT32, 1},
                                               {PASCALVL_ATTR_KV_FORMAT, nullptr, PluginFieldType::kCHAR, 1}};

  static Attributes parse(const Fields& fields) {
    Attributes a;
    const auto read = [&](const char* name, auto& number) {
      require(fields.read(name, number), std::string("attribute ") + name + " is missing");
    };
    read(PASCALVL_ATTR_CAUSAL, a.causal);
    read(PASCALVL_ATTR_NUM_HEADS, a.num_heads);
    read(PASCALVL_ATTR_NUM_KV_HEADS, a.num_kv_heads);
    read(PASCALVL_ATTR_HEAD_DIM, a.head_dim);
    read(PASCALVL_ATTR_VALUE_DIM, a.value_dim);
    read(PASCALVL_ATTR_SOFTMAX_SCALE, a.softmax_scale);
    read(PASCALVL_ATTR_EPSILON, a.epsilon);
    std::string kv_format;  // an empty text is what exported nodes have that read no cache
    fields.read(PASCALVL_ATTR_KV_FORMAT, kv_format);
    if (a.causal) a.kv_format = parse_kv_format(kv_format);
    validate(a);
    return a;
  }

  // What the kernels would refuse, in whatever bytes claim to be a plugin too: they are asked for a token without a
  // past, which takes no device.
  static void validate(const Attributes& a) {
    require(a.causal == 0 || a.causal == 1,
            "attribute " PASCALVL_ATTR_CAUSAL " is " + std::to_string(a.causal) + "; expected 0 or 1");
    require(a.kv_format >= 0 && a.kv_format < (a.causal ? kNumFormats : 1),
            "the serialised plugin has cache format number " + std::to_string(a.kv_format) + "; expected 0 to " +
                std::to_string(a.causal ? kNumFormats - 1 : 0) + ": build the engine again");
    pascalvl_attention_args args = arguments(a);
    args.batch = args.seq = args.num_sequences = 1;
    size_t bytes = 0;
    check(pascalvl_attention_workspace(&args, &bytes));
  }

  int32_t getNbOutputs() const noexcept override { return !attributes_.causal ? 1 : is_quantised(format()) ? 4 : 3; }

  DataType getOutputDataType(int32_t number, const DataType*, int32_t) const noexcept override {
    return output_type(number);
  }

  // qkv [lead ..., width] to out [lead ..., num_heads * value_dim], and the new rows of [batch, seq, width].
  DimsExprs getOutputDimensions(int32_t number, const DimsExprs* inputs, int32_t,
                                IExprBuilder& builder) noexcept override {
    const Attributes& a = attributes_;
    const DimsExprs& qkv = inputs[kQkv];
    // One of fewer dimensions is refused later.
    const auto lead = [&](int32_t axis) { return axis + 1 < qkv.nbDims ? qkv.d[axis] : builder.constant(1); };
    if (number == kOut) {
      const auto* width = builder.constant(a.num_heads * a.value_dim);
      return a.causal ? DimsExprs{3, {lead(0), lead(1), width}} : DimsExprs{2, {lead(0), width}};
    }
    const auto* heads = builder.constant(a.num_kv_heads);
    if (number == kNewScale) return {3, {lead(0), heads, lead(1)}};
    const int32_t elements =
        number == kNewKey ? row_elements(format().key, a.head_dim) : row_elements(format().value, a.value_dim);
    return {4, {lead(0), heads, lead(1), builder.constant(elements)}};
  }

  bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    const DataType type = position < num_inputs ? input_type(position) : output_type(position - num_inputs);
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
      const auto floats = [&](int32_t input) { return static_cast<const float*>(inputs[input]); };
      const auto integers = [&](int32_t input) { return static_cast<const int32_t*>(inputs[input]); };
      args.qkv = floats(kQkv);
      args.out = static_cast<float*>(outputs[kOut]);
      if (args.causal) {
        args.q_norm = floats(kQNorm), args.k_norm = floats(kKNorm);
        args.rope_cos = floats(kRopeCos), args.rope_sin = floats(kRopeSin);
        args.past_length = integers(kPastLength);
        if (args.past_visible) args.past_visible = integers(kPastVisible);
        args.past = {const_cast<void*>(inputs[kPastKey]), const_cast<void*>(inputs[kPastValue]), nullptr};
        args.new_rows = {outputs[kNewKey], outputs[kNewValue], nullptr};
        if (is_quantised(format())) {
          args.past.scale = static_cast<uint32_t*>(const_cast<void*>(inputs[kPastScale]));
          args.new_rows.scale = static_cast<uint32_t*>(outputs[kNewScale]);
        }
      } else {
        args.rope_cos = floats(kPackedCos), args.rope_sin = floats(kPackedSin);
        args.cu_seqlens = integers(kCuSeqlens);
      }
      check(pascalvl_attention(&args, workspace, bytes, stream));
      return 0;
    });
  }

 private:
  const KVFormat& format() const { return kFormats[attributes_.kv_format]; }

  int32_t num_inputs_expected() const {
    if (!attributes_.causal) return kCuSeqlens + 1;
    return is_quantised(format()) ? kPastScale + 1 : kPastValue + 1;
  }

  DataType input_type(int32_t position) const {
    if (!attributes_.causal) return position == kCuSeqlens ? DataType::kINT32 : DataType::kFLOAT;
    if (position == kPastKey) return row_type(format().key);
    if (position == kPastValue) return row_type(format().value);
    return position < kPastLength ? DataType::kFLOAT : DataType::kINT32;
  }

  DataType output_type(int32_t number) const {
    if (number == kNewKey) return row_type(format().key);
    if (number == kNewValue) return row_type(format().value);
    return number == kOut ? DataType::kFLOAT : DataType::kINT32;
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

  // The arguments that attributes give; for pointers, what is never read but looks like one.
  static pascalvl_attention_args arguments(const Attributes& a) {
    alignas(16) static char somewhere[16];
    const auto* values = reinterpret_cast<const float*>(somewhere);
    const KVFormat& format = kFormats[a.kv_format];
    pascalvl_attention_args args{};
    args.qkv = args.rope_cos = args.rope_sin = values;
    args.out = reinterpret_cast<float*>(somewhere);
    args.num_heads = a.num_heads;
    args.num_kv_heads = a.num_kv_heads;
    args.head_dim = a.head_dim;
    args.value_dim = a.value_dim;
    args.softmax_scale = a.softmax_scale;
    args.epsilon = a.epsilon;
    args.causal = a.causal;
    if (a.causal) {
      args.q_norm = args.k_norm = values;
      args.key_format = format.key;
      args.value_format = format.value;
      args.rotated = is_quantised(format) && a.head_dim == PASCALVL_ROTATED_DIM;
      args.new_rows = {somewhere, somewhere, is_quantised(format) ? reinterpret_cast<uint32_t*>(somewhere) : nullptr};
    } else {
      args.cu_seqlens = reinterpret_cast<const int32_t*>(somewhere);
    }
    return args;
  }

  // The same of a call.
  pascalvl_attention_args sizes(const PluginTensorDesc* inputs) const {
    const Attributes& a = attributes_;
    pascalvl_attention_args args = arguments(a);
    const Dims& qkv = inputs[kQkv].dims;
    const int64_t width = int64_t(a.num_heads) * a.head_dim + int64_t(a.num_kv_heads) * (a.head_dim + a.value_dim);
    const int32_t axes = a.causal ? 3 : 2;
    require(qkv.nbDims == axes && qkv.d[axes - 1] == width, "qkv has shape " + text(qkv) + "; expected " +
                                                                std::to_string(axes) + " dimensions, the last of " +
                                                                std::to_string(width));
    Dims table = qkv;
    table.d[axes - 1] = a.head_dim;
    const int32_t cos = a.causal ? int32_t(kRopeCos) : int32_t(kPackedCos);
    expect(inputs[cos].dims, table, "rope_cos");
    expect(inputs[cos + 1].dims, table, "rope_sin");
    if (!a.causal) {
      const Dims& bounds = inputs[kCuSeqlens].dims;
      require(bounds.nbDims == 1, "cu_seqlens has shape " + text(bounds) + "; expected 1 dimension");
      args.batch = 1;
      args.seq = size(qkv, 0);
      args.num_sequences = std::max(size(bounds, 0), 1) - 1;
      return args;
    }
    args.batch = size(qkv, 0);
    args.seq = size(qkv, 1);
    expect(inputs[kQNorm].dims, {1, {a.head_dim}}, "q_norm");
    expect(inputs[kKNorm].dims, {1, {a.head_dim}}, "k_norm");
    expect(inputs[kPastLength].dims, {1, {qkv.d[0]}}, "past_length");
    const Dims &past = inputs[kPastKey].dims, &visible = inputs[kPastVisible].dims;
    require(past.nbDims == 4, "past_key has shape " + text(past) + "; expected 4 dimensions");
    const auto capacity = past.d[2];
    const auto rows = [&](int32_t row_format, int32_t dim) {
      return Dims{4, {qkv.d[0], a.num_kv_heads, capacity, row_elements(row_format, dim)}};
    };
    expect(past, rows(format().key, a.head_dim), "past_key");
    expect(inputs[kPastValue].dims, rows(format().value, a.value_dim), "past_value");
    if (is_quantised(format())) {
      expect(inputs[kPastScale].dims, {3, {qkv.d[0], a.num_kv_heads, capacity}}, "past_scale");
    }
    args.past = args.new_rows;
    args.capacity = size(past, 2);
    args.past_length = static_cast<const int32_t*>(args.past.key);
    // One number for all slots is not looked at: it comes where all new tokens see them.
    if (visible.nbDims != 2 || visible.d[1] != 1 || capacity == 1) {
      expect(visible, {2, {qkv.d[0], capacity}}, "past_visible", ", or 1 last for all slots alike");
      args.past_visible = args.past_length;
    } else {
      expect(visible, {2, {qkv.d[0], 1}}, "past_visible");
    }
    return args;
  }
};

Registration<FlashAttention2> registration;

}  // namespace
}  // namespace pascalvl
