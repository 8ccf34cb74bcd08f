// QuantLinear as a TensorRT plugin over the kernels' C ABI. What the op is: plugins/ops/quant_linear/op.py.
#include <algorithm>
#include <cmath>
#include <utility>

#include "plugins/tensorrt/plugin.h"

namespace pascalvl {
namespace {

// What a node's attributes say; also the bytes of a serialised plugin.
struct Attributes {
  static constexpr uint32_t kMagic = 0x4c515650;  // "PVQL"
  static constexpr uint32_t kLayout = PASCALVL_LINEAR_SERIALISED_LAYOUT;
  uint32_t magic = kMagic;
  uint32_t layout = kLayout;
  int32_t in_features = 0, out_features = 0, bits = 0, group = 0, activation = 0;
  int32_t has_zero = 0, has_bias = 0, has_residual = 0;
  int32_t norm = 0, norm_size = 0;
  float epsilon = 0;
};
static_assert(sizeof(Attributes) == 52, "no padding is written");

bool in_codes(const Attributes& a) { return a.bits < 16; }

// A tensor of the node besides x and weight, and whether it is there.
struct Operands {
  int32_t scale = -1, zero = -1, bias = -1, residual = -1, norm_weight = -1, norm_bias = -1;  // numbers; -1: none
  int32_t count = 2;

  explicit Operands(const Attributes& a) {
    if (in_codes(a)) scale = count++;
    if (a.has_zero) zero = count++;
    if (a.has_bias) bias = count++;
    if (a.has_residual) residual = count++;
    if (a.norm != PASCALVL_NO_NORM) norm_weight = count++;
    if (a.norm == PASCALVL_LAYER_NORM) norm_bias = count++;
  }
};

class QuantLinear final : public Plugin<QuantLinear, Attributes> {
 public:
  using Attributes = pascalvl::Attributes;
  explicit QuantLinear(const Attributes& attributes) : Plugin(attributes), operands_(attributes) {}
  static constexpr const char* kName = PASCALVL_LINEAR_OP_NAME;
  static constexpr const char* kVersion = PASCALVL_LINEAR_OP_VERSION;
  static inline const PluginField kFields[] = {{PASCALVL_LINEAR_ATTR_IN_FEATURES, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_OUT_FEATURES, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_BITS, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_GROUP, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_ACTIVATION, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_HAS_ZERO, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_HAS_BIAS, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_HAS_RESIDUAL, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_NORM, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_NORM_SIZE, nullptr, PluginFieldType::kINT32, 1},
                                               {PASCALVL_LINEAR_ATTR_EPSILON, nullptr, PluginFieldType::kFLOAT32, 1}};

  static Attributes parse(const Fields& fields) {
    Attributes attributes;
    int32_t* const values[] = {&attributes.in_features, &attributes.out_features, &attributes.bits,
                               &attributes.group,       &attributes.activation,   &attributes.has_zero,
                               &attributes.has_bias,    &attributes.has_residual, &attributes.norm,
                               &attributes.norm_size};
    constexpr size_t kIntegers = sizeof values / sizeof values[0];
    static_assert(kIntegers + 1 == sizeof kFields / sizeof kFields[0], "one for each, and epsilon");
    const auto read = [&](const char* name, auto& value) {
      require(fields.read(name, value), std::string("attribute ") + name + " is missing");
    };
    for (size_t i = 0; i < kIntegers; ++i) read(kFields[i].name, *values[i]);
    read(PASCALVL_LINEAR_ATTR_EPSILON, attributes.epsilon);
    validate(attributes);
    return attributes;
  }

  // What the kernels would refuse, in whatever bytes claim to be a plugin too.
  static void validate(const Attributes& a) {
    const auto expect = [](bool condition, const char* name, int32_t value, const std::string& expected) {
      require(condition, std::string("attribute ") + name + " is " + std::to_string(value) + "; expected " + expected);
    };
    const auto expect_features = [&](const char* name, int32_t value) {
      expect(value > 0 && value <= PASCALVL_MAX_SIZE, name, value, "1 to " + std::to_string(PASCALVL_MAX_SIZE));
    };
    expect_features(PASCALVL_LINEAR_ATTR_IN_FEATURES, a.in_features);
    expect_features(PASCALVL_LINEAR_ATTR_OUT_FEATURES, a.out_features);
    expect(a.bits == 32 || a.bits == 16 || a.bits == 8 || a.bits == 4, PASCALVL_LINEAR_ATTR_BITS, a.bits,
           "32, 16, 8 or 4");
    expect(!in_codes(a) || a.group == 32 || a.group == 64 || a.group == 128, PASCALVL_LINEAR_ATTR_GROUP, a.group,
           "32, 64 or 128");
    expect(a.activation >= PASCALVL_NO_ACTIVATION && a.activation <= PASCALVL_GELU_ERF, PASCALVL_LINEAR_ATTR_ACTIVATION,
           a.activation, "0, 1, 2 or 3");
    expect(a.activation != PASCALVL_SILU_GATED || a.out_features % 128 == 0, PASCALVL_LINEAR_ATTR_OUT_FEATURES,
           a.out_features, "a multiple of 128 where gated");
    for (const auto& [name, value] :
         {std::pair(PASCALVL_LINEAR_ATTR_HAS_ZERO, a.has_zero), std::pair(PASCALVL_LINEAR_ATTR_HAS_BIAS, a.has_bias),
          std::pair(PASCALVL_LINEAR_ATTR_HAS_RESIDUAL, a.has_residual)})
      expect(value == 0 || value == 1, name, value, "0 or 1");
    expect(in_codes(a) || !a.has_zero, PASCALVL_LINEAR_ATTR_HAS_ZERO, a.has_zero,
           "0 with " + std::to_string(a.bits) + " bits");
    expect(a.norm >= PASCALVL_NO_NORM && a.norm <= PASCALVL_LAYER_NORM, PASCALVL_LINEAR_ATTR_NORM, a.norm, "0, 1 or 2");
    if (a.norm == PASCALVL_NO_NORM) {
      expect(a.norm_size == 0, PASCALVL_LINEAR_ATTR_NORM_SIZE, a.norm_size, "0 without a norm");
    } else {
      const bool divides = a.norm_size > 0 && a.in_features % a.norm_size == 0;
      expect(divides && (!in_codes(a) || a.norm_size == a.in_features || a.norm_size % a.group == 0),
             PASCALVL_LINEAR_ATTR_NORM_SIZE, a.norm_size,
             std::to_string(a.in_features) + " or a divisor of it" + (in_codes(a) ? " that has whole groups" : ""));
    }
    require(std::isfinite(a.epsilon) && a.epsilon >= 0, std::string("attribute ") + PASCALVL_LINEAR_ATTR_EPSILON +
                                                            " is " + std::to_string(a.epsilon) +
                                                            "; expected a finite number of at least 0");
  }

  // x [..., in_features] to [..., results].
  DimsExprs getOutputDimensions(int32_t, const DimsExprs* inputs, int32_t, IExprBuilder& builder) noexcept override {
    DimsExprs out = inputs[0];
    if (out.nbDims > 0) out.d[out.nbDims - 1] = builder.constant(results());  // without dimensions it is refused later
    return out;
  }

  bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    return supports(tensors[position], type(position, num_inputs), num_inputs, operands_.count, num_outputs);
  }

  // For these sizes and for all that a profile of them takes: fewer rows, which are cut into more splits, may need
  // more.
  size_t workspace_bytes(const PluginTensorDesc* inputs) const {
    pascalvl_linear_args args = sizes(inputs);
    size_t most = 0;
    for (; args.rows > 0; --args.rows) {
      size_t bytes = 0;
      check(pascalvl_linear_workspace(&args, &bytes));
      most = std::max(most, bytes);
    }
    return most;
  }

  int32_t enqueue(const PluginTensorDesc* descriptions, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guarded<int32_t>(kName, 1, [&] {
      pascalvl_linear_args args = sizes(descriptions);
      const auto floats = [&](int32_t input) { return input < 0 ? nullptr : static_cast<const float*>(inputs[input]); };
      const auto halves = [&](int32_t input) {
        return input < 0 ? nullptr : static_cast<const uint16_t*>(inputs[input]);
      };
      args.x = floats(0);
      args.weight = inputs[1];
      args.scale = halves(operands_.scale);
      args.zero = halves(operands_.zero);
      args.bias = floats(operands_.bias);
      args.residual = floats(operands_.residual);
      args.norm_weight = floats(operands_.norm_weight);
      args.norm_bias = floats(operands_.norm_bias);
      args.out = static_cast<float*>(outputs[0]);
      size_t bytes = 0;
      check(pascalvl_linear_workspace(&args, &bytes));
      require_workspace();
      check(pascalvl_linear(&args, workspace, bytes, stream));
      return 0;
    });
  }

 private:
  int32_t results() const {
    return attributes_.activation == PASCALVL_SILU_GATED ? attributes_.out_features / 2 : attributes_.out_features;
  }

  DataType type(int32_t position, int32_t num_inputs) const {
    const bool is_words =
        (position == 1 && attributes_.bits != 32) || position == operands_.scale || position == operands_.zero;
    return position < num_inputs && is_words ? DataType::kINT32 : DataType::kFLOAT;
  }

  // The arguments of a call; for pointers, what is never read but looks like one.
  pascalvl_linear_args sizes(const PluginTensorDesc* inputs) const {
    const Attributes& a = attributes_;
    const Dims &x = inputs[0].dims, &weight = inputs[1].dims;
    require(x.nbDims >= 1 && x.d[x.nbDims - 1] == a.in_features,
            "x has shape " + text(x) + "; expected " + std::to_string(a.in_features) + " features");
    const int32_t multiple = in_codes(a) ? a.group : 128 / a.bits;
    const int32_t padded = (a.in_features + multiple - 1) / multiple * multiple;
    const int32_t words = padded / (32 / a.bits);
    require(weight.nbDims == 2 && weight.d[0] == a.out_features && weight.d[1] == words,
            "the weight has shape " + text(weight) + "; expected [" + std::to_string(a.out_features) + ", " +
                std::to_string(words) + "]");
    int64_t rows = 1;
    for (int i = 0; i + 1 < x.nbDims; ++i) {
      const int64_t size = x.d[i];
      require(size > 0 && size <= PASCALVL_MAX_GRID && (rows *= size) <= PASCALVL_MAX_GRID,
              "x has shape " + text(x) + "; expected 1 to " + std::to_string(PASCALVL_MAX_GRID) + " rows");
    }
    if (operands_.residual >= 0) {
      const Dims& residual = inputs[operands_.residual].dims;
      const bool fits = residual.nbDims == x.nbDims && std::equal(x.d, x.d + x.nbDims - 1, residual.d) &&
                        residual.d[x.nbDims - 1] == results();
      require(fits, "the residual has shape " + text(residual) + " beside x of shape " + text(x) + "; expected " +
                        std::to_string(results()) + " features for each row");
    }
    for (const int32_t input : {operands_.norm_weight, operands_.norm_bias}) {
      if (input < 0) continue;
      const Dims& dims = inputs[input].dims;
      require(dims.nbDims == 1 && dims.d[0] == a.norm_size,
              std::string("the norm's ") + (input == operands_.norm_weight ? "weight" : "bias") + " has shape " +
                  text(dims) + "; expected [" + std::to_string(a.norm_size) + "]");
    }
    alignas(16) static char somewhere[16];
    auto* const values = reinterpret_cast<float*>(somewhere);
    const auto* const halves = reinterpret_cast<const uint16_t*>(somewhere);
    pascalvl_linear_args args{};
    args.x = args.out = values;
    args.weight = somewhere;
    if (operands_.scale >= 0) args.scale = halves;
    if (operands_.zero >= 0) args.zero = halves;
    if (operands_.bias >= 0) args.bias = values;
    if (operands_.residual >= 0) args.residual = values;
    if (operands_.norm_weight >= 0) args.norm_weight = values;
    if (operands_.norm_bias >= 0) args.norm_bias = values;
    args.rows = int32_t(rows);
    args.in_features = a.in_features;
    args.out_features = a.out_features;
    args.bits = a.bits;
    args.group = a.group;
    args.activation = a.activation;
    args.norm = a.norm;
    args.norm_size = a.norm_size;
    args.epsilon = a.epsilon;
    return args;
  }

  Operands operands_;
};

Registration<QuantLinear> registration;

}  // namespace
}  // namespace pascalvl
