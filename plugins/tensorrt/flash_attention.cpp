// FlashAttention2 as a TensorRT plugin over the kernels' C ABI. What the op is: plugins/ops/flash_attention/op.py.
#include <algorithm>
#include <initializer_list>

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
enum Input {
  kQkv,
  kQNorm,
  kKNorm,
  kRopeCos,
  kRopeSin,
  kCuSeqlens,
  kPastLength,
  kPageTable,
  kPastVisible,
  kPastKey,
  kPastValue,
  kPastScale
};
enum Output { kOut, kNewKey, kNewValue, kNewScale };
enum PackedInput { kPackedQkv, kPackedCos, kPackedSin, kPackedCuSeqlens };

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
    args.tokens = args.batch = 1;
    size_t bytes = 0;
    check(pascalvl_attention_workspace(&args, &bytes));
  }

  int32_t getNbOutputs() const noexcept override { return !attributes_.causal ? 1 : is_quantised(format()) ? 4 : 3; }

  DataType getOutputDataType(int32_t number, const DataType*, int32_t) const noexcept override {
    return output_type(number);
  }

  // qkv [tokens, width] to out [tokens, num_heads * value_dim], and the new rows [num_kv_heads, tokens, ...].
  DimsExprs getOutputDimensions(int32_t number, const DimsExprs* inputs, int32_t,
                                IExprBuilder& builder) noexcept override {
    const Attributes& a = attributes_;
    // One without dimensions is refused later.
    const auto* tokens = inputs[kQkv].nbDims > 0 ? inputs[kQkv].d[0] : builder.constant(1);
    if (number == kOut) return {2, {tokens, builder.constant(a.num_heads * a.value_dim)}};
    const auto* heads = builder.constant(a.num_kv_heads);
    if (number == kNewScale) return {2, {heads, tokens}};
    const int32_t elements =
        number == kNewKey ? row_elements(format().key, a.head_dim) : row_elements(format().value, a.value_dim);
    return {3, {heads, tokens, builder.constant(elements)}};
  }

  bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    const DataType type = position < num_inputs ? input_type(position) : output_type(position - num_inputs);
    return supports(tensors[position], type, num_inputs, num_inputs_expected(), num_outputs);
  }

  // For these sizes and for all that a profile of them takes: fewer tokens, sequences and pages, with past_visible and
  // without. More pages of a sequence never need less, nor does a call without past_visible, which may decode besides.
  // But fewer tokens and sequences may need more: the fewer tiles of rows, the more splits each has of its past.
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
    args.past_visible = nullptr;
    const int32_t tokens = args.tokens, batch = args.batch;
    // Decode steps: the more sequences, the more they need.
    args.tokens = std::min(tokens, batch);
    count();
    // Other calls; of all that make as many tiles of rows, those of the most tokens need the most.
    const int64_t group = args.num_heads / args.num_kv_heads, rows = prefill_rows(args.value_dim);
    for (args.batch = std::min(batch, tokens - 1); args.batch > 0; --args.batch) {
      for (args.tokens = tokens; args.tokens > args.batch;) {
        count();
        args.tokens = int32_t((args.tokens * group - 1) / rows * rows / group);
      }
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
        args.cu_seqlens = integers(kCuSeqlens);
        args.past_length = integers(kPastLength);
        args.page_table = integers(kPageTable);
        if (args.past_visible) args.past_visible = integers(kPastVisible);
        args.pool = {const_cast<void*>(inputs[kPastKey]), const_cast<void*>(inputs[kPastValue]), nullptr};
        args.new_rows = {outputs[kNewKey], outputs[kNewValue], nullptr};
        if (is_quantised(format())) {
          args.pool.scale = static_cast<uint32_t*>(const_cast<void*>(inputs[kPastScale]));
          args.new_rows.scale = static_cast<uint32_t*>(outputs[kNewScale]);
        }
      } else {
        args.rope_cos = floats(kPackedCos), args.rope_sin = floats(kPackedSin);
        args.cu_seqlens = integers(kPackedCuSeqlens);
      }
      check(pascalvl_attention(&args, workspace, bytes, stream));
      return 0;
    });
  }

 private:
  const KVFormat& format() const { return kFormats[attributes_.kv_format]; }

  int32_t num_inputs_expected() const {
    if (!attributes_.causal) return kPackedCuSeqlens + 1;
    return is_quantised(format()) ? kPastScale + 1 : kPastValue + 1;
  }

  DataType input_type(int32_t position) const {
    if (!attributes_.causal) return position == kPackedCuSeqlens ? DataType::kINT32 : DataType::kFLOAT;
    if (position == kPastKey) return row_type(format().key);
    if (position == kPastValue) return row_type(format().value);
    return position < kCuSeqlens ? DataType::kFLOAT : DataType::kINT32;
  }

  DataType output_type(int32_t number) const {
    if (number == kNewKey) return row_type(format().key);
    if (number == kNewValue) return row_type(format().value);
    return number == kOut ? DataType::kFLOAT : DataType::kINT32;
  }

  static void expect(const Dims& dims, std::initializer_list<int64_t> expected, const char* name,
                     const char* or_else = "") {
    if (std::equal(dims.d, dims.d + std::max(dims.nbDims, 0), expected.begin(), expected.end())) return;
    std::string sizes;
    for (const int64_t size : expected) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    throw std::invalid_argument(std::string(name) + " has shape " + text(dims) + "; expected [" + sizes + "]" +
                                or_else);
  }

  static void expect_axes(const Dims& dims, int32_t axes, const char* name) {
    require(dims.nbDims == axes, std::string(name) + " has shape " + text(dims) + "; expected " + std::to_string(axes) +
                                     (axes == 1 ? " dimension" : " dimensions"));
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
    args.cu_seqlens = reinterpret_cast<const int32_t*>(somewhere);
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
    }
    return args;
  }

  // The same of a call.
  pascalvl_attention_args sizes(const PluginTensorDesc* inputs) const {
    const Attributes& a = attributes_;
    pascalvl_attention_args args = arguments(a);
    const Dims& qkv = inputs[kQkv].dims;
    const int64_t width = int64_t(a.num_heads) * a.head_dim + int64_t(a.num_kv_heads) * (a.head_dim + a.value_dim);
    require(qkv.nbDims == 2 && qkv.d[1] == width,
            "qkv has shape " + text(qkv) + "; expected 2 dimensions, the last of " + std::to_string(width));
    args.tokens = size(qkv, 0);
    const int32_t cos = a.causal ? int32_t(kRopeCos) : int32_t(kPackedCos);
    expect(inputs[cos].dims, {args.tokens, a.head_dim}, "rope_cos");
    expect(inputs[cos + 1].dims, {args.tokens, a.head_dim}, "rope_sin");
    const Dims& bounds = inputs[a.causal ? int32_t(kCuSeqlens) : int32_t(kPackedCuSeqlens)].dims;
    expect_axes(bounds, 1, "cu_seqlens");
    args.batch = std::max(size(bounds, 0), 1) - 1;
    if (!a.causal) return args;
    expect(inputs[kQNorm].dims, {a.head_dim}, "q_norm");
    expect(inputs[kKNorm].dims, {a.head_dim}, "k_norm");
    expect(inputs[kPastLength].dims, {args.batch}, "past_length");
    const Dims &table = inputs[kPageTable].dims, &past = inputs[kPastKey].dims;
    expect_axes(table, 2, "page_table");
    args.sequence_pages = size(table, 1);
    expect(table, {args.batch, args.sequence_pages}, "page_table");
    expect_axes(past, 4, "past_key");
    args.num_pages = size(past, 0);
    const auto expect_rows = [&](const Dims& dims, int32_t row_format, int32_t dim, const char* name) {
      expect(dims, {args.num_pages, a.num_kv_heads, PASCALVL_PAGE_SLOTS, row_elements(row_format, dim)}, name);
    };
    expect_rows(past, format().key, a.head_dim, "past_key");
    expect_rows(inputs[kPastValue].dims, format().value, a.value_dim, "past_value");
    if (is_quantised(format())) {
      expect(inputs[kPastScale].dims, {args.num_pages, a.num_kv_heads, PASCALVL_PAGE_SLOTS}, "past_scale");
    }
    args.pool = args.new_rows;
    args.past_length = args.page_table = args.cu_seqlens;
    // One number for all slots is not looked at: it comes where all new tokens see them.
    const Dims& visible = inputs[kPastVisible].dims;
    if (visible.nbDims != 2 || visible.d[1] != 1) {
      const int64_t slots = int64_t(args.sequence_pages) * PASCALVL_PAGE_SLOTS;
      expect(visible, {args.batch, slots}, "past_visible", ", or 1 last for all slots alike");
      args.past_visible = args.past_length;
    } else {
      expect(visible, {args.batch, 1}, "past_visible");
    }
    return args;
  }
};

Registration<FlashAttention2> registration;

}  // namespace
}  // namespace pascalvl
